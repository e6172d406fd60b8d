"""Speed of meta-training: estimators by rules by tasks. Run by hand; arguments select rows.

Truncation 20, horizon 100. Steps count every unrolled inner step of every particle and of both
antithetic partners. Each row is a process of its own. Every core is a device, as for `lopt train`,
and `particle_mesh` says how many of them are used; with the word "single" it is one, with "spread"
all. Numbers are those of particles, 16 by default; `at_once=4` computes so many at once:

    python benchmarks/meta_training.py PES adafactor_mlp "8x8 MLP" 16 64 256
    python benchmarks/meta_training.py PES single at_once=4
"""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import in_own_process, measure, show

import lopt
from lopt.core.devices import device_mesh
from lopt.experiment.runs.environment import use_all_cores

TRUNCATION, HORIZON = 20, 100
DEVICES = ("single", "spread")
TASKS = ("quadratic", "8x8 MLP")
RULES = ("small_mlp", "adafactor_mlp")
ESTIMATORS = ("PES", "ES", "TruncatedBackprop")


def build_task(name: str) -> lopt.AbstractTask:
    if name == "quadratic":
        return lopt.tasks.Quadratic(jnp.full(10, 2.0), jnp.zeros(10))
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 1), np.uint8)
    data = lopt.tasks.image_data(images, np.arange(1500) % 10, None, None, 10, 8)
    return lopt.tasks.mlp_classification(data, (32,), batch_size=128)


def row(estimator: str, rule: str, task: str, particles: str, at_once: str, devices: str) -> dict:
    use_all_cores()
    num = int(particles)
    learned, key = getattr(lopt, rule)(), jax.random.key(0)
    inner = lopt.InnerTraining(build_task(task), learned, HORIZON)
    one, steps = {
        "PES": (lambda: lopt.PES(inner, TRUNCATION), 2 * TRUNCATION),
        "ES": (lambda: lopt.ES(inner), 2 * HORIZON),
        "TruncatedBackprop": (lambda: lopt.TruncatedBackprop(inner, TRUNCATION), TRUNCATION),
    }[estimator]
    meta = lopt.Mean(one(), num, int(at_once) or None)
    # One update of all of theta at once compiles faster than one for each of its leaves.
    optimizer = optax.flatten(optax.adam(1e-3))
    outer_steps = 50 if task == "quadratic" else 3
    meshes = {"single": lambda: device_mesh(1), "spread": device_mesh}
    with jax.set_mesh(meshes.get(devices, lambda: lopt.particle_mesh(meta))()):
        state = lopt.start(meta, optimizer, learned.init(key), key)
        result = measure(
            lopt.unroll,
            (meta, optimizer, state, outer_steps),
            lambda arguments, outputs: (*arguments[:2], outputs[0], arguments[3]),
        )
    total = outer_steps * num * steps
    return result | {
        "outer": outer_steps / result["seconds"],
        "inner": total / result["seconds"],
        "slowest_inner": total / result["slowest"],
        "fastest_inner": total / result["fastest"],
    }


def main(words: list[str]) -> None:
    at_once = next((word.removeprefix("at_once=") for word in words if "=" in word), "0")
    devices = next((word for word in words if word in DEVICES), "chosen")
    numbers = [word for word in words if word.isdigit()] or ["16"]
    chosen = {w for w in words if not (w.isdigit() or "=" in w or w in DEVICES)}
    rows = []
    for task, rule, estimator, num in itertools.product(TASKS, RULES, ESTIMATORS, numbers):
        if not chosen <= {task, rule, estimator}:
            continue
        result = in_own_process(__file__, estimator, rule, task, num, at_once, devices)
        rows.append(
            [
                f"{estimator}, {rule}, {task}",
                num,
                f"{result['outer']:,.1f}",
                f"{result['inner']:,.0f}",
                f"{result['slowest_inner']:,.0f} to {result['fastest_inner']:,.0f}",
                f"{result['trace']:.1f} + {result['compile']:.1f}",
                f"{result['temporary_mb']:.0f}",
                f"{result['mb_beyond_process']:.0f}",
            ]
        )
    headings = ["estimator, rule, task", "particles", "outer steps/s", "inner steps/s", "from, to"]
    headings += ["trace + compile s", "temporary MB", "MB beyond process"]
    show("Meta-training, truncation 20", headings, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(row(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
