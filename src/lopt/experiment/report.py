"""The report of a run: tables in the terminal, `report.json` and two figures."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lopt.experiment.evaluate import Comparison
from lopt.experiment.experiment import Experiment
from lopt.experiment.figures import figure_of, png
from lopt.experiment.files import read_lines, write_bytes, write_json
from lopt.experiment.train import dropped_particles, skipped_steps


def write_report(
    experiment: Experiment, comparisons: list[Comparison], folder: Path, console: Console
) -> dict[str, Any]:
    """Prints the tables, writes all files of the report, and returns its numbers."""
    lines = read_lines(folder / "metrics.jsonl")
    report = {
        "note": experiment.note,
        "outer_steps": experiment.outer_steps,
        "outer_steps_in_the_log": len(lines),
        "outer_steps_skipped_as_not_finite": skipped_steps(folder),
        "particles_dropped_as_not_finite": dropped_particles(folder),
        "seconds_of_meta_training": sum(line["seconds"] for line in lines),
        "evaluations": [comparison.summary() for comparison in comparisons],
    }
    for summary in report["evaluations"]:
        console.print(_table(summary))
        console.print(_verdict(summary), "\n")
    if experiment.note:
        console.print(experiment.note)
    if report["outer_steps_skipped_as_not_finite"]:
        console.print(f"Skipped outer steps: {report['outer_steps_skipped_as_not_finite']}.")
    if report["particles_dropped_as_not_finite"]:
        console.print(f"Dropped particles: {report['particles_dropped_as_not_finite']}.")
    write_json(folder / "report.json", report)
    write_bytes(folder / "curves.png", draw_curves(comparisons))
    write_bytes(folder / "meta_training.png", _meta_training(lines))
    return report


def _table(summary: dict[str, Any]) -> Table:
    title = f"{summary['name']} ({summary['horizon']} steps, {summary['seeds']} seeds)"
    table = Table(title=title, title_justify="left")
    # Every optimizer of a task has the same metrics.
    shown = "accuracy" if "accuracy" in summary["rows"][0]["test"] else "loss"
    for heading in ("optimizer", "rate", "final loss", f"test {shown}", "steps to tuned Adam"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in summary["rows"]:
        rate = row["learning_rate"]
        steps = _text(row["steps_to_tuned_adams_loss"], ".0f")
        if row["seeds_that_reached_it"] < summary["seeds"]:
            steps += f" ({row['seeds_that_reached_it']} of {summary['seeds']})"
        table.add_row(
            row["optimizer"],
            "-" if rate is None else f"{rate:.2g}",
            _text(row["final_loss"], ".4f"),
            _text(row["test"][shown], ".3f" if shown == "accuracy" else ".4f"),
            steps,
        )
    return table


def _text(value: dict[str, float | None], form: str) -> str:
    mean, error = value["mean"], value["standard_error"]
    if mean is None:
        return "not reached"
    return f"{mean:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _verdict(summary: dict[str, Any]) -> str:
    difference = summary["learned_minus_tuned_adam"]
    mean, error = difference["mean"], difference["standard_error"]
    if mean is None or not np.isfinite(mean):
        verdict = "or tuned Adam diverges, so that they cannot be compared"
        return f"The learned rule {verdict}."
    if mean < -2 * error:
        verdict = "beats tuned Adam"
    elif mean <= 2 * error:
        verdict = "matches tuned Adam within two standard errors"
    else:
        verdict = "falls behind tuned Adam"
    default = "on every" if summary["beats_default_adam_on_every_seed"] else "not on every"
    return (
        f"The learned rule {verdict} (final loss {mean:+.4f} ± {error:.4f}, paired by seed); "
        f"it beats Adam at its default rate {default} initialisation."
    )


_COLORS = {
    "learned": "#d62728",
    "before": "#ff9896",
    "equation": "#9467bd",
    "SGD": "#7f7f7f",
    "momentum": "#2ca02c",
    "Adam": "#1f77b4",
    "Adam 0.001": "#9ecae1",
}


def draw_curves(comparisons: list[Comparison]) -> bytes:
    """Draws the training loss of every optimizer on every evaluation, mean and standard error."""
    columns = min(3, len(comparisons)) or 1
    rows = -(-len(comparisons) // columns) or 1
    figure = figure_of(4.6 * columns, 3.4 * rows)
    for i, comparison in enumerate(comparisons):
        axes = figure.add_subplot(rows, columns, i + 1)
        for runs in comparison.runs:
            losses = _smooth(runs.losses)
            mean = losses.mean(axis=0)
            error = losses.std(axis=0, ddof=1) / len(losses) ** 0.5
            rate = "" if runs.learning_rate is None or " " in runs.name else " (tuned)"
            steps = np.arange(1, mean.size + 1)
            style = {"color": _COLORS[runs.name], "lw": 2.2 if runs.name == "learned" else 1.4}
            axes.plot(steps, mean, label=runs.name + rate, **style)
            axes.fill_between(
                steps, mean - error, mean + error, color=_COLORS[runs.name], alpha=0.2, lw=0
            )
        axes.set(yscale="log", xlabel="inner step", ylabel="training loss")
        axes.set_title(comparison.evaluation.name, fontsize=10)
        axes.grid(alpha=0.25, which="both", lw=0.5)
        if i == 0:
            axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _meta_training(lines: list[dict[str, Any]]) -> bytes:
    """Draws the meta-loss over meta-training."""
    figure = figure_of(4.6, 3.4)
    axes = figure.add_subplot()
    losses = np.array([np.nan if v["meta_loss"] is None else v["meta_loss"] for v in lines], float)
    steps = np.arange(losses.size)
    axes.plot(steps, losses, color="#bbbbbb", lw=0.6, label="each outer step")
    width = max(1, losses.size // 50)
    if losses.size > width:
        kernel, finite = np.ones(width), np.isfinite(losses)
        total = np.convolve(np.where(finite, losses, 0), kernel, "valid")
        count = np.convolve(finite, kernel, "valid")
        mean = total / np.maximum(count, 1)
        axes.plot(steps[width - 1 :], mean, color="#d62728", lw=1.8, label=f"mean of {width}")
    axes.set(xlabel="outer step", ylabel="meta-loss", title="Meta-training")
    axes.grid(alpha=0.25, lw=0.5)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _smooth(losses: np.ndarray, width: int = 5) -> np.ndarray:
    """Returns running means of up to `width` steps back."""
    sums = np.cumsum(np.pad(losses, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, losses.shape[1] + 1)
    starts = np.maximum(0, ends - width)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)
