"""Cost of a distilled rule's step, and of meta-training the LSTM optimizers. Run by hand.

A step of `optax.adam` and of rules by equation on a tree of a million weights, timed in turns; and
seconds per inner step of truncated backpropagation through RNNProp, by the length of the window.
For example:

    python benchmarks/distilled.py step
    python benchmarks/distilled.py unroll
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import show

import lopt
from lopt.learned import MomentFeatures
from lopt.symbolic import Variable, make_expression, symbolic_optimizer

REPEATS, WINDOWS = 31, (5, 10, 20, 40, 80)
SHAPES = [(784, 512), (512,), (512, 512), (512,), (512, 512), (512,), (512, 100), (100,)]

M, V = Variable("m"), Variable("v")
MT, GT = Variable("m_normalised"), Variable("g_normalised")
RULES = {
    "-a m / sqrt(v)": (("divide", ("multiply", -1e-3, M), ("sqrt", V)), ("m", "v")),
    "a tanh(-b mt - c gt)": (
        (
            "multiply",
            0.01,
            ("tanh", ("add", ("multiply", -1.3, MT), ("multiply", -0.4, GT))),
        ),
        ("m_normalised", "g_normalised"),
    ),
}


def step() -> None:
    params = {f"w{i}": jnp.zeros(shape) for i, shape in enumerate(SHAPES)}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    optimizers = {"optax.adam": optax.adam(1e-3)}
    for name, (root, features) in RULES.items():
        learned = symbolic_optimizer(make_expression(root), MomentFeatures(features))
        optimizers[name] = learned.optimizer(learned.init(jax.random.key(0)))

    def program(optimizer):
        @jax.jit
        def one_step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return one_step

    programs = {name: program(optimizer) for name, optimizer in optimizers.items()}
    runs = {
        name: programs[name](params, optimizer.init(params), grads)
        for name, optimizer in optimizers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(REPEATS):
        for name, program in programs.items():
            began = time.perf_counter()
            runs[name] = jax.block_until_ready(program(*runs[name], grads))
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["optax.adam"], strict=True)]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(runs[name][1]))
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(times):.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{size:,}",
            ]
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    headings = ["rule", "ms a step", "x Adam (at most 1.5)", "bytes of state"]
    show(f"A step on {count:,} weights", headings, rows)


def unroll() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 1), np.uint8)
    data = lopt.tasks.image_data(images, np.arange(1500) % 10, None, None, 10, 8)
    task = lopt.tasks.mlp_classification(data, (30, 20), batch_size=128)
    rows = []
    for window in WINDOWS:
        inner = lopt.InnerTraining(task, lopt.rnnprop(), 2 * window)
        meta = lopt.TruncatedBackprop(inner, window)
        theta, key = inner.learned.init(jax.random.key(0)), jax.random.key(1)
        state = meta.prepare(theta, key)
        program = jax.jit(lambda theta, state, key, meta=meta: meta.estimate(theta, state, key))
        compiled = program.lower(theta, state, key).compile()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            _, state = jax.block_until_ready(compiled(theta, state, key))
            times.append(time.perf_counter() - began)
        memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
        each = 1e3 * statistics.median(times) / window
        rows.append([str(window), f"{each:.2f}", f"{memory:.0f}"])
    show(
        "Truncated backpropagation through RNNProp, 64-30-20-10, batch 128",
        ["window", "ms per inner step", "temporary MB"],
        rows,
    )


if __name__ == "__main__":
    for word in sys.argv[1:] or ["step", "unroll"]:
        {"step": step, "unroll": unroll}[word]()
