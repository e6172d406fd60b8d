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
    "learned (11 trials)": "#7f0000",
    "RMSProp": "#637939",
    "AdamW, cosine": "#17becf",
    "Muon, cosine": "#ff7f0e",
    "schedule-free AdamW": "#393b79",
    "OptList": "#e377c2",
    "gradients": "#000000",
    "all": "#000000",
    "-gradient": "#bbbbbb",
    "each outer step": "#bbbbbb",
}
OTHERS = ("#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#393b79", "#637939", "#1f77b4", "#8c564b")
# By seed and step; or by seed, one level; or by place and seed, some points.
Curve = Float[np.ndarray, "seed step"] | Float[np.ndarray, " seed"] | Mapping[int, np.ndarray]
# Longer titles are broken into lines.
LONGEST_TITLE = 55
# What is so much smaller than the largest value is as good as zero: axes end there.
DECADES = 12


def color_of(name: str, place: int = 0) -> str:
    """Returns the colour that an optimizer has in every plot, or one for what has this place."""
    found = PALETTE.get(name) or PALETTE.get(name.split(" (")[0])
    return found or OTHERS[place % len(OTHERS)]


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


def panels(
    figure: Any, count: int, columns: int = 3, size: tuple[float, float] | None = None
) -> list[Any]:
    """Returns so many axes of a figure, in rows; with a size, in inches, the figure has room."""
    columns = min(columns, count) or 1
    rows = -(-count // columns) or 1
    if size is not None:
        figure.set_size_inches(size[0] * columns, size[1] * rows)
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


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
    """Draws the mean of each curve over seeds, and its standard error about it; returns the axes.

    Of a level the mean is drawn as a dashed line, of points as dots. The colour is that of the
    name, or goes from dark to light where curves are `ordered`. Values are at `steps`, by default
    1, 2, ..., and running means over `smooth` steps; `log`, `legend` and labels as of `finish`.
    """
    from matplotlib import colormaps

    shades = colormaps["plasma"](np.linspace(0, 0.85, len(curves))).tolist()
    for i, (name, curve) in enumerate(curves.items()):
        color = shades[i] if ordered else color_of(name, i)
        style: Any = {"color": color, "label": literal(name)}
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
        strong = name.startswith(("learned", "network"))
        axes.plot(places, mean, lw=2.2 if strong else 1.4, **style)
        if error is not None:
            # On a logarithmic axis a band that reaches zero has no end; the least seed is one.
            logarithmic = log and log != "x"
            low = np.maximum(mean - error, values.min(axis=0)) if logarithmic else mean - error
            seen = low > 0 if logarithmic else None
            axes.fill_between(places, low, mean + error, seen, color=color, alpha=0.2, lw=0)
    return finish(axes, log=log, legend=legend, **labels)


def finish(axes: Any, *, log: bool | str = False, legend: bool = True, **labels: str) -> Any:
    """Gives axes their labels, a grid, a legend and ticks that do not overlap; returns them.

    `log` is True or "y" for a logarithmic vertical axis, or "x" or "xy", or "signed" for one that
    is logarithmic on both sides of zero.
    """
    lines = textwrap.TextWrapper(LONGEST_TITLE, replace_whitespace=False)
    axes.set(**{name: lines.fill(literal(text)) for name, text in labels.items()})
    axes.title.set_fontsize(10)
    for which in ("signed",) if log == "signed" else "y" if log is True else log or "":
        _log_axis(axes, which)
    axes.grid(alpha=0.25, lw=0.5)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    return axes


def _log_axis(axes: Any, which: str) -> None:
    """Makes an axis logarithmic, unless nothing on it is positive, over at most 12 decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if which == "signed":
        data = [np.abs(np.asarray(line.get_ydata(), float)) for line in axes.get_lines()]
        sizes = np.concatenate([np.zeros(0), *data])
        sizes = sizes[(sizes > 0) & np.isfinite(sizes)]
        axes.set_yscale("symlog", linthresh=float(np.quantile(sizes, 0.05)) if sizes.size else 1.0)
        return
    axis, place = (axes.xaxis, 0) if which == "x" else (axes.yaxis, 1)
    low, high = float(axes.dataLim.minpos[place]), float(axes.dataLim.max[place])
    if not 0 < low <= high < np.inf:
        return
    getattr(axes, f"set_{which}scale")("log", nonpositive="mask")
    axis.set_major_locator(LogLocator(numticks=6))
    decades = np.log10(high) - np.log10(low)
    if decades > DECADES:
        # The margin that matplotlib leaves above is a share of all decades.
        getattr(axes, f"set_{which}lim")(high * 10.0**-DECADES, min(4 * high, 1e308))
    elif decades > 1.5:
        axis.set_minor_formatter(NullFormatter())
