"""Figures of the dynamics of optimizers; each draws on an empty figure and returns its axes.

Updates over time, whom they resemble, noise, responses to signals and features, and the valley.
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
from lopt.experiment.probes.dynamics import Watched
from lopt.experiment.report import bands, color_of, finish, panels

# Of more curves than this one sees no single one.
_MOST_CURVES = 60


def grid_size(count: int, width: float, height: float) -> tuple[float, float]:
    """Returns the inches of a figure with so many panels of a size, four in a row."""
    return width * min(4, count), height * -(-count // 4)


def draw_courses(figure: Any, optimizers: Sequence[Watched]) -> list[Any]:
    """Draws loss, relative step and effective rate over training."""
    loss, relative, rate = axes = panels(figure, 3)
    seen = {one.name: one.seen for one in optimizers}
    rates = {name: np.asarray(one.rate.overall) for name, one in seen.items()}
    steps = {name: np.asarray(one.updates.overall_relative) for name, one in seen.items()}
    losses = {name: np.asarray(one.loss) for name, one in seen.items()}
    bands(loss, losses, title="Training loss", xlabel="step")
    bands(relative, steps, title="Relative step |u| / |params|", xlabel="step", legend=False)
    bands(rate, rates, title="Effective learning rate -<u, g> / <g, g>", log=False, legend=False)
    _signed_log(rate, np.concatenate(list(rates.values())))
    return axes


def draw_noise(figure: Any, optimizers: Sequence[Watched]) -> list[Any]:
    """Draws tail index, trace and top eigenvalue of both noises at each moment."""
    measures = {
        "tail_index": "tail index (2: Gaussian)",
        "trace": "trace of the covariance",
        "top_eigenvalue": "top eigenvalue",
    }
    axes = panels(figure, 6)
    each = [(which, measure) for which in ("gradients", "updates") for measure in measures]
    for i, (own, (which, measure)) in enumerate(zip(axes, each, strict=True)):
        for one in optimizers:
            values = [
                [getattr(noise, measure, np.nan) for noise in getattr(moment, which)]
                for moment in one.noise
            ]
            moments = [moment.step for moment in one.noise]
            log = measure != "tail_index"
            bands(own, {one.name: np.array(values, float).T}, steps=moments, log=log, legend=i == 0)
        own.set(title=f"{which}: {measures[measure]}", xlabel="step")
    return axes


def draw_histograms(
    figure: Any, found: UpdateDistribution, histogram: UpdateHistogram, names: Sequence[str]
) -> list[Any]:
    """Draws the distribution of updates over time, a panel for each tensor.

    Args:
        figure: an empty one.
        found: as `lopt.unroll` recorded it, over time.
        histogram: that recorded it.
        names: of the tensors, from `tensor_names`.
    """
    counts, largest = np.asarray(found.counts), np.asarray(found.largest)
    axes, steps = panels(figure, len(names), 4), np.arange(len(counts) + 1)
    for i, (own, name) in enumerate(zip(axes, names, strict=True)):
        shares = counts[:, i, 1:-1] / np.maximum(1, counts[:, i].sum(axis=-1, keepdims=True))
        logs = np.log10(np.where(shares > 0, shares, np.nan))
        drawn = own.pcolormesh(
            steps, histogram.edges, logs.T, cmap="viridis", vmin=-4, vmax=0, rasterized=True
        )
        own.plot(steps[:-1] + 0.5, largest[:, i], color="#d62728", lw=1, label="largest")
        finish(own, log=True, legend=i == 0, xlabel="step", title=name)
        own.set(ylim=(histogram.lowest, histogram.highest))
    figure.supylabel("|update|")
    figure.colorbar(drawn, ax=axes, label="log10 share of coordinates")
    return axes


def draw_alignment(
    figure: Any,
    found: Mapping[str, Alignment],
    rate: LearningRate | None,
    names: Sequence[str],
) -> list[Any]:
    """Draws the angles to each reference, relative steps and the effective rate.

    Args:
        figure: an empty one.
        found: by reference, over time.
        rate: over time.
        names: of the tensors, whose effective rates are drawn one by one.
    """
    axes = panels(figure, 3 if rate is not None else 2)
    for name, one in found.items():
        axes[0].plot(np.asarray(one.overall_cosine), color=color_of(name), label=name)
        axes[1].plot(np.asarray(one.overall_relative), color=color_of(name), label=name)
    finish(axes[0], title="Cosine with the update of", xlabel="step")
    axes[0].set(ylim=(-1.05, 1.05))
    finish(axes[1], log=True, legend=False, title="Step relative to that of", xlabel="step")
    if rate is not None:
        for name, values in zip(names, np.asarray(rate.per_tensor).T, strict=True):
            axes[2].plot(values, lw=0.8, label=name)
        axes[2].plot(np.asarray(rate.overall), color="black", lw=1.6, label="all")
        finish(axes[2], title="Effective learning rate", xlabel="step")
        _signed_log(axes[2], np.asarray(rate.overall))
    return axes


def draw_responses(figure: Any, curves: Mapping[str, tuple[Any, Any]]) -> list[Any]:
    """Draws the update as a function of each feature: some curves, and their mean in bold.

    Args:
        figure: an empty one.
        curves: by feature its values, and the curves from `response_curves`.
    """
    axes = panels(figure, len(curves), 4)
    for own, (name, (values, rows)) in zip(axes, curves.items(), strict=True):
        many = np.asarray(rows)
        apart = many[:: -(-len(many) // _MOST_CURVES)]
        own.plot(np.asarray(values), apart.T, color="#1f77b4", lw=0.6, alpha=0.25)
        own.plot(np.asarray(values), many.mean(axis=0), color="black", lw=1.8)
        own.axhline(0, color="#7f7f7f", lw=0.5)
        own.ticklabel_format(axis="y", scilimits=(-2, 2))
        finish(own, title=name)
    figure.supylabel("update")
    figure.supxlabel("the feature, as the rule sees it")
    return axes


def draw_signals(
    figure: Any,
    signals: Mapping[str, Float[Array, " time"]],
    found: Mapping[str, Mapping[str, Float[Array, " time"]]],
) -> list[Any]:
    """Draws the updates that optimizers make of scripted gradients, a panel for each signal.

    Updates are relative to the largest of their optimizer, since learning rates differ.

    Args:
        figure: an empty one.
        signals: gradients over time, by name.
        found: of each optimizer, its updates for these.
    """
    axes = panels(figure, len(signals))
    for i, (own, (name, grads)) in enumerate(zip(axes, signals.items(), strict=True)):
        own.plot(-np.asarray(grads) / np.max(np.abs(grads)), color="#d9d9d9", lw=4, label="-grad")
        for optimizer, answers in found.items():
            most = max(float(np.max(np.abs(answer))) for answer in answers.values())
            values = np.asarray(answers[name]) / (most or 1.0)
            own.plot(values, color=color_of(optimizer), label=optimizer)
        finish(own, legend=i == 0, title=name, xlabel="step")
    axes[0].set(ylabel="update, relative to the largest")
    return axes


def draw_portraits(figure: Any, found: Mapping[str, Portrait]) -> list[Any]:
    """Draws the valley for each optimizer: paths, first updates, ends, and the drift.

    Args:
        figure: an empty one.
        found: by optimizer, from `valley_portrait`.
    """
    axes = panels(figure, len(found), 4)
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
        drift = np.asarray(portrait.drift)
        drift = drift[np.abs(np.asarray(portrait.sums)[:, 0]) > 1e-6]
        text = f"drift {np.median(drift):.2g}" if drift.size else "no start off x + y = 0"
        largest = float(np.max(np.abs(portrait.displacement)))
        title = f"{name}\n{text}, largest |change of x + y| {largest:.1e}"
        own.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")
        own.set_title(title, fontsize=9)
    return axes


def _signed_log(axes: Any, values: np.ndarray) -> None:
    """Makes the vertical axis logarithmic on both sides of zero: the sign is part of the answer."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    axes.set_yscale("symlog", linthresh=float(np.quantile(sizes, 0.05)) if sizes.size else 1.0)
