"""Cost of every meta-gradient, as a multiple of plain unrolling. Run by hand; words select rows.

The Adafactor rule on the digits MLP (64-32-10, batch 128); 16 particles, 20 inner steps per
estimate, episodes of 100 steps for estimators with a memory and of 20 for the others. Inner steps
count those of every particle and of both antithetic partners; the ratio compares with the same
number of inner steps of the same number of runs without any estimator, timed in turns with it.
For example:

    python benchmarks/estimators.py PES NRES
    python benchmarks/estimators.py memory
"""

import functools
import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from common import show

import lopt

PARTICLES, TRUNCATION, HORIZON, DIRECTIONS, REPEATS = 16, 20, 100, 4, 25


def inner_training(horizon: int) -> lopt.InnerTraining:
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 1), np.uint8)
    data = lopt.tasks.image_data(images, np.arange(1500) % 10, None, None, 10, 8)
    task = lopt.tasks.mlp_classification(data, (32,), batch_size=128)
    return lopt.InnerTraining(task, lopt.adafactor_mlp(), horizon)


LONG, SHORT = inner_training(HORIZON), inner_training(TRUNCATION)
ES = lopt.ES(SHORT)
# The estimator of one particle, its runs, and the multiple of plain unrolling it may cost.
ROWS = {
    "TruncatedBackprop": (lopt.TruncatedBackprop(LONG, TRUNCATION), 1, None),
    "MetaTask": (lopt.MetaTask(SHORT), 1, None),
    "MetaTask, products kept": (lopt.MetaTask(SHORT, keep_products=True), 1, 4),
    "MetaTask, 4 segments": (lopt.MetaTask(SHORT, segments=4), 1, None),
    f"ForwardMode, {DIRECTIONS} directions": (
        lopt.ForwardMode(SHORT, DIRECTIONS),
        1,
        1 + 2 * DIRECTIONS,
    ),
    f"OnlineForwardMode, {DIRECTIONS} directions": (
        lopt.OnlineForwardMode(LONG, TRUNCATION, DIRECTIONS),
        1,
        1 + 2 * DIRECTIONS,
    ),
    "Reparameterized": (lopt.Reparameterized(lopt.MetaTask(SHORT)), 2, None),
    "ES": (ES, 2, None),
    "ES, one arm": (lopt.ES(SHORT, antithetic=False), 1, None),
    "TruncatedES": (lopt.TruncatedES(LONG, TRUNCATION), 2, None),
    "PES": (lopt.PES(LONG, TRUNCATION), 2, 1.15),
    "NRES": (lopt.NRES(LONG, TRUNCATION), 2, 1.15),
    "GPES": (lopt.GPES(LONG, TRUNCATION, 2 * TRUNCATION), 2, 1.15),
    "PolicyGradient": (lopt.PolicyGradient(SHORT), 1, None),
    "InverseVariance": (
        lopt.InverseVariance(ES, lopt.Reparameterized(lopt.MetaTask(SHORT)), PARTICLES),
        4,
        None,
    ),
    "RankedES": (lopt.RankedES(ES, PARTICLES), 2, None),
    # Theta itself is the first of its candidates.
    "RandomSearch": (lopt.RandomSearch(SHORT, PARTICLES - 1), 1, None),
    "Evosax, CMA_ES": (lopt.Evosax(SHORT, PARTICLES), 1, None),
    "Sum": (
        lopt.Sum(
            (lopt.Mean(ES, PARTICLES // 2), lopt.Mean(lopt.NRES(LONG, TRUNCATION), PARTICLES // 2))
        ),
        2,
        None,
    ),
}
# These have particles of their own.
MANY = (lopt.InverseVariance, lopt.RankedES, lopt.RandomSearch, lopt.Evosax, lopt.Sum)


@functools.cache
def plain(runs: int):
    """Returns a compiled function of theta and state that only unrolls, and its first state."""
    theta = LONG.learned.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), runs)
    state = eqx.filter_jit(lambda inner: jax.vmap(inner.begin, (None, 0))(theta, keys))(LONG)

    @eqx.filter_jit
    def advance(inner, theta, state):
        losses, state = jax.vmap(inner.advance, (None, 0, None))(theta, state, TRUNCATION)
        return losses.mean(), state

    return advance.lower(LONG, theta, state).compile(), state


def row(name: str) -> list[str]:
    one, arms, allowed = ROWS[name]
    meta = one if isinstance(one, MANY) else lopt.Mean(one, PARTICLES)
    theta, key = LONG.learned.init(jax.random.key(0)), jax.random.key(2)
    state = eqx.filter_jit(type(meta).prepare)(meta, theta, key)
    began = time.perf_counter()
    lowered = eqx.filter_jit(type(meta).estimate).lower(meta, theta, state, key)
    traced = time.perf_counter()
    estimate = lowered.compile()
    compiled = time.perf_counter()
    unroll, episodes = plain(PARTICLES * arms)
    seconds, ratios = [], []
    for i in range(REPEATS + 1):
        start = time.perf_counter()
        _, episodes = jax.block_until_ready(unroll(LONG, theta, episodes))
        middle = time.perf_counter()
        _, state = jax.block_until_ready(estimate(meta, theta, state, jax.random.fold_in(key, i)))
        end = time.perf_counter()
        if i:
            seconds.append(end - middle)
            ratios.append((end - middle) / (middle - start))
    median = statistics.median(seconds)
    return [
        name,
        f"{1 / median:,.1f}",
        f"{PARTICLES * arms * TRUNCATION / median:,.0f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        "" if allowed is None else f"{allowed:g}",
        f"{traced - began:.1f} + {compiled - traced:.1f}",
        f"{estimate.compiled.memory_analysis().temp_size_in_bytes / 1e6:.0f}",
    ]


def memory() -> list[list[str]]:
    """Measures full backpropagation by horizon and checkpoint segments, one particle."""
    rows: list[list[str]] = []
    pairs = ((100, 1), (100, 10), (1000, 1), (1000, 25), (10_000, 1), (10_000, 100))
    for horizon, segments in pairs:
        meta = lopt.MetaTask(inner_training(horizon), segments)
        theta, key = meta.init(jax.random.key(0)), jax.random.key(2)
        compiled = eqx.filter_jit(type(meta).estimate).lower(meta, theta, (), key).compile()
        size = compiled.compiled.memory_analysis().temp_size_in_bytes / 1e6
        rows.append([f"{horizon:,}", str(segments), f"{size:,.1f}"])
    return rows


def main(selected: list[str]) -> None:
    names = [name for name in ROWS if not selected or name.split(",")[0] in selected]
    headings = ["estimator", "outer steps/s", "inner steps/s", "x plain", "from, to", "at most"]
    headings += ["trace + compile s", "temporary MB"]
    if names:
        show("Meta-gradients, 16 particles, 20 steps", headings, [row(name) for name in names])
    if not selected or "memory" in selected:
        show("Full backpropagation", ["horizon", "segments", "temporary MB"], memory())


if __name__ == "__main__":
    jnp.zeros(())  # JAX starts before anything is timed
    main(sys.argv[1:])
