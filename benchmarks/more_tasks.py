"""The more tasks, the better: one rule and one budget, meta-trained on 1, 4, 16 and 64 tasks.

Tasks are perceptrons on digits that differ in widths, activation, labels, number of examples, and
in the scales of inputs and initial weights. Each rule is judged by its mean training loss on 32
tasks that none was trained on, and on its own; three seeds choose tasks, theta and batches. Prints
a table and draws a figure:

    python benchmarks/more_tasks.py more_tasks.png
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import lopt
from lopt.core import AbstractTask, AbstractTaskFamily
from lopt.experiment.report import Report, finish, measured
from lopt.experiment.runs.environment import prepare_jax
from lopt.experiment.trainings import trainings
from lopt.tasks import DataSubset, InitialScale, InputScale, MLPFamily, RandomLabels

matplotlib.use("agg")

from matplotlib import pyplot

COUNTS, SEEDS, HELD_OUT = (1, 4, 16, 64), 3, 32
OUTER_STEPS, HORIZON, TRUNCATION, PARTICLES = 300, 100, 20, 8
LEARNED = lopt.adafactor_mlp(step_multiplier=0.01)
OUTER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-3, OUTER_STEPS))
)


class Numbered(AbstractTaskFamily):
    """The tasks of a family with numbers from `first` on, `count` of them."""

    family: AbstractTaskFamily
    first: jax.Array
    count: jax.Array

    def draw(self, key: jax.Array) -> AbstractTask:
        """Returns one of them."""
        number = self.first + jax.random.randint(key, (), 0, self.count)
        return self.family.draw(jax.random.fold_in(jax.random.key(0), number))


def mean_loss(tasks: Numbered, theta: dict) -> float:
    """Returns the mean training loss over the steps of 32 trainings, those that diverge at 5."""
    keys = jax.random.split(jax.random.key(1), HELD_OUT)
    losses = trainings(tasks, LEARNED.optimizer(theta), keys, HORIZON)[1]
    return float(jnp.mean(jnp.clip(jnp.nan_to_num(losses, nan=5.0), max=5.0)))


def main() -> None:
    """Trains twelve rules, and draws their losses."""
    prepare_jax()
    family = MLPFamily(lopt.load_images("digits"), (32, 32), (jax.nn.relu, jnp.tanh), batch_size=32)
    family = RandomLabels(DataSubset(family, 256))
    family = InputScale(InitialScale(family, 0.3, 3.0), 0.1, 10.0)
    found = np.zeros((2, len(COUNTS), SEEDS))
    unroll = eqx.filter_jit(lopt.unroll)
    for i, count in enumerate(COUNTS):
        for seed in range(SEEDS):
            number = [jnp.asarray(n, jnp.int32) for n in (1000 * (seed + 1), count)]
            own = Numbered(family, *number)
            unseen = Numbered(
                family, jnp.asarray(10**6, jnp.int32), jnp.asarray(HELD_OUT, jnp.int32)
            )
            meta = lopt.Mean(
                lopt.PES(lopt.InnerTraining(own, LEARNED, HORIZON), TRUNCATION, 0.01), PARTICLES
            )
            init_key, run_key = jax.random.split(jax.random.key(seed))
            with jax.set_mesh(lopt.particle_mesh(meta)):
                state = lopt.start(meta, OUTER, LEARNED.init(init_key), run_key)
                theta = unroll(meta, OUTER, state, OUTER_STEPS)[0].params
            theta = jax.device_put(theta, jax.devices()[0])
            found[:, i, seed] = mean_loss(unseen, theta), mean_loss(own, theta)
            print(f"{count} tasks, seed {seed}: {found[:, i, seed]}", flush=True)
    report = Report("One rule, one budget, more tasks")
    report.table(
        f"mean training loss over {HORIZON} steps, {SEEDS} seeds",
        [
            {"tasks": n, "unseen tasks": measured(found[0, i]), "its own": measured(found[1, i])}
            for i, n in enumerate(COUNTS)
        ],
    )
    report.show()
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for name, losses in zip(("unseen tasks", "its own tasks"), found, strict=True):
        error = losses.std(1, ddof=1) / SEEDS**0.5
        axes.errorbar(COUNTS, losses.mean(1), error, marker="o", capsize=3, label=name)
    finish(axes, log="x", xlabel="tasks of meta-training", ylabel="mean training loss")
    axes.set_xticks(COUNTS, map(str, COUNTS), minor=False)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
