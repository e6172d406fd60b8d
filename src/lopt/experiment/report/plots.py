"""Plots: functions that draw on axes and return them, with one palette and readable log axes."""

import io
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lopt.experiment.report.statistics import mean_and_error, plain, running_mean

PALETTE = {
    "learned": "#d62728",
    "network": "#d62728",
    "before": "#ff9896",
    "equation": "#9467bd",
    "SGD": "#7f7f7f",
    "momentum": "#2ca02c",
    "Adam": "#1f77b4",
    "Adam 0.001": "#9ecae1",
    "Lion": "#8c564b",
    "gradients": "#000000",
    "all": "#000000",
    "-gradient": "#bbbbbb",
}
OTHERS = ("#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#393b79", "#637939")
# By seed and step; or by seed, one level; or by place and seed, some points.
Curve = Float[np.ndarray, "seed step"] | Float[np.ndarray, " seed"] | Mapping[int, np.ndarray]
# Longer titles are broken into lines.
LONGEST_TITLE = 55
# What is so much smaller than the largest value is as good as zero: axes end there.
DECADES = 12


def color_of(name: str, place: int = 0) -> str:
    """Returns the colour that an optimizer has in every plot, or one for what has this place."""
    return PALETTE.get(name) or OTHERS[place % len(OTHERS)]


def shade(number: int, count: int) -> Any:
    """Returns one of so many colours in order, from dark to light."""
    import matplotlib

    return matplotlib.colormaps["plasma"](0.85 * number / max(1, count - 1))


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of so many inches."""
    # Importing pyplot takes a second and a display; figures of their own take neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def literal(text: str) -> str:
    """Returns text that matplotlib shows as it is, and does not take for mathematics."""
    return plain(text).replace("$", r"\$")


def panels(figure: Any, count: int, columns: int = 3) -> list[Any]:
    """Returns so many axes of a figure, in rows."""
    columns = min(columns, count) or 1
    rows = -(-count // columns) or 1
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def grid_size(count: int, width: float, height: float, columns: int = 4) -> tuple[float, float]:
    """Returns the inches of a figure with so many panels of a size, some in a row."""
    columns = min(columns, count) or 1
    return width * columns, height * (-(-count // columns) or 1)


def bands(
    axes: Any,
    curves: Mapping[str, Curve],
    *,
    steps: ArrayLike | None = None,
    log: bool | str = True,
    smooth: int = 1,
    legend: bool = True,
    ordered: bool = False,
    **labels: str,
) -> Any:
    """Draws the mean of each curve over seeds, and its standard error about it.

    Of a level the mean is drawn as a dashed line, of points as dots.

    Args:
        axes: to draw on.
        curves: by name, which is the label and gives the colour.
        steps: where the values are; 1, 2, ... by default.
        log: which axes are logarithmic, as of `finish`.
        smooth: over how many steps back running means are taken.
        legend: whether to draw one.
        ordered: whether colours go from dark to light, in the order of the curves; without errors.
        labels: `title`, `xlabel` and `ylabel`.

    Returns:
        The axes.
    """
    for i, (name, curve) in enumerate(curves.items()):
        color = color_of(name.split(" (")[0], i)
        strong = name.startswith(("learned", "network"))
        style: Any = {"color": shade(i, len(curves)) if ordered else color, "label": literal(name)}
        if isinstance(curve, Mapping):
            means = [np.mean(seeds) for seeds in curve.values()]
            axes.plot(list(curve), means, "o", mec="black", **style)
            continue
        if np.ndim(curve) == 1:
            axes.axhline(np.mean(curve), ls="--", lw=1.2, **style)
            continue
        values = running_mean(np.asarray(curve, float), smooth)
        places = np.arange(1, values.shape[1] + 1) if steps is None else np.asarray(steps)
        mean, error = mean_and_error(values)
        places = places[: len(mean)]  # curves may end earlier
        axes.plot(places, mean, lw=2.2 if strong else 1.4, **style)
        if error is not None and not ordered:
            # On a logarithmic axis a band that reaches zero has no end; the least seed is one.
            low = np.maximum(mean - error, values.min(axis=0)) if log else mean - error
            axes.fill_between(places, low, mean + error, color=style["color"], alpha=0.2, lw=0)
    return finish(axes, log=log, legend=legend, **labels)


def finish(axes: Any, *, log: bool | str = False, legend: bool = True, **labels: str) -> Any:
    """Gives axes their labels, a grid, a legend and ticks that do not overlap; returns them.

    `log` is True for a logarithmic vertical axis, or "x", "y", "xy" or "signed".
    """
    lines = textwrap.TextWrapper(LONGEST_TITLE, replace_whitespace=False)
    axes.set(**{name: lines.fill(literal(text)) for name, text in labels.items()})
    axes.title.set_fontsize(10)
    for which in ("signed",) if log == "signed" else "y" if log is True else log or "":
        log_axis(axes, which)
    axes.grid(alpha=0.25, lw=0.5)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    return axes


def log_axis(axes: Any, which: str = "y") -> None:
    """Makes an axis logarithmic, unless nothing on it is positive, over at most 12 decades.

    "signed" makes the vertical axis logarithmic on both sides of zero.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    column = 0 if which == "x" else 1
    data = [np.asarray(line.get_xydata(), float)[:, column] for line in axes.get_lines()]
    values = np.concatenate(data) if data else np.ones(1)
    if which == "signed":
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        linear = float(np.quantile(sizes, 0.05)) if sizes.size else 1.0
        axes.set_yscale("symlog", linthresh=linear)
        return
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return
    axis, limit = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", nonpositive="mask")
    axis.set_major_locator(LogLocator(numticks=6))
    decades = np.log10(positive.max()) - np.log10(positive.min())
    if decades > DECADES:
        # The margin that matplotlib leaves above is a share of all decades.
        top = float(positive.max())
        limit(top * 10.0**-DECADES, min(4 * top, 1e308))
    elif decades > 1.5:
        axis.set_minor_formatter(NullFormatter())
