"""Evaluation: the learned optimizer against SGD, momentum and Adam, tuned on the same terms.

All optimizers train from the same initial parameters on the same batches for the same number of
steps; each baseline's learning rate is the best of 11 for just these runs, which favours it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, Scalar, Theta
from lopt.experiment.baselines import BASELINES, DEFAULT_ADAM, tune
from lopt.experiment.evaluation.evaluation import Evaluation
from lopt.experiment.report import Cell, Figure, Measured, Report, curves, measured, stages
from lopt.experiment.report.plots import color_of, finish, running_mean
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import EvaluateSettings
from lopt.experiment.trainings import dtype_of, stream

SMOOTHING = 10
# Those of the evaluation of a run; symmetry studies have Lion as well.
NAMES = ("SGD", "momentum", "Adam")


@dataclasses.dataclass(frozen=True)
class Runs:
    """Training runs of one optimizer, one row per seed.

    Attributes:
        name: of the optimizer.
        learning_rate: the tuned one; None for the learned optimizer.
        at_edge: whether that is the smallest or largest of those tried.
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

    def steps_to_reach(self, level: float) -> list[int]:
        """Returns, of each seed that gets there, the steps until the mean of 10 is at `level`."""
        width = min(SMOOTHING, self.losses.shape[1])
        reached = running_mean(self.losses, width)[:, width - 1 :] <= level
        return [int(hits.argmax()) + width for hits in reached if hits.any()]

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

    def rows(self) -> list[dict[str, Cell]]:
        """Returns a row of numbers for each optimizer."""
        level = self.of("Adam").final_level()
        metric = "accuracy" if "accuracy" in self.runs[0].metrics else "loss"
        reached = [runs.steps_to_reach(level) for runs in self.runs]
        return [
            {
                "optimizer": runs.name,
                "rate": runs.learning_rate,
                "final loss": measured(runs.final_loss),
                f"test {metric}": measured(runs.metrics[metric]),
                "steps to tuned Adam": measured(steps) if steps else None,
                "by seeds": len(steps),
            }
            for runs, steps in zip(self.runs, reached, strict=True)
        ]

    def difference(self) -> Measured:
        """Returns by how much the learned optimizer's final loss is above tuned Adam's, by seed."""
        return measured(self.of("learned").final_loss - self.of("Adam").final_loss)

    def verdict(self) -> str:
        """Returns a sentence that compares the learned optimizer with Adam."""
        found = self.difference()
        if found.mean is None or found.error is None or not np.isfinite(found.mean):
            return "The learned rule or tuned Adam diverges, so that they cannot be compared."
        verdict = "matches tuned Adam within two standard errors"
        if abs(found.mean) > 2 * found.error:
            verdict = "beats tuned Adam" if found.mean < 0 else "falls behind tuned Adam"
        default = self.of(f"Adam {DEFAULT_ADAM:g}").final_loss
        every = "on every" if np.all(self.of("learned").final_loss < default) else "not on every"
        return (
            f"The learned rule {verdict} (difference of final losses {found}, paired by seed); "
            f"it beats Adam at its default rate {every} initialisation."
        )

    def summary(self) -> dict[str, Any]:
        """Returns what the JSON has besides the table."""
        names = ("name", "horizon", "num_seeds", "trained_on")
        return {
            **{name: getattr(self.evaluation, name) for name in names},
            "learned_minus_tuned_adam": dataclasses.asdict(self.difference()),
            "rows": [
                {
                    "optimizer": runs.name,
                    "learning_rate_at_edge_of_grid": runs.at_edge,
                    "final_losses": runs.final_loss.tolist(),
                    "test": {name: values.tolist() for name, values in runs.metrics.items()},
                }
                for runs in self.runs
            ],
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
    dtype, results = dtype_of(evaluation.task), []
    for name, (own, weights) in {"learned": (learned, theta), **(others or {})}.items():
        found = evaluation.trained(own.optimizer(weights, evaluation.horizon), keys)
        results.append(Runs(name, None, False, *jax.device_get(found)))

    def train(optimizer: optax.GradientTransformation) -> tuple[Scalar, Any]:
        found = evaluation.trained(optimizer, keys)
        return jnp.mean(found[1]), found

    for name in NAMES:
        baseline, is_adam = BASELINES[name], name == "Adam"
        default = np.array([DEFAULT_ADAM], dtype) if is_adam else None
        tuned = tune(baseline.factory, baseline.rates.astype(dtype), train, default)
        results.append(Runs(name, tuned.value, tuned.at_edge, *tuned.result))
        if is_adam:
            last = jax.tree.map(lambda leaf: leaf[-1], tuned.results)
            results.append(Runs(f"Adam {DEFAULT_ADAM:g}", DEFAULT_ADAM, False, *last))
    return Comparison(evaluation, tuple(results))


def evaluate(run: Run, settings: EvaluateSettings | None = None) -> Report:
    """Compares a run's latest weights with tuned baselines, on each of its evaluations."""
    experiment = run.experiment
    before = None if experiment.initial is None else {"before": (run.learned, experiment.initial)}
    key, comparisons = stream("evaluation", experiment.seed), []
    with stages("evaluating", len(experiment.evaluations)) as announce:
        for i, evaluation in enumerate(experiment.evaluations):
            announce(evaluation.name)
            own = jax.random.fold_in(key, i)
            comparisons.append(compare(evaluation, run.learned, run.theta, own, before))
    return evaluation_report(run.name, comparisons, run.log)


def evaluation_report(
    name: str, comparisons: Sequence[Comparison], log: Mapping[str, Float[np.ndarray, " outer"]]
) -> Report:
    """Returns the report of a run: a table and curves for each evaluation, and the meta-losses."""
    numbers = {
        "outer_steps": len(log["seconds"]),
        "seconds_of_meta_training": float(np.nansum(log["seconds"])),
        "evaluations": [comparison.summary() for comparison in comparisons],
    }
    report = Report(f"Evaluation of {name}", data=numbers)
    for comparison in comparisons:
        about = comparison.evaluation
        title = f"{about.name} ({about.horizon} steps, {about.num_seeds} seeds)"
        report.table(title, comparison.rows())
        report.text(comparison.verdict())
    if skipped := int(np.sum(log["finite"] == 0)):
        report.text(f"Skipped outer steps: {skipped}.")
    if dropped := int(np.nansum(log["dropped"])):
        report.text(f"Dropped particles: {dropped}.")
    report.add(curves_of("curves", comparisons))
    report.figure("meta_training", functools.partial(_draw_meta_losses, losses=log["meta_loss"]))
    return report


def curves_of(name: str, comparisons: Sequence[Comparison]) -> Figure:
    """Returns a figure of the training losses of all optimizers."""

    def label(runs: Runs) -> str:
        return runs.name + " (tuned)" * (runs.name in NAMES)

    panels = {one.evaluation.name: {label(r): r.losses for r in one.runs} for one in comparisons}
    style: Any = {"smooth": 5, "xlabel": "inner step", "ylabel": "training loss"}
    return curves(name, panels, "Training losses, mean and standard error over seeds.", **style)


def _draw_meta_losses(figure: Any, losses: Float[np.ndarray, " outer"]) -> None:
    axes = figure.add_subplot()
    axes.plot(losses, color="#bbbbbb", lw=0.6, label="each outer step")
    width = max(1, losses.size // 50)
    if losses.size > width:
        seen = np.isfinite(losses)
        share = running_mean(seen.astype(float), width)
        mean = running_mean(np.where(seen, losses, 0), width) / np.where(share > 0, share, np.nan)
        axes.plot(mean, color=color_of("learned"), lw=1.8, label=f"mean of {width}")
    finish(axes, xlabel="outer step", ylabel="meta-loss", title="Meta-training")
