"""Figures in which all optimizers are side by side: their courses, their noise, the rule's answers.

What shows one optimizer, or needs no noise, is in `dynamics_figures`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lopt.experiment.figures import figure_of, png
from lopt.experiment.probe_dynamics import Watched
from lopt.experiment.probe_dynamics_answers import Feature

_COLORS = {
    "learned": "#d62728",
    "SGD": "#7f7f7f",
    "momentum": "#2ca02c",
    "Adam": "#1f77b4",
    "Lion": "#9467bd",
}
_MOST_CURVES = 60


def draw_courses(optimizers: Sequence[Watched]) -> bytes:
    """Returns a PNG of loss, relative step and effective rate over training, mean and range."""
    figure = figure_of(13.8, 3.8)
    panels: Any = figure.subplots(1, 3)
    for one in optimizers:
        seen = one.seen
        rates = np.asarray(seen.rate.overall)
        _band(panels[0], one.name, np.asarray(seen.loss))
        _band(panels[1], one.name, np.asarray(seen.updates.overall_relative))
        _band(panels[2], one.name, rates)
    panels[0].set(yscale="log", title="Training loss")
    panels[1].set(yscale="log", title="Relative step |u| / |params|")
    panels[2].set(title="Effective learning rate -<u, g> / <g, g>")
    everything = np.abs([np.asarray(one.seen.rate.overall) for one in optimizers])
    sizes = everything[np.isfinite(everything) & (everything > 0)]
    # Its sign is part of the answer, its range often several powers of ten.
    panels[2].set_yscale("symlog", linthresh=float(np.quantile(sizes, 0.05)) if sizes.size else 1)
    panels[0].legend(fontsize=8, frameon=False)
    return _finish(figure, panels)


def draw_noise(optimizers: Sequence[Watched]) -> bytes:
    """Returns a PNG of tail index, trace and top eigenvalue of both noises at each moment."""
    figure = figure_of(13.8, 7.0)
    panels: Any = figure.subplots(2, 3)
    measures = {
        "tail_index": "tail index (2: Gaussian)",
        "trace": "trace of the covariance",
        "top_eigenvalue": "top eigenvalue",
    }
    for row, which in zip(panels, ("gradients", "updates"), strict=True):
        for axes, (measure, title) in zip(row, measures.items(), strict=True):
            for one in optimizers:
                steps = [moment.step for moment in one.noise]
                values = [
                    [getattr(noise, measure, np.nan) for noise in getattr(moment, which)]
                    for moment in one.noise
                ]
                _band(axes, one.name, np.asarray(values, float).T, steps, marker="o", ms=3)
            axes.set(title=f"{which}: {title}")
            if measure != "tail_index":
                axes.set_yscale("log")
    panels[0, 0].legend(fontsize=8, frameon=False)
    return _finish(figure, panels)


def draw_features(features: Sequence[Feature]) -> bytes:
    """Returns a PNG of the update as a function of each feature that matters, in its own range."""
    drawn = [one for one in features if one.curves is not None]
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = figure_of(3.5 * columns, 2.9 * rows)
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, one in zip(panels.flat, drawn, strict=False):
        assert one.curves is not None
        apart = one.curves[:: -(-len(one.curves) // _MOST_CURVES)]
        axes.plot(one.values, apart.T, color=_COLORS["Adam"], lw=0.6, alpha=0.25)
        axes.plot(one.values, one.mean, color="black", lw=1.8)
        axes.axhline(0, color="#7f7f7f", lw=0.5)
        axes.set(title=one.name)
        axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    figure.supylabel("update")
    figure.supxlabel("the feature, as the rule sees it, over the range that it took")
    return _finish(figure, panels)


def _band(
    axes: Any, name: str, values: np.ndarray, steps: Sequence[int] | None = None, **style: Any
) -> None:
    """Draws the mean over seeds, and what lies between the least and the largest of them."""
    steps = range(1, values.shape[1] + 1) if steps is None else steps
    values = np.where(np.isfinite(values), values, np.nan)
    # A seed that has no number at a step takes the mean with it: a gap says so, a jump would not.
    width = 2.0 if name == "learned" else 1.2
    axes.plot(steps, values.mean(axis=0), color=_COLORS[name], lw=width, label=name, **style)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(steps, low, high, color=_COLORS[name], alpha=0.15, lw=0)


def _finish(figure: Any, panels: Any) -> bytes:
    for axes in panels.flat:
        axes.grid(alpha=0.25, lw=0.5)
        if not axes.get_xlabel() and len(axes.get_lines()) and axes.get_legend_handles_labels()[1]:
            axes.set(xlabel="step")
    return png(figure)
