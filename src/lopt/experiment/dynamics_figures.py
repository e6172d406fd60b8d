"""The figures of an optimizer's inner life.

Its updates over time, whom they resemble, what they answer to, and where it drifts in the valley.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from lopt.analysis.dynamics import (
    Alignment,
    LearningRate,
    Portrait,
    UpdateDistribution,
    UpdateHistogram,
)
from lopt.experiment.figures import figure_of, png

_COLORS = ("#1f77b4", "#7f7f7f", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
# Of more curves than this one sees no single one.
_MOST_CURVES = 60


def draw_histograms(
    found: UpdateDistribution, histogram: UpdateHistogram, names: Sequence[str]
) -> bytes:
    """Returns a PNG of the distribution of updates over time, a panel for each tensor.

    Args:
        found: as `lopt.unroll` recorded it, over time.
        histogram: that recorded it.
        names: of the tensors, from `tensor_names`.
    """
    counts, largest = np.asarray(found.counts), np.asarray(found.largest)
    figure, panels = _grid(len(names), 4.0, 3.4)
    steps = np.arange(len(counts) + 1)
    for i, (axes, name) in enumerate(zip(panels.flat, names, strict=False)):
        shares = counts[:, i, 1:-1] / np.maximum(1, counts[:, i].sum(axis=-1, keepdims=True))
        logs = np.log10(np.where(shares > 0, shares, np.nan))
        drawn = axes.pcolormesh(
            steps, histogram.edges, logs.T, cmap="viridis", vmin=-4, vmax=0, rasterized=True
        )
        axes.plot(steps[:-1] + 0.5, largest[:, i], color="#d62728", lw=1, label="largest")
        axes.set(yscale="log", xlabel="step", title=name)
        axes.set(ylim=(histogram.lowest, histogram.highest))
    figure.supylabel("|update|")
    panels[0, 0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.colorbar(drawn, ax=panels, label="log10 share of coordinates")
    return png(figure)


def draw_alignment(
    found: Mapping[str, Alignment], rate: LearningRate | None, names: Sequence[str]
) -> bytes:
    """Returns a PNG of the angles to each reference, relative steps and the effective rate.

    Args:
        found: by reference, over time.
        rate: over time.
        names: of the tensors, whose effective rates are drawn one by one.
    """
    count = 3 if rate is not None else 2
    figure = figure_of(4.6 * count, 3.8)
    panels: Any = figure.subplots(1, count)
    for color, (name, one) in zip(_cycle(found), found.items(), strict=True):
        panels[0].plot(np.asarray(one.overall_cosine), color=color, label=name)
        panels[1].plot(np.asarray(one.overall_relative), color=color, label=name)
    panels[0].set(ylim=(-1.05, 1.05), title="Cosine with the update of", xlabel="step")
    panels[1].set(yscale="log", title="Step relative to that of", xlabel="step")
    panels[0].legend(fontsize=8, frameon=False)
    if rate is not None:
        for color, name, values in zip(
            _cycle(names), names, np.asarray(rate.per_tensor).T, strict=True
        ):
            panels[2].plot(values, color=color, lw=0.8, label=name)
        panels[2].plot(np.asarray(rate.overall), color="black", lw=1.6, label="all")
        panels[2].set(title="Effective learning rate", xlabel="step")
        # Its sign is part of the answer, its range often several powers of ten.
        panels[2].set_yscale("symlog", linthresh=_threshold(np.asarray(rate.overall)))
        panels[2].legend(fontsize=7, frameon=False)
    return _finish(figure, panels)


def draw_responses(
    values: Float[Array, " point"], curves: Mapping[str, Float[Array, "row point"]]
) -> bytes:
    """Returns a PNG of the update as a function of each feature: curves, and their mean in bold.

    Args:
        values: of the feature that varies.
        curves: by feature, from `response_curves`.
    """
    figure, panels = _grid(len(curves), 3.4, 2.8)
    for axes, (name, many) in zip(panels.flat, curves.items(), strict=False):
        all_rows = np.asarray(many)
        apart = all_rows[:: -(-len(all_rows) // _MOST_CURVES)]
        axes.plot(np.asarray(values), apart.T, color="#1f77b4", lw=0.6, alpha=0.25)
        axes.plot(np.asarray(values), all_rows.mean(axis=0), color="black", lw=1.8)
        axes.axhline(0, color="#7f7f7f", lw=0.5)
        axes.set(title=name)
        axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    figure.supylabel("update")
    figure.supxlabel("the feature, as the rule sees it")
    return _finish(figure, panels)


def draw_signals(
    signals: Mapping[str, Float[Array, " time"]],
    found: Mapping[str, Mapping[str, Float[Array, " time"]]],
) -> bytes:
    """Returns a PNG of what optimizers answer to scripted gradients, a panel for each signal.

    Updates are drawn relative to the largest of their optimizer, since learning rates differ.

    Args:
        signals: gradients over time, by name.
        found: of each optimizer, its `responses` to these.
    """
    figure = figure_of(4.4 * len(signals), 3.6)
    panels: Any = figure.subplots(1, len(signals), squeeze=False)
    for axes, (name, grads) in zip(panels[0], signals.items(), strict=True):
        shape = -np.asarray(grads) / np.max(np.abs(grads))
        axes.plot(shape, color="#d9d9d9", lw=4, label="-gradient")
        for color, (optimizer, answers) in zip(_cycle(found), found.items(), strict=True):
            most = max(float(np.max(np.abs(answer))) for answer in answers.values())
            axes.plot(np.asarray(answers[name]) / (most or 1.0), color=color, label=optimizer)
        axes.set(title=name, xlabel="step")
    panels[0, 0].set(ylabel="update, relative to the largest")
    panels[0, 0].legend(fontsize=8, frameon=False)
    return _finish(figure, panels)


def draw_portraits(found: Mapping[str, Portrait]) -> bytes:
    """Returns a PNG of the valley for each optimizer: paths, first updates, ends, and the drift.

    Args:
        found: by optimizer, from `valley_portrait`.
    """
    figure, panels = _grid(len(found), 3.7, 4.0)
    for axes, (name, portrait) in zip(panels.flat, found.items(), strict=False):
        _portrait(axes, portrait)
        drift = np.asarray(portrait.drift)
        drift = drift[np.abs(np.asarray(portrait.sums)[:, 0]) > 1e-6]
        said = f"drift {np.median(drift):.2g}" if drift.size else "no start off x + y = 0"
        largest = float(np.max(np.abs(portrait.displacement)))
        axes.set(title=f"{name}\n{said}, largest |change of x + y| {largest:.1e}")
        axes.title.set_fontsize(9)
    return _finish(figure, panels)


def _portrait(axes: Any, portrait: Portrait) -> None:
    paths, field = np.asarray(portrait.paths), np.asarray(portrait.field)
    reach = 1.15 * float(np.nanmax(np.abs(paths[:, 0]))) or 1.0
    axes.plot([-reach, reach], [-reach, reach], color="#7f7f7f", lw=0.8, ls="--")
    for path in paths:
        axes.plot(*path.T, color="#1f77b4", lw=0.8, alpha=0.7)
    norms = np.linalg.norm(field, axis=-1, keepdims=True)
    arrows = np.divide(field, norms, out=np.zeros_like(field), where=norms > 0)
    axes.quiver(*paths[:, 0].T, *arrows.T, color="#ff7f0e", scale=25, width=0.004)
    axes.plot(*paths[:, -1].T, "o", color="#d62728", ms=3)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")


def _grid(count: int, width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure with so many panels, four in a row, and all its axes."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure = figure_of(width * columns, height * rows)
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    return figure, panels


def _cycle(names: Any) -> tuple[str, ...]:
    return tuple(_COLORS[i % len(_COLORS)] for i in range(len(names)))


def _threshold(values: np.ndarray) -> float:
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    return float(np.quantile(sizes, 0.05)) if sizes.size else 1.0


def _finish(figure: Any, panels: Any) -> bytes:
    for axes in panels.flat:
        axes.grid(alpha=0.25, lw=0.5)
    return png(figure)
