"""Evaluation: the learned optimizer against SGD, momentum and Adam, tuned on the same terms.

All optimizers train from the same initial parameters on the same batches for the same number of
steps; each baseline's learning rate is the best of 11 for just these runs, which favours it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTask, judge
from lopt.core.types import Key, Scalar, Theta
from lopt.core.unroll import start, unroll
from lopt.experiment.experiment import Evaluation
from lopt.learned.hyperparameters import learnable

# Half decades, wide enough that the best is never at an end on the tasks of the recipes.
BASELINES = {
    "SGD": (optax.sgd, 10.0 ** np.linspace(-3, 2, 11)),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), 10.0 ** np.linspace(-4, 1, 11)),
    "Adam": (optax.adam, 10.0 ** np.linspace(-4.5, 0.5, 11)),
}
DEFAULT_ADAM = 1e-3
SMOOTHING = 10

Keys = KeyArray[Array, " seed"]


@dataclasses.dataclass(frozen=True)
class Runs:
    """Training runs of one optimizer, one row per seed.

    Attributes:
        name: of the optimizer.
        learning_rate: the tuned one; None for the learned optimizer.
        at_edge: whether the tuned one was the smallest or largest of those tried.
        losses: the training loss before each step.
        final_loss: the loss over the training split after the last step, in inference mode.
        metrics: the task's metrics over the test split after the last step, by name.
    """

    name: str
    learning_rate: float | None
    at_edge: bool
    losses: Float[np.ndarray, "seed step"]
    final_loss: Float[np.ndarray, " seed"]
    metrics: dict[str, Float[np.ndarray, " seed"]]

    def steps_to_reach(self, level: float) -> list[int | None]:
        """Returns, per seed, the steps until the loss, averaged over 10 steps, is at `level`."""
        width = min(SMOOTHING, self.losses.shape[1])
        means = np.lib.stride_tricks.sliding_window_view(self.losses, width, axis=1).mean(-1)
        reached = means <= level
        first = reached.argmax(axis=1) + width
        return [int(n) if hit.any() else None for n, hit in zip(first, reached, strict=True)]

    def final_level(self) -> float:
        """Returns the mean over seeds of the training loss over the last 10 steps."""
        return float(self.losses[:, -SMOOTHING:].mean())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs of all optimizers on one evaluation; the learned one comes first."""

    evaluation: Evaluation
    runs: tuple[Runs, ...]

    def of(self, name: str) -> Runs:
        """Returns the runs of one optimizer."""
        return next(runs for runs in self.runs if runs.name == name)

    def summary(self) -> dict[str, Any]:
        """Returns the numbers of the report."""
        learned, adam, default = self.of("learned"), self.of("Adam"), self.of("Adam 0.001")
        difference = learned.final_loss - adam.final_loss
        level = adam.final_level()
        rows = []
        for runs in self.runs:
            steps = runs.steps_to_reach(level)
            hits = [n for n in steps if n is not None]
            rows.append(
                {
                    "optimizer": runs.name,
                    "learning_rate": runs.learning_rate,
                    "learning_rate_at_edge_of_grid": runs.at_edge,
                    "final_loss": _mean_and_error(runs.final_loss),
                    "test": {name: _mean_and_error(v) for name, v in runs.metrics.items()},
                    "steps_to_tuned_adams_loss": _mean_and_error(np.asarray(hits, float)),
                    "seeds_that_reached_it": len(hits),
                    "final_losses": runs.final_loss.tolist(),
                }
            )
        return {
            "name": self.evaluation.name,
            "trained_on": self.evaluation.trained_on,
            "horizon": self.evaluation.horizon,
            "seeds": self.evaluation.num_seeds,
            "rows": rows,
            "learned_minus_tuned_adam": _mean_and_error(difference),
            "beats_default_adam_on_every_seed": bool(
                np.all(learned.final_loss < default.final_loss)
            ),
        }


def compare(
    evaluation: Evaluation,
    learned: AbstractLearnedOptimizer,
    theta: Theta,
    key: Key,
    others: Mapping[str, tuple[AbstractLearnedOptimizer, Theta]] | None = None,
) -> Comparison:
    """Trains the evaluation's task with the learned optimizer and with every baseline.

    `others` are further learned optimizers and their weights, by name.
    """
    keys = jax.random.split(key, evaluation.num_seeds)
    results = [_learned_runs(evaluation, "learned", learned, theta, keys)]
    for name, (other, weights) in (others or {}).items():
        results.append(_learned_runs(evaluation, name, other, weights, keys))
    for name, (factory, rates) in BASELINES.items():
        results += _tuned_runs(evaluation, name, factory, rates, keys)
    return Comparison(evaluation, tuple(results))


def _learned_runs(
    evaluation: Evaluation,
    name: str,
    learned: AbstractLearnedOptimizer,
    theta: Theta,
    keys: Keys,
) -> Runs:
    arrays = _train_all(evaluation.task, learned, theta, evaluation.horizon, keys)
    return Runs(name, None, False, *jax.tree.map(np.asarray, arrays))


def _tuned_runs(
    evaluation: Evaluation, name: str, factory: Any, rates: np.ndarray, keys: Keys
) -> list[Runs]:
    """Returns the runs at the best of `rates`; for Adam also those at its default rate."""
    learned = learnable(factory, learning_rate=1.0)
    tried = np.append(rates, DEFAULT_ADAM) if name == "Adam" else rates
    thetas = {"learning_rate": jnp.log(jnp.asarray(tried, float))}
    many = eqx.filter_jit(eqx.filter_vmap(_train_all, in_axes=(None, None, 0, None, None)))
    trained = many(evaluation.task, learned, thetas, evaluation.horizon, keys)
    losses, final, metrics = jax.tree.map(np.asarray, trained)
    means = final[: len(rates)].mean(axis=1)
    best = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))

    def runs(i: int, name: str) -> Runs:
        at_edge = i in (0, len(rates) - 1)
        measured = {name: values[i] for name, values in metrics.items()}
        return Runs(name, float(tried[i]), at_edge, losses[i], final[i], measured)

    default = [runs(i, f"Adam {tried[i]:g}") for i in range(len(rates), len(tried))]
    return [runs(best, name), *default]


@eqx.filter_jit
def _train_all(
    task: AbstractTask,
    learned: AbstractLearnedOptimizer,
    theta: Theta,
    horizon: int,
    keys: Keys,
) -> tuple[Float[Array, "seed step"], Float[Array, " seed"], dict[str, Float[Array, " seed"]]]:
    def train_one(key: Key) -> tuple[Array, Scalar, dict[str, Scalar]]:
        init_key, run_key = jax.random.split(key)
        optimizer = learned.optimizer(theta, num_steps=horizon)
        state = start(task, optimizer, task.init(init_key), run_key)
        state, losses = unroll(task, optimizer, state, horizon)
        judge_key = jax.random.fold_in(run_key, 2**32 - 2)  # none of the run's own keys
        final = judge(task, state.params, state.estimator_state, judge_key, "train")
        metrics = judge(task, state.params, state.estimator_state, judge_key, "test")
        return losses, final["loss"], metrics

    return jax.vmap(train_one)(keys)


def _mean_and_error(values: np.ndarray) -> dict[str, float | None]:
    """Returns mean and standard error, None where there are too few values for one."""
    mean = float(np.mean(values)) if len(values) else None
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": mean, "standard_error": error}
