"""Plots: functions that draw on axes and return them, with one palette and readable log axes."""

import io
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
}
OTHERS = ("#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#393b79", "#637939")
# What is so much smaller than the largest value is as good as zero: axes end there.
DECADES = 12


def color_of(name: str) -> str:
    """Returns the colour that an optimizer has in every plot."""
    return PALETTE.get(name) or OTHERS[sum(name.encode()) % len(OTHERS)]


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


def bands(
    axes: Any,
    curves: Mapping[str, Float[np.ndarray, "seed step"]],
    *,
    steps: ArrayLike | None = None,
    log: bool | str = True,
    smooth: int = 1,
    legend: bool = True,
    colors: Mapping[str, str] | None = None,
    **labels: str,
) -> Any:
    """Draws the mean of each curve over seeds, and its standard error about it.

    Args:
        axes: to draw on.
        curves: by name, which is the label and gives the colour.
        steps: where the values are; 1, 2, ... by default.
        log: which axes are logarithmic, as of `finish`.
        smooth: over how many steps back running means are taken.
        legend: whether to draw one.
        colors: by name, instead of those of the palette.
        labels: `title`, `xlabel` and `ylabel`.

    Returns:
        The axes.
    """
    for name, values in curves.items():
        values = running_mean(np.where(np.isfinite(values), values, np.nan), smooth)
        places = np.arange(1, values.shape[1] + 1) if steps is None else np.asarray(steps)
        mean, error = mean_and_error(values)
        color = (colors or {}).get(name) or color_of(name.split(" (")[0])
        strong = name.startswith(("learned", "network"))
        axes.plot(places, mean, color=color, lw=2.2 if strong else 1.4, label=literal(name))
        if error is not None:
            # On a logarithmic axis a band that reaches zero has no end; the least seed is one.
            low = np.maximum(mean - error, values.min(axis=0)) if log else mean - error
            axes.fill_between(places, low, mean + error, color=color, alpha=0.2, lw=0)
    return finish(axes, log=log, legend=legend, **labels)


def finish(axes: Any, *, log: bool | str = False, legend: bool = True, **labels: str) -> Any:
    """Gives axes their labels, a grid, a legend and ticks that do not overlap; returns them.

    `log` is True for a logarithmic vertical axis, or "x", "y" or "xy".
    """
    axes.set(**{name: literal(text) for name, text in labels.items()})
    axes.title.set_fontsize(10)
    for which in "y" if log is True else log or "":
        log_axis(axes, which)
    axes.grid(alpha=0.25, lw=0.5)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    return axes


def log_axis(axes: Any, which: str = "y") -> None:
    """Makes an axis logarithmic, unless nothing on it is positive, over at most 12 decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    column = {"x": 0, "y": 1}[which]
    data = [np.asarray(line.get_xydata(), float)[:, column] for line in axes.get_lines()]
    values = np.concatenate(data) if data else np.ones(1)
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return
    axis, limit = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", nonpositive="mask")
    axis.set_major_locator(LogLocator(numticks=6))
    decades = np.log10(positive.max() / positive.min())
    if decades > DECADES:
        limit(positive.max() * 10.0**-DECADES, None)
    elif decades > 1.5:
        axis.set_minor_formatter(NullFormatter())
