"""The report of short-horizon bias on the noisy quadratic: a table, JSON and figures."""

import time
from typing import Any

import numpy as np

from lopt.analysis import Run, Study, acceptance_rows, paper_study
from lopt.experiment.report import Report, finish, panels, stages

# How many pieces of work `paper_study` and `acceptance_rows` announce.
_PIECES = 32
_COLORS = {"greedy": "#1f77b4", "fixed": "#7f7f7f", "Adam": "#d62728", "optimal": "#2ca02c"}


def quadratic_report() -> Report:
    """Studies the paper's problem, and compares its numbers with references."""
    began = time.perf_counter()
    with stages("noisy quadratic", _PIECES) as announce:
        found = paper_study(announce)
        rows = acceptance_rows(found, announce)
    seconds = time.perf_counter() - began
    report = Report("The noisy quadratic: 1000 directions, 250 steps")
    report.data |= {
        "seconds": seconds,
        "all_within": all(row.within for row in rows),
        "rows": [vars(row) | {"within": row.within} for row in rows],
        "runs": _runs(found),
        "look_ahead": {h: run.final_loss for h, run in found.look_ahead.items()},
        "look_ahead_rate": {h: run.final_loss for h, run in found.look_ahead_rate.items()},
        "fits": {
            h: {"learning_rate": f.learning_rate, "decay": f.decay, "final_loss": f.run.final_loss}
            for h, f in found.fits.items()
        },
    }
    report.table(
        "The noisy quadratic: 1000 directions, 250 steps",
        [
            {
                "quantity": row.quantity,
                "computed": f"{row.value:.8g}",
                "reference": row.reference,
                "within": row.within,
            }
            for row in rows
        ],
    )
    missed = [row.quantity for row in rows if not row.within]
    verdict = f"not within: {'; '.join(missed)}" if missed else "all within their tolerance"
    report.text(f"{len(rows)} numbers in {seconds:.0f} seconds, {verdict}.")
    report.figure("quadratic", lambda figure: draw_quadratic(figure, found), (14.0, 7.6))
    return report


def draw_quadratic(figure: Any, found: Study) -> list[Any]:
    """Draws what each schedule of a study does, and how it does it."""
    axes = panels(figure, 6)
    runs = {
        "greedy": ("greedy", found.greedy),
        "fixed": ("best fixed pair", found.fixed),
        "Adam": ("whole horizon, Adam", found.adam),
        "optimal": ("whole horizon, optimum in the box", found.optimal),
    }
    _losses(axes[0], runs)
    _schedules(axes[1], axes[2], runs)
    _bands(axes[3], runs)
    _look_aheads(axes[4], found)
    _fits(axes[5], found)
    for own in axes:
        finish(own)
    return axes


def _runs(found: Study) -> dict[str, Any]:
    names = ("greedy", "greedy_rate", "fixed", "fixed_rate", "adam", "optimal", "optimal_rate")
    return {name: _numbers(getattr(found, name)) for name in names}


def _numbers(run: Run) -> dict[str, Any]:
    return {
        "final_loss": run.final_loss,
        "growth": run.growth,
        "losses": run.losses.tolist(),
        "learning_rates": run.schedule.learning_rates.tolist(),
        "momenta": run.schedule.momenta.tolist(),
        "bands_at_the_end": run.bands[-1].tolist(),
    }


def _losses(axes: Any, runs: dict[str, tuple[str, Run]]) -> None:
    for name, (label, run) in runs.items():
        axes.plot(run.losses, color=_COLORS[name], label=f"{label}: {run.final_loss:.2f}")
    axes.set(yscale="log", xlabel="step", ylabel="expected excess loss", title="Loss")


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
