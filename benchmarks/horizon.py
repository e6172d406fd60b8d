"""Cost of hypergradients by forward mode, and of a hyperparameter surface. Run by hand.

Forward mode with k hyperparameters against a plain run of the same optimizer, on the digits MLP
(64-32-10, batch 128), one run at a time, timed in turns with it; temporary memory at two lengths.
And 400 points of learning rate and decay for 1,000 steps each, with and without compilation. For
example:

    python benchmarks/horizon.py hypergradients
    python benchmarks/horizon.py surface
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import optax
from common import show

import lopt
from lopt.experiment.runs.environment import use_all_cores

LENGTHS, REPEATS = (200, 2000), 15
ROWS = {
    "momentum": (optax.sgd, {"learning_rate": 0.01}, {"momentum": 0.9}),
    "Adam": (optax.adam, {"learning_rate": 0.001}, {"b1": 0.9, "b2": 0.99, "eps": 1e-6}),
}


def hypergradients() -> None:
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), (32,), batch_size=128)
    key = jax.random.key(0)
    rows = []
    for name, (factory, first, others) in ROWS.items():
        for k in range(1, len(others) + 2):
            chosen = {**first, **dict(list(others.items())[: k - 1])}
            learned = lopt.learnable(factory, **chosen)
            theta = learned.init(key)
            cells = []
            for length in LENGTHS:
                inner = lopt.InnerTraining(task, learned, length)
                forward = lopt.ForwardMode(inner)

                def plain_run(inner, theta):
                    return inner.meta_loss(theta, key)

                def forward_run(forward, theta):
                    return forward.estimate(theta, (), key)[0].grads

                plain = jax.jit(plain_run).lower(inner, theta).compile()
                began = time.perf_counter()
                both = jax.jit(forward_run).lower(forward, theta).compile()
                compile_seconds = time.perf_counter() - began
                ratios = []
                for _ in range(REPEATS):
                    ratios.append(seconds(both, forward, theta) / seconds(plain, inner, theta))
                memory = [p.memory_analysis().temp_size_in_bytes / 1e6 for p in (plain, both)]
                cells += [f"{statistics.median(ratios):.2f}", f"{memory[1]:.2f}"]
                cells += [f"{memory[1] / memory[0]:.2f}"]
            rows.append([f"{name}, k = {k}", str(1 + 2 * k), str(1 + k), *cells])
            rows[-1].append(f"{compile_seconds:.1f}")
    headings = ["", "1 + 2 k", "1 + k"]
    for length in LENGTHS:
        headings += [f"{length} steps: time ratio", "MB", "memory ratio"]
    show("Forward mode against a plain run", [*headings, "compile s"], rows)


def seconds(program, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - began


def surface() -> None:
    use_all_cores()
    from lopt.experiment.studies import short_horizon
    from lopt.experiment.studies.settings import SurfaceSettings

    settings = SurfaceSettings("digits", (10, 100, 1000), 400, "grid", 250.0, batches=20)
    times = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            short_horizon.surface(Path(folder), settings)
            times.append(time.perf_counter() - began)
    rows = [[f"{times[0]:.1f}", f"{times[1]:.1f}", "60"]]
    show(
        "Surface of 400 points, 1,000 steps, with the field at 49 points for 100 steps",
        ["seconds, compiling", "again", "at most"],
        rows,
    )


if __name__ == "__main__":
    for word in sys.argv[1:] or ["surface", "hypergradients"]:
        {"hypergradients": hypergradients, "surface": surface}[word]()
