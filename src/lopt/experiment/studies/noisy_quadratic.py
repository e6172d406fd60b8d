"""The study of short-horizon bias on the noisy quadratic: known numbers, and what schedules do."""

import time
from typing import Any

import numpy as np

from lopt.analysis import Study, acceptance_rows, paper_study
from lopt.experiment.report import Report, finish, panels, stages
from lopt.experiment.studies.settings import QuadraticSettings

# How many pieces of work `paper_study` and `acceptance_rows` announce.
_PIECES = 32
# The schedules that are drawn, as a `Study` calls them: names and colours.
DRAWN = {
    "greedy": ("greedy", "#1f77b4"),
    "fixed": ("best fixed pair", "#7f7f7f"),
    "adam": ("whole horizon, Adam", "#d62728"),
    "optimal": ("whole horizon, optimum in the box", "#2ca02c"),
}


def quadratic(settings: QuadraticSettings) -> Report:
    """Studies the paper's problem, and compares its numbers with references."""
    began = time.perf_counter()
    with stages("noisy quadratic", _PIECES) as announce:
        found = paper_study(announce)
        rows = acceptance_rows(found, announce)
    seconds = time.perf_counter() - began
    report = Report("The noisy quadratic: 1000 directions, 250 steps")
    cells: list[dict[str, Any]] = [
        {
            "quantity": row.quantity,
            "computed": f"{row.value:.8g}",
            "reference": row.reference,
            "within": row.within,
        }
        for row in rows
    ]
    report.table(report.title, cells)
    missed = [row.quantity for row in rows if not row.within]
    verdict = f"not within: {'; '.join(missed)}" if missed else "all within their tolerance"
    report.text(f"{len(rows)} numbers in {seconds:.0f} seconds, {verdict}.")
    numbers = {}
    for field, (name, _) in DRAWN.items():
        run = getattr(found, field)
        pair = {"learning_rates": run.schedule.learning_rates, "momenta": run.schedule.momenta}
        arrays = pair | {"losses": run.losses, "bands": run.bands}
        numbers[name] = {key: np.asarray(array).tolist() for key, array in arrays.items()}
    size = (14.0, 7.6)
    report.figure("quadratic", lambda figure: draw_study(figure, found), size, schedules=numbers)
    return report


def draw_study(figure: Any, found: Study) -> None:
    """Draws what each schedule of a study does, and how it does it."""
    loss, rate, momentum, bands, ahead, fits = panels(figure, 6)
    for field, (name, color) in DRAWN.items():
        run = getattr(found, field)
        times = np.arange(1, len(run.losses))
        loss.plot(run.losses, color=color, label=f"{name}: {run.final_loss:.2f}")
        rate.plot(times, run.schedule.learning_rates, color=color, label=name)
        momentum.plot(times, run.schedule.momenta, color=color)
        shares = (np.arange(run.bands.shape[1]) + 0.5) / run.bands.shape[1]
        bands.plot(shares, run.bands[-1], color=color)
        bands.plot(shares, run.bands[len(run.bands) // 5], ":", color=color, lw=1)
    for name, some, line in (
        ("learning rate", found.look_ahead_rate, "o--"),
        ("and momentum", found.look_ahead, "o-"),
    ):
        finals = [run.final_loss for run in some.values()]
        ahead.plot(list(some), finals, line, color="#9467bd", ms=4, label=name)
    ahead.axhline(found.optimal.final_loss, color="#2ca02c", label="optimum in the box")
    losses, decays = zip(*((f.run.final_loss, f.decay) for f in found.fits.values()), strict=True)
    fits.plot(list(found.fits), losses, "o-", color="#8c564b", ms=4, label="final loss")
    fits.plot(list(found.fits), decays, "s--", color="#e377c2", ms=4, label="fitted decay")
    step, excess = "step", "expected excess loss"
    finish(loss, log=True, title="Loss", xlabel=step, ylabel=excess)
    finish(rate, log=True, title="Learning rate", xlabel=step, ylabel="learning rate")
    finish(momentum, title="Momentum", xlabel=step, ylabel="momentum")
    title, steep = "Loss by curvature: at the end, dotted at a fifth", "directions, steep to flat"
    finish(bands, log=True, title=title, xlabel=steep, ylabel=excess)
    title, looked = "Chosen by a horizon, again and again", "steps that are looked ahead, and held"
    finish(ahead, log="xy", title=title, xlabel=looked, ylabel="final loss")
    title, fitted = "a / (1 + t / K)^decay, fitted once", "horizon that the schedule was fitted to"
    finish(fits, log="xy", title=title, xlabel=fitted)
