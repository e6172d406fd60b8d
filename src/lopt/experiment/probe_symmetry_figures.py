"""Figures of broken symmetries: over training, and over meta-training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.experiment.figures import figure_of, png
from lopt.experiment.probe_symmetry import SymmetryProbeResult, Trained
from lopt.experiment.probe_symmetry_watch import MEASURES, Course

_COLORS = {
    "learned": "#d62728",
    "SGD": "#7f7f7f",
    "momentum": "#2ca02c",
    "Adam": "#1f77b4",
    "Lion": "#9467bd",
}
_TITLES = {"signed": "|signed sum|", "absolute": "absolute sum", "normalised": "normalised"}
# A figure of more rows is no longer looked at; the JSON has all.
MOST_ROWS = 8


def draw_losses(optimizers: Sequence[Trained]) -> bytes:
    """Returns a PNG of the training losses."""
    figure = figure_of(6.4, 3.6)
    axes = figure.subplots()
    for one in optimizers:
        _band(axes, one.name, one.course.loss, _COLORS[one.name])
    axes.set(yscale="log", title="Training loss", xlabel="step")
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def draw_deviations(
    optimizers: Sequence[Trained], generators: Sequence[AbstractGenerator]
) -> bytes:
    """Returns a PNG of all measures over training, a row for each symmetry.

    Dotted is what the gradients have on the learned optimizer's path: rounding.
    """
    figure, panels = _panels(len(generators[:MOST_ROWS]))
    for row, generator in zip(panels, generators, strict=False):
        for axes, measure in zip(row, MEASURES, strict=True):
            for one in optimizers:
                kept = one.course.symmetries[generator.name]
                _band(axes, one.name, getattr(kept.updates, measure), _COLORS[one.name])
            kept = optimizers[0].course.symmetries[generator.name]
            _band(axes, "gradients", getattr(kept.grads, measure), "black", ls=":")
            axes.set(yscale="log", xlabel="step")
        _label(row, generator)
    panels[0, 0].legend(fontsize=7, frameon=False, ncol=2)
    return png(figure)


def draw_meta_training(
    probe: SymmetryProbeResult, generators: Sequence[AbstractGenerator]
) -> bytes:
    """Returns a PNG of the mean deviations of short trainings over meta-training.

    A line for the outer steps that were done again, dots for kept weights, and the references,
    which meta-training does not change, dashed.
    """
    figure, panels = _panels(len(generators[:MOST_ROWS]))
    stages = list(probe.stages)
    for row, generator in zip(panels, generators, strict=False):
        for axes, measure in zip(row, MEASURES, strict=True):
            if probe.replay is not None:
                again = over_steps(probe.replay, generator.name, measure, probe.short)
                _band(axes, "learned", again.T, _COLORS["learned"], range(len(again)))
            each = [
                over_steps(course, generator.name, measure, probe.short).mean()
                for course in probe.stages.values()
            ]
            axes.plot(stages, each, "o", color=_COLORS["learned"], mec="black", label="kept")
            for one in probe.optimizers[1:]:
                level = over_steps(one.course, generator.name, measure, probe.short).mean()
                axes.axhline(level, color=_COLORS[one.name], ls="--", lw=1.2, label=one.name)
            axes.set(yscale="log", xlabel="outer step")
        _label(row, generator)
    panels[0, 0].legend(fontsize=7, frameon=False, ncol=2)
    return png(figure)


def draw_stages(probe: SymmetryProbeResult, generators: Sequence[AbstractGenerator]) -> bytes:
    """Returns a PNG of the learned optimizer's deviations over training, early weights to late."""
    import matplotlib

    figure, panels = _panels(len(generators[:MOST_ROWS]))
    colors = matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(probe.stages)))
    for row, generator in zip(panels, generators, strict=False):
        for axes, measure in zip(row, MEASURES, strict=True):
            for (number, course), color in zip(probe.stages.items(), colors, strict=True):
                kept = course.symmetries[generator.name]
                label = f"outer step {number}"
                _band(axes, label, getattr(kept.updates, measure), color)
            axes.set(yscale="log", xlabel="step")
        _label(row, generator)
    panels[0, 0].legend(fontsize=7, frameon=False)
    return png(figure)


def over_steps(course: Course, name: str, measure: str, steps: int) -> np.ndarray:
    """Returns the mean over the first steps of a measure of the updates; time is the last axis."""
    values = np.asarray(getattr(course.symmetries[name].updates, measure), float)
    return values[..., :steps].mean(axis=-1)


def _panels(rows: int) -> tuple[Any, Any]:
    figure = figure_of(13.8, 3.1 * rows)
    return figure, figure.subplots(rows, len(MEASURES), squeeze=False)


def _label(row: Any, generator: AbstractGenerator) -> None:
    for axes, measure in zip(row, MEASURES, strict=True):
        axes.set_title(f"{generator.name}: {_TITLES[measure]}", fontsize=8)
        axes.grid(alpha=0.25, lw=0.5)


def _band(
    axes: Any,
    name: str,
    values: Any,
    color: Any,
    steps: Sequence[int] | None = None,
    **style: Mapping[str, Any] | str,
) -> None:
    """Draws the mean over seeds, and a deviation about it; what is zero is not drawn."""
    values = np.asarray(values, float)
    steps = range(1, values.shape[1] + 1) if steps is None else steps
    values = np.where(np.isfinite(values), values, np.nan)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    shown = np.where(mean > 0, mean, np.nan)
    axes.plot(steps, shown, color=color, lw=2.0 if name == "learned" else 1.2, label=name, **style)
    # On a logarithmic axis a band that reaches zero has no lower end; the least seed is one.
    low = np.maximum(mean - spread, values.min(axis=0))
    low = np.where(low > 0, low, shown)
    axes.fill_between(steps, low, mean + spread, color=color, alpha=0.15, lw=0)
