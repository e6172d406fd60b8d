"""Plots of the dynamics of optimizers, which draw on an empty figure and return its axes.

Beside them are numbers that sum up what they show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.analysis.dynamics import Portrait
from lopt.experiment.report.plots import finish, panels

# Among more curves than this no single one can be seen.
MOST_CURVES = 60


def draw_histograms(figure: Any, found: tuple[Any, Any, Any], names: Sequence[str]) -> list[Any]:
    """Draws counts and largest updates by step and tensor, and edges, of an `UpdateHistogram`."""
    counts, largest, edges = (np.asarray(one) for one in found)
    axes, steps = panels(figure, len(names), 4, (4.0, 3.4)), np.arange(len(counts) + 1)
    shares = counts[..., 1:-1] / np.maximum(1, counts.sum(axis=-1, keepdims=True))
    logs = np.log10(np.where(shares > 0, shares, np.nan))
    for i, (own, name) in enumerate(zip(axes, names, strict=True)):
        drawn = own.pcolormesh(steps, edges, logs[:, i].T, vmin=-4, vmax=0, rasterized=True)
        own.plot(steps[:-1] + 0.5, largest[:, i], color="#d62728", lw=1, label="largest")
        finish(own, log=True, legend=i == 0, xlabel="step", title=name)
        own.set(ylim=(edges[0], edges[-1]))
    figure.supylabel("|update|")
    figure.colorbar(drawn, ax=axes, label="log10 share of coordinates")
    return axes


def draw_responses(figure: Any, curves: Mapping[str, tuple[Any, Any]]) -> list[Any]:
    """Draws `response_curves` at values of each feature: some of them, and their mean in bold."""
    axes = panels(figure, len(curves), 4, (3.5, 2.9))
    for own, (name, (values, rows)) in zip(axes, curves.items(), strict=True):
        apart = rows[:: -(-len(rows) // MOST_CURVES)]
        own.plot(values, apart.T, color="#1f77b4", lw=0.6, alpha=0.25)
        own.plot(values, rows.mean(axis=0), color="black", lw=1.8)
        own.axhline(0, color="#7f7f7f", lw=0.5)
        own.ticklabel_format(axis="y", scilimits=(-2, 2))
        finish(own, title=name)
    figure.supylabel("update")
    figure.supxlabel("the feature, as the rule sees it")
    return axes


def draw_portraits(figure: Any, found: Mapping[str, Portrait]) -> list[Any]:
    """Draws each optimizer's `valley_portrait`: paths, first updates, ends, and the drift."""
    axes = panels(figure, len(found), 4, (3.7, 4.0))
    for own, (name, portrait) in zip(axes, found.items(), strict=True):
        paths, field = np.asarray(portrait.paths), np.asarray(portrait.field)
        reach = 1.15 * float(np.nanmax(np.abs(paths[:, 0]))) or 1.0
        own.plot([-reach, reach], [-reach, reach], color="#7f7f7f", lw=0.8, ls="--")
        for path in paths:
            own.plot(*path.T, color="#1f77b4", lw=0.8, alpha=0.7)
        norms = np.linalg.norm(field, axis=-1, keepdims=True)
        arrows = np.divide(field, norms, out=np.zeros_like(field), where=norms > 0)
        own.quiver(*paths[:, 0].T, *arrows.T, color="#ff7f0e", scale=25, width=0.004)
        own.plot(*paths[:, -1].T, "o", color="#d62728", ms=3)
        drift = drifts(portrait)
        text = f"drift {np.median(drift):.2g}" if drift.size else "no start off x + y = 0"
        largest = float(np.max(np.abs(portrait.displacement)))
        title = f"{name}\n{text}, largest |change of x + y| {largest:.1e}"
        own.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")
        own.set_title(title, fontsize=9)
    return axes


def drifts(portrait: Portrait) -> Float[np.ndarray, " start"]:
    """Returns the drift from each start where x + y is not zero."""
    return np.asarray(portrait.drift, float)[np.abs(np.asarray(portrait.sums)[:, 0]) > 1e-6]


def half_life(added: Float[np.ndarray, " time"]) -> int | None:
    """Returns the steps until half of what an impulse adds to updates was added."""
    total = np.cumsum(np.abs(added))
    half = np.argmax(total >= total[-1] / 2) - np.argmax(total > 0)
    return int(half) if 0 < total[-1] < np.inf else None
