"""Figures of short-horizon bias on the noisy quadratic: losses, schedules and curvature bands."""

from typing import Any

import numpy as np

from lopt.analysis import Run, Study
from lopt.experiment.figures import figure_of, png

_COLORS = {"greedy": "#1f77b4", "fixed": "#7f7f7f", "Adam": "#d62728", "optimal": "#2ca02c"}


def draw_quadratic(found: Study) -> bytes:
    """Returns a PNG of a study: what each schedule does, and how it does it.

    Args:
        found: from `lopt.analysis.study`.
    """
    figure = figure_of(14.0, 7.6)
    panels: Any = figure.subplots(2, 3)
    runs = {
        "greedy": ("greedy", found.greedy),
        "fixed": ("best fixed pair", found.fixed),
        "Adam": ("whole horizon, Adam", found.adam),
        "optimal": ("whole horizon, optimum in the box", found.optimal),
    }
    _losses(panels[0, 0], runs)
    _schedules(panels[0, 1], panels[0, 2], runs)
    _bands(panels[1, 0], runs)
    _look_aheads(panels[1, 1], found)
    _fits(panels[1, 2], found)
    for axes in panels.flat:
        axes.grid(alpha=0.25, lw=0.5)
    return png(figure)


def _losses(axes: Any, runs: dict[str, tuple[str, Run]]) -> None:
    for name, (label, run) in runs.items():
        axes.plot(run.losses, color=_COLORS[name], label=f"{label}: {run.final_loss:.2f}")
    axes.set(yscale="log", xlabel="step", ylabel="expected excess loss", title="Loss")
    axes.legend(fontsize=8, frameon=False)


def _schedules(rates: Any, momenta: Any, runs: dict[str, tuple[str, Run]]) -> None:
    for name, (label, run) in runs.items():
        steps = np.arange(1, run.losses.size)
        rates.plot(steps, run.schedule.learning_rates, color=_COLORS[name], label=label)
        momenta.plot(steps, run.schedule.momenta, color=_COLORS[name])
    rates.set(yscale="log", xlabel="step", ylabel="learning rate", title="Learning rate")
    momenta.set(xlabel="step", ylabel="momentum", title="Momentum")


def _bands(axes: Any, runs: dict[str, tuple[str, Run]]) -> None:
    """Draws what is left at the end, and dotted a fifth of the way, of each band's loss."""
    for name, (_, run) in runs.items():
        places = (np.arange(run.bands.shape[1]) + 0.5) / run.bands.shape[1]
        axes.plot(places, run.bands[-1], color=_COLORS[name])
        axes.plot(places, run.bands[len(run.bands) // 5], color=_COLORS[name], ls=":", lw=1)
    axes.set(
        yscale="log",
        xlabel="directions, from steep to flat",
        ylabel="expected excess loss",
        title="Loss by curvature: at the end, dotted at a fifth",
    )


def _look_aheads(axes: Any, found: Study) -> None:
    for label, runs, style in (
        ("learning rate", found.look_ahead_rate, "o--"),
        ("and momentum", found.look_ahead, "o-"),
    ):
        finals = [run.final_loss for run in runs.values()]
        axes.plot(list(runs), finals, style, color="#9467bd", ms=4, label=label)
    axes.axhline(found.optimal.final_loss, color=_COLORS["optimal"], lw=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="steps that are looked ahead, and held",
        ylabel="final loss",
        title="Chosen by a horizon, again and again",
    )
    axes.legend(fontsize=8, frameon=False)


def _fits(axes: Any, found: Study) -> None:
    horizons = list(found.fits)
    finals = [fit.run.final_loss for fit in found.fits.values()]
    axes.plot(horizons, finals, "o-", color="#8c564b", ms=4, label="final loss")
    decays = [fit.decay for fit in found.fits.values()]
    axes.plot(horizons, decays, "s--", color="#e377c2", ms=4, label="fitted decay")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="horizon that the schedule was fitted to",
        title="a / (1 + t / K)^decay, fitted once",
    )
    axes.legend(fontsize=8, frameon=False)
