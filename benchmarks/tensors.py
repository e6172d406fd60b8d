"""Compile time of an update by the number of tensors, and time of a sharded one. Run by hand.

Layers of one width, a weight and a bias each: compile time of the Adafactor rule grows with the
number of shapes. And a million weights sharded over four CPU devices, against AdamW:

    python benchmarks/tensors.py layers
    python benchmarks/tensors.py sharded
"""

import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax
from common import show
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lopt

LAYERS, WIDTHS, REPEATS = (4, 24, 72), (64, 256), 15
COLLECTIVES = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def optimizers() -> dict[str, optax.GradientTransformation]:
    learned = lopt.adafactor_mlp()
    return {"AdamW": optax.adamw(1e-3), "adafactor_mlp": learned.optimizer(learned.init(_key()))}


def _key() -> jax.Array:
    return jax.random.key(0)


def layers() -> None:
    rows = []
    for width in WIDTHS:
        for number in LAYERS:
            params = [{"w": jnp.ones((width, width)), "b": jnp.ones(width)} for _ in range(number)]
            cells = []
            for optimizer in optimizers().values():
                state = optimizer.init(params)
                began = time.perf_counter()
                lowered = jax.jit(optimizer.update).lower(params, state, params)
                traced = time.perf_counter()
                lowered.compile()
                cells.append(f"{traced - began:.1f} + {time.perf_counter() - traced:.1f}")
            rows.append([f"{number} of width {width}", *cells])
    show("Trace + compile, s", ["layers", *optimizers()], rows)


def sharded() -> None:
    mesh = jax.make_mesh((4,), ("x",))
    params = jax.device_put(jnp.ones((1024, 1024)), NamedSharding(mesh, P("x", None)))
    rows = []
    for name, optimizer in optimizers().items():
        state = optimizer.init(params)
        compiled = jax.jit(optimizer.update).lower(params, state, params).compile()
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            _, state = jax.block_until_ready(compiled(params, state, params))
            seconds.append(time.perf_counter() - began)
        count = len(re.findall(COLLECTIVES, compiled.as_text()))
        rows.append([name, f"{1e3 * statistics.median(seconds):.1f}", str(count)])
    show("A million weights on four devices", ["optimizer", "ms", "collectives"], rows)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    for word in sys.argv[1:] or ["layers", "sharded"]:
        {"layers": layers, "sharded": sharded}[word]()
