"""The report of `lopt probe symmetry`: tables and figures for each symmetry, and meta-training."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.experiment.baselines import BASELINES
from lopt.experiment.probes.symmetry import SymmetryProbeResult, Trained
from lopt.experiment.probes.symmetry_watch import MEASURES, Course, Kept
from lopt.experiment.report import (
    Cell,
    Report,
    bands,
    color_of,
    finish,
    mean_and_error,
    measured,
    number,
    shown_steps,
)

# A figure of more rows is no longer looked at; the JSON has all.
MOST_ROWS = 8
_TITLES = {"signed": "|signed sum|", "absolute": "absolute sum", "normalised": "normalised"}


def symmetry_report(probe: SymmetryProbeResult, settings: dict[str, Any]) -> Report:
    """Returns the report of what was found; `settings` are what was asked for."""
    exact, nearly = probe.found.generators, probe.found.nearly
    report = Report(f"The symmetries that {settings['run']} breaks", settings, _numbers(probe))
    report.text(
        "Along the tangents of a symmetry the loss cannot change, and gradients have no component. "
        "What updates have along them is the optimizer's own doing.",
        detail=True,
    )
    report.text(str(probe.found), code=True)
    report.heading("Meta-testing")
    report.text(
        f"{settings['seeds']} fresh tasks of the run, {probe.steps} steps each, the same params "
        f"and batches for all optimizers. Rates are the best of half decades for just these runs "
        "(mean training loss; * at the grid's edge). Tables have means over steps, and drift and "
        "loss at the end. Signed sums are those published: units cancel in them. Absolute sums do "
        "not cancel; the normalised measure is the length of the cosines between the update and "
        "the tangents, which does not grow with the learning rate. Drift is how far what gradient "
        "flow conserves has moved, as a share of it.",
        detail=True,
    )
    losses = {one.name: np.asarray(one.course.loss) for one in probe.optimizers}
    report.figure(
        "losses",
        lambda figure: bands(figure.add_subplot(), losses, xlabel="step", title="Training loss"),
    )
    for name, heading, generators in (
        ("deviations", "Symmetries that hold", exact),
        ("nearly", "Symmetries that hold but for an epsilon, as that of batch norm", nearly),
    ):
        if not generators:
            continue
        more = len(generators) - MOST_ROWS
        report.heading(heading)
        report.figure(
            name,
            functools.partial(_over_training, probe=probe, generators=generators),
            _size(generators),
            "Updates, mean and standard error over seeds, and the gradients on the learned "
            "optimizer's path. What is exactly zero is not drawn."
            + (f" {more} more are in symmetry.json." if more > 0 else ""),
        )
        for generator in generators:
            slope = probe.found.evidence[generator.name].slope
            apart = f", nearly: slope {number(slope, 2)}" if generators is nearly else ""
            title = f"{generator.name} ({generator.units} units{apart})"
            report.table(title, [_row(one, generator) for one in probe.optimizers])
    report.heading("Meta-training")
    both = (*exact, *nearly)
    report.figure(
        "meta_training",
        functools.partial(_over_meta_training, probe=probe, generators=both),
        _size(both),
        f"Mean deviation of the updates in the first {probe.short} steps. Line: the weights of "
        "each outer step, as meta-training is done again; dots: kept weights; dashed: the "
        "references.",
    )
    stages: list[dict[str, Cell]] = [
        {"outer step": stage}
        | {g.name: measured(over_steps(course, g.name, "normalised", probe.short)) for g in both}
        for stage, course in probe.stages.items()
    ]
    title = f"Over meta-training: normalised, mean of the first {probe.short} steps"
    report.table(title, stages)
    report.figure(
        "stages",
        functools.partial(_early_to_late, probe=probe, generators=both),
        _size(both),
        "The learned optimizer with the weights it began with, and those of kept checkpoints.",
    )
    return report


def over_steps(course: Course, name: str, measure: str, steps: int) -> np.ndarray:
    """Returns the mean over the first steps of a measure of the updates; time is the last axis."""
    values = np.asarray(getattr(course.symmetries[name].updates, measure), float)
    return values[..., :steps].mean(axis=-1)


def _row(one: Trained, generator: AbstractGenerator) -> dict[str, Cell]:
    kept: Kept = one.course.symmetries[generator.name]
    drift = None if kept.drift is None else measured(np.asarray(kept.drift)[:, -1])
    rate = "-" if one.rate is None else number(one.rate.value) + "*" * one.rate.at_edge
    return {
        "optimizer": one.name,
        "rate": rate,
        **{m: measured(np.asarray(getattr(kept.updates, m)).mean(axis=1)) for m in MEASURES},
        "gradients": measured(np.asarray(kept.grads.normalised).mean(axis=1)),
        "drift": drift,
        "final loss": measured(np.asarray(one.course.loss)[:, -1]),
    }


def _numbers(probe: SymmetryProbeResult) -> dict[str, Any]:
    """Returns what the JSON has besides the tables: curves, over training and meta-training."""
    points = np.array(shown_steps(probe.steps)) - 1

    def curves(one: Trained, name: str) -> dict[str, Any]:
        kept = one.course.symmetries[name]
        return {
            which: {m: _curve(np.asarray(getattr(sizes, m))[:, points]) for m in MEASURES}
            for which, sizes in (("updates", kept.updates), ("gradients", kept.grads))
        }

    def short(course: Course, name: str) -> dict[str, Any]:
        return {m: _curve(over_steps(course, name, m, probe.short).T) for m in MEASURES}

    symmetries = []
    for generator in (*probe.found.generators, *probe.found.nearly):
        name, again = generator.name, probe.replay
        symmetries.append(
            {
                "name": name,
                "kind": generator.kind,
                "units": generator.units,
                "holds": "exactly" if generator in probe.found.generators else "nearly",
                "slope": probe.found.evidence[name].slope,
                "curves": {one.name: curves(one, name) for one in probe.optimizers},
                "again": None if again is None else short(again, name),
                "kept": {stage: short(course, name) for stage, course in probe.stages.items()},
            }
        )
    held = {one["name"] for one in symmetries} | {each.name for each in probe.found.maps}
    rates = {one.name: one.rate for one in probe.optimizers}
    return {
        "learning_rates": {name: rate and rate.value for name, rate in rates.items()},
        "precision": probe.precision,
        "steps": probe.steps,
        "short_steps": probe.short,
        "outer_steps_again": probe.outer_steps,
        "rates_tried": {name: one.rates.tolist() for name, one in BASELINES.items()},
        "curve_steps": (points + 1).tolist(),
        "symmetries": symmetries,
        "discrete": [each.name for each in probe.found.maps],
        "do_not_hold": {
            name: {"slope": evidence.slope, "moved": evidence.moved}
            for name, evidence in probe.found.evidence.items()
            if name not in held
        },
    }


def _curve(values: np.ndarray) -> dict[str, Any]:
    mean, error = mean_and_error(values)
    return {"mean": mean.tolist(), "error": None if error is None else error.tolist()}


def _size(generators: Sequence[AbstractGenerator]) -> tuple[float, float]:
    return 13.8, 3.1 * min(len(generators), MOST_ROWS)


def _rows(figure: Any, generators: Sequence[AbstractGenerator]) -> Any:
    """Yields axes, generator and measure of each panel of a figure."""
    shown = generators[:MOST_ROWS]
    rows = figure.subplots(len(shown), len(MEASURES), squeeze=False)
    for row, generator in zip(rows, shown, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            axes.set_title(f"{generator.name}: {_TITLES[measure]}", fontsize=8)
            yield axes, generator.name, measure, axes is rows[0][0]


def _over_training(
    figure: Any, probe: SymmetryProbeResult, generators: Sequence[AbstractGenerator]
) -> None:
    for axes, name, measure, first in _rows(figure, generators):
        kept = {one.name: one.course.symmetries[name] for one in probe.optimizers}
        found = {n: np.asarray(getattr(one.updates, measure)) for n, one in kept.items()}
        found["gradients"] = np.asarray(getattr(kept["learned"].grads, measure))
        bands(axes, found, legend=first, xlabel="step")


def _over_meta_training(
    figure: Any, probe: SymmetryProbeResult, generators: Sequence[AbstractGenerator]
) -> None:
    for axes, name, measure, first in _rows(figure, generators):
        if probe.replay is not None:
            again = over_steps(probe.replay, name, measure, probe.short)
            bands(axes, {"learned": again.T}, steps=range(len(again)))
        each = [
            over_steps(course, name, measure, probe.short).mean()
            for course in probe.stages.values()
        ]
        axes.plot(list(probe.stages), each, "o", color=color_of("learned"), mec="black")
        for one in probe.optimizers[1:]:
            level = over_steps(one.course, name, measure, probe.short).mean()
            axes.axhline(level, color=color_of(one.name), ls="--", lw=1.2, label=one.name)
        finish(axes, log=True, legend=first, xlabel="outer step")


def _early_to_late(
    figure: Any, probe: SymmetryProbeResult, generators: Sequence[AbstractGenerator]
) -> None:
    import matplotlib

    shades = matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(probe.stages)))
    for axes, name, measure, first in _rows(figure, generators):
        for (stage, course), shade in zip(probe.stages.items(), shades, strict=True):
            mean, _ = mean_and_error(np.asarray(getattr(course.symmetries[name].updates, measure)))
            steps = np.arange(1, len(mean) + 1)
            axes.plot(steps, mean, color=shade, lw=1.4, label=f"outer step {stage}")
        finish(axes, log=True, legend=first, xlabel="step")
