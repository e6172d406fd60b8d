"""The study of short-horizon bias on the noisy quadratic: known numbers, and what schedules do."""

import collections
import time
from typing import Any

import numpy as np

from lopt.analysis import Study, acceptance_rows, paper_study
from lopt.experiment.report import Report, finish, panels, stages
from lopt.experiment.studies.settings import QuadraticSettings

# How many pieces of work `paper_study` and `acceptance_rows` announce.
_PIECES = 32
# A panel is a title, its labels, and curves: name, places, values, colour and line.
Curve = tuple[str, Any, Any, str, str]
Panel = tuple[str, dict[str, Any], list[Curve]]


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
    shown = panels_of(found)
    numbers = {
        title: {name: {"at": list(x), "values": list(y)} for name, x, y, *_ in curves}
        for title, _, curves in shown
    }

    def draw(figure: Any) -> None:
        for axes, (title, labels, curves) in zip(panels(figure, len(shown)), shown, strict=True):
            for name, x, y, color, line in curves:
                axes.plot(x, y, line, color=color, lw=1 if line == ":" else 1.5, ms=4, label=name)
            finish(axes, title=title, **labels)

    report.figure("quadratic", draw, (14.0, 7.6), panels=numbers)
    return report


def panels_of(found: Study) -> list[Panel]:
    """Returns what each schedule of a study does, and how it does it."""
    runs = [
        ("greedy", found.greedy, "#1f77b4"),
        ("best fixed pair", found.fixed, "#7f7f7f"),
        ("whole horizon, Adam", found.adam, "#d62728"),
        ("whole horizon, optimum in the box", found.optimal, "#2ca02c"),
    ]
    times = np.arange(0.0, len(found.greedy.losses))
    shares = (np.arange(found.greedy.bands.shape[1]) + 0.5) / found.greedy.bands.shape[1]
    curves: dict[str, list[Curve]] = collections.defaultdict(list)
    for name, run, color in runs:
        fifth = run.bands[len(run.bands) // 5]
        curves["loss"].append((f"{name}: {run.final_loss:.2f}", times, run.losses, color, "-"))
        curves["rate"].append((name, times[1:], run.schedule.learning_rates, color, "-"))
        curves["momentum"].append((name, times[1:], run.schedule.momenta, color, "-"))
        curves["bands"].append((name, shares, run.bands[-1], color, "-"))
        curves["bands"].append((f"{name}, at a fifth", shares, fifth, color, ":"))
    ahead: list[Curve] = [
        (name, list(some), [run.final_loss for run in some.values()], "#9467bd", line)
        for name, some, line in (
            ("learning rate", found.look_ahead_rate, "o--"),
            ("and momentum", found.look_ahead, "o-"),
        )
    ]
    optimum = [found.optimal.final_loss] * len(found.look_ahead)
    ahead.append(("optimum in the box", list(found.look_ahead), optimum, "#2ca02c", "-"))
    finals, decays = zip(*((f.run.final_loss, f.decay) for f in found.fits.values()), strict=True)
    fits: list[Curve] = [
        ("final loss", list(found.fits), finals, "#8c564b", "o-"),
        ("fitted decay", list(found.fits), decays, "#e377c2", "s--"),
    ]
    loss, step = {"ylabel": "expected excess loss", "log": True}, {"xlabel": "step"}
    looked = {"xlabel": "steps that are looked ahead, and held", "ylabel": "final loss"}
    band = {"xlabel": "directions, from steep to flat", "legend": False}
    fitted = {"xlabel": "horizon that the schedule was fitted to", "log": "xy"}
    return [
        ("Loss", loss | step, curves["loss"]),
        ("Learning rate", step | {"ylabel": "learning rate", "log": True}, curves["rate"]),
        ("Momentum", step | {"ylabel": "momentum", "legend": False}, curves["momentum"]),
        ("Loss by curvature: at the end, dotted at a fifth", loss | band, curves["bands"]),
        ("Chosen by a horizon, again and again", looked | {"log": "xy"}, ahead),
        ("a / (1 + t / K)^decay, fitted once", fitted, fits),
    ]
