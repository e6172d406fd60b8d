"""Evaluation: the learned optimizer against SGD, momentum and Adam, tuned on the same terms.

All optimizers train from the same initial parameters on the same batches for the same number of
steps; each baseline's learning rate is the best of 11 for just these runs, which favours it.
"""

import dataclasses
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
from lopt.experiment.report import Cell, Figure, Report, color_of, curves, finish, measured, stages
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
                    "final_loss": _as_json(runs.final_loss),
                    "test": {name: _as_json(v) for name, v in runs.metrics.items()},
                    "steps_to_tuned_adams_loss": _as_json(np.asarray(hits, float)),
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
            "learned_minus_tuned_adam": _as_json(difference),
            "beats_default_adam_on_every_seed": bool(
                np.all(learned.final_loss < default.final_loss)
            ),
        }

    def table(self) -> tuple[str, list[dict[str, Cell]]]:
        """Returns the title and the rows of a table of the report."""
        level, shown = self.of("Adam").final_level(), self.evaluation
        rows: list[dict[str, Cell]] = []
        for runs in self.runs:
            steps = runs.steps_to_reach(level)
            hits = [n for n in steps if n is not None]
            reached = f"{np.mean(hits):.0f}" if hits else "not reached"
            if 0 < len(hits) < len(steps):
                reached += f" ({len(hits)} of {len(steps)})"
            metric = "accuracy" if "accuracy" in runs.metrics else "loss"
            rows.append(
                {
                    "optimizer": runs.name,
                    "rate": runs.learning_rate,
                    "final loss": measured(runs.final_loss),
                    f"test {metric}": measured(runs.metrics[metric]),
                    "steps to tuned Adam": reached,
                }
            )
        return f"{shown.name} ({shown.horizon} steps, {shown.num_seeds} seeds)", rows

    def verdict(self) -> str:
        """Returns a sentence that compares the learned optimizer with Adam."""
        learned, adam, default = self.of("learned"), self.of("Adam"), self.of("Adam 0.001")
        found = measured(learned.final_loss - adam.final_loss)
        if found.mean is None or found.error is None or not np.isfinite(found.mean):
            return "The learned rule or tuned Adam diverges, so that they cannot be compared."
        if found.mean < -2 * found.error:
            verdict = "beats tuned Adam"
        elif found.mean <= 2 * found.error:
            verdict = "matches tuned Adam within two standard errors"
        else:
            verdict = "falls behind tuned Adam"
        every = "on every" if np.all(learned.final_loss < default.final_loss) else "not on every"
        return (
            f"The learned rule {verdict} (difference of final losses {found}, paired by seed); "
            f"it beats Adam at its default rate {every} initialisation."
        )


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
    horizon, dtype = evaluation.horizon, dtype_of(evaluation.task)
    results = []
    for name, (own, weights) in {"learned": (learned, theta), **(others or {})}.items():
        found = evaluation.trained(own.optimizer(weights, num_steps=horizon), keys)
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
    """Compares a run's latest weights with tuned baselines, on each of its evaluations.

    Returns:
        A report with a table and curves for each, and the meta-losses of the run.
    """
    experiment = run.experiment
    before = None if experiment.initial is None else {"before": (run.learned, experiment.initial)}
    key, comparisons = stream("evaluation", experiment.seed), []
    with stages("evaluating", len(experiment.evaluations)) as announce:
        for i, evaluation in enumerate(experiment.evaluations):
            announce(evaluation.name)
            own = jax.random.fold_in(key, i)
            comparisons.append(compare(evaluation, run.learned, run.theta, own, before))
    return evaluation_report(run, comparisons)


def evaluation_report(run: Run, comparisons: Sequence[Comparison]) -> Report:
    """Returns the report of a run: a table and curves for each evaluation, and the meta-losses."""
    report, lines = Report(f"Evaluation of {run.name}"), run.lines
    skipped = sum(not line["finite"] for line in lines)
    dropped = sum(int(line["dropped"]) for line in lines)
    report.data |= {
        "note": run.experiment.note,
        "outer_steps": run.experiment.outer_steps,
        "outer_steps_in_the_log": len(lines),
        "outer_steps_skipped_as_not_finite": skipped,
        "particles_dropped_as_not_finite": dropped,
        "seconds_of_meta_training": sum(line["seconds"] for line in lines),
        "evaluations": [comparison.summary() for comparison in comparisons],
    }
    for comparison in comparisons:
        report.table(*comparison.table())
        report.text(comparison.verdict())
    for text in (
        run.experiment.note,
        f"Skipped outer steps: {skipped}." if skipped else "",
        f"Dropped particles: {dropped}." if dropped else "",
    ):
        if text:
            report.text(text)
    report.add(curves_of("curves", comparisons))
    report.figure("meta_training", lambda figure: _meta_losses(figure.add_subplot(), lines))
    return report


def curves_of(name: str, comparisons: Sequence[Comparison]) -> Figure:
    """Returns a figure of the training losses of all optimizers."""

    def label(runs: Runs) -> str:
        return runs.name + " (tuned)" * (runs.learning_rate is not None and " " not in runs.name)

    return curves(
        name,
        {one.evaluation.name: {label(r): r.losses for r in one.runs} for one in comparisons},
        smooth=5,
        xlabel="inner step",
        ylabel="training loss",
        caption="Training losses, mean and standard error over seeds.",
    )


def _meta_losses(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    losses = np.array([np.nan if v["meta_loss"] is None else v["meta_loss"] for v in lines], float)
    axes.plot(losses, color="#bbbbbb", lw=0.6, label="each outer step")
    width = max(1, losses.size // 50)
    if losses.size > width:
        windows = np.lib.stride_tricks.sliding_window_view(losses, width)
        count = np.maximum(np.isfinite(windows).sum(axis=-1), 1)
        mean = np.nansum(np.where(np.isfinite(windows), windows, 0), axis=-1) / count
        steps = np.arange(width - 1, losses.size)
        axes.plot(steps, mean, color=color_of("learned"), lw=1.8, label=f"mean of {width}")
    finish(axes, xlabel="outer step", ylabel="meta-loss", title="Meta-training")


def _as_json(values: np.ndarray) -> dict[str, float | None]:
    found = measured(values)
    return {"mean": found.mean, "standard_error": found.error}
