"""Cost of watching symmetries, and what keeping them costs a learned optimizer. Run by hand.

Recording every step of the digits MLP (64-32-10, batch 128), in turns with a plain unroll. And a
small rule meta-trained with penalties on symmetry breaking, or with its updates projected, all with
equal budgets, on a digits MLP with 20 ReLU units. For example:

    python benchmarks/symmetry.py cost
    python benchmarks/symmetry.py tradeoff
"""

import itertools
import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from common import show

import lopt
from lopt.analysis.dynamics import UpdateHistogram
from lopt.analysis.symmetry import (
    SymmetryPenalty,
    SymmetryProbe,
    broken_component,
    remove_breaking,
    symmetries,
)
from lopt.experiment.trainings import recorded_together

STEPS, REPEATS, AT_ONCE = 200, 40, (1, 100)
HORIZON, TRUNCATION, PARTICLES, OUTER_STEPS, SEEDS, META_SEEDS = 100, 20, 8, 200, 10, 3
STRENGTHS = (0.0, 0.03, 0.1, 0.3, 1.0)


class Recorded(eqx.Module):
    """The loss, which the plain unroll records as well, and more."""

    more: eqx.Module

    def __call__(self, step):
        """Returns both."""
        return step.loss, self.more(step)


def cost() -> None:
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), (32,), batch_size=128)
    key = jax.random.key(0)
    generators = symmetries(task, key).generators
    records = {
        "plain": lopt.loss_of,
        "SymmetryProbe": Recorded(SymmetryProbe(generators)),
        "UpdateHistogram": Recorded(UpdateHistogram()),
    }
    learned = lopt.small_mlp()
    optimizers = {
        "SGD": optax.sgd(0.1),
        "Adam": optax.adam(0.01),
        "small_mlp": learned.optimizer(learned.init(key)),
    }
    run, rows = eqx.filter_jit(recorded_together), []
    for (name, optimizer), at_once in itertools.product(optimizers.items(), AT_ONCE):
        state = lopt.start(task, optimizer, task.init(key), key)
        times = {record: [] for record in records}
        for i in range(REPEATS + 1):
            for record, function in records.items():
                began = time.perf_counter()
                done = run(task, optimizer, state, STEPS, function, at_once)
                jax.block_until_ready(done)
                if i:  # the first compiles
                    times[record].append(time.perf_counter() - began)
        plain = times.pop("plain")
        cells = [str(at_once), f"{1e6 * statistics.median(plain) / STEPS:.0f}"]
        for seconds in times.values():
            ratios = [a / b for a, b in zip(seconds, plain, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(seconds) / min(plain):.2f})")
        rows.append([name, *cells])
    show(
        "Recording every step: median ratio (and that of the fastest), at most 1.3",
        ["", "at_once", "µs a step", "SymmetryProbe", "UpdateHistogram"],
        rows,
    )


class Projected(lopt.AbstractLearnedOptimizer):
    """Another, whose updates have no component along tangents of symmetries."""

    one: lopt.AbstractLearnedOptimizer
    generators: tuple

    def init(self, key):
        """Returns the weights of the one."""
        return self.one.init(key)

    def begin(self, theta, params, num_steps=None):
        """Returns the state of the one."""
        return self.one.begin(theta, params, num_steps)

    def update(self, theta, grads, state, params=None, *, value=None, **extra):
        """Returns its updates, projected."""
        updates, state = self.one.update(theta, grads, state, params, value=value, **extra)
        broken = broken_component(self.generators, params, updates)
        return jax.tree.map(jnp.subtract, updates, broken), state


def tradeoff() -> None:
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), (20,), batch_size=128)
    key = jax.random.key(0)
    generators = symmetries(task, key).generators
    learned = lopt.small_mlp(step_multiplier=0.03)
    rows = []

    def row(name, thetas, optimizer, seconds):
        losses, deviations = evaluate(task, optimizer, thetas, generators)
        rows.append([name, with_spread(losses), *map(with_spread, deviations), f"{seconds:.0f}"])
        print(rows[-1], flush=True)

    for strength in STRENGTHS:
        objective = SymmetryPenalty(generators, strength, "cosine")
        thetas, seconds = meta_train(task, learned, objective)
        row(f"penalty {strength:g}", thetas, learned.optimizer, seconds)
        if not strength:
            for share in (0.5, 0.9, 1.0):
                row(
                    f"no penalty, {share:g} removed when used",
                    thetas,
                    lambda theta, share=share: remove_breaking(
                        learned.optimizer(theta), generators, share
                    ),
                    0.0,
                )
    projected = Projected(learned, generators)
    thetas, seconds = meta_train(task, projected, lopt.train_loss)
    row("meta-trained with all of it removed", thetas, projected.optimizer, seconds)
    headings = ["", "final loss", *(g.kind for g in generators), "seconds of meta-training"]
    title = (
        f"Normalised deviation, mean over {HORIZON} steps and {SEEDS} seeds; "
        f"mean and deviation over {META_SEEDS} meta-trainings"
    )
    show(title, headings, rows)


def with_spread(values):
    return f"{values.mean():.3g} ± {values.std():.1g}"


def meta_train(task, learned, objective):
    inner = lopt.InnerTraining(task, learned, HORIZON, objective)
    meta = lopt.Mean(lopt.PES(inner, TRUNCATION, 0.01), PARTICLES)
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))

    @jax.jit
    @jax.vmap
    def runs(key):
        first, second = jax.random.split(key)
        state = lopt.start(meta, outer, learned.init(first), second)
        return lopt.unroll(meta, outer, state, OUTER_STEPS)[0].params

    began = time.perf_counter()
    thetas = jax.block_until_ready(runs(jax.random.split(jax.random.key(1), META_SEEDS)))
    return thetas, time.perf_counter() - began


def evaluate(task, optimizer, thetas, generators):
    record = Recorded(SymmetryProbe(generators))

    @jax.jit
    def runs(thetas, keys):
        def run(theta, key):
            state = lopt.start(task, optimizer(theta), task.init(key), key)
            return lopt.unroll(task, optimizer(theta), state, HORIZON, record=record)[1]

        return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(thetas, keys)

    losses, readings = runs(thetas, jax.random.split(jax.random.key(3), SEEDS))
    sizes = [readings[g.name].updates.cosine.mean(axis=(1, 2)) for g in generators]
    return losses[..., -10:].mean(axis=(1, 2)), sizes


if __name__ == "__main__":
    for word in sys.argv[1:] or ["cost", "tradeoff"]:
        {"cost": cost, "tradeoff": tradeoff}[word]()
