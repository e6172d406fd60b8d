"""The report of `lopt probe horizon`, and the sentence that it ends in."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lopt.experiment.probes.subject import subject
from lopt.experiment.probes.truncation import HorizonProbe, KnobResult, probe_horizon
from lopt.experiment.report import Measured, Report, finish, number, panels
from lopt.experiment.settings import HorizonSettings


def probe_truncations(name: str, settings: HorizonSettings) -> Report:
    """Measures what truncations of a recipe or a task do."""
    began = time.perf_counter()
    inner, theta = subject(
        name, settings.settings, settings.horizon, settings.weights, settings.seed, longest=200
    )
    with Console(stderr=True).status("tracing") as status:
        result = probe_horizon(
            inner,
            theta,
            jax.random.key(settings.seed),
            settings.truncations,
            settings.episodes,
            settings.positions,
            settings.reach,
            status.update,
        )
    head = {
        "name": name,
        **dataclasses.asdict(settings),
        "horizon": inner.horizon,
        "weights": None if settings.weights is None else str(settings.weights),
        "seconds": time.perf_counter() - began,
    }
    return horizon_report(result, head)


def horizon_report(probe: HorizonProbe, settings: dict[str, Any]) -> Report:
    """Returns the report of what was found; `settings`, with the tolerance, were asked for."""
    tolerance = settings["tolerance"]
    rows = whole_rows(probe)
    knobs = [_knob_rows(probe, knob, tolerance) for knob in probe.knobs]
    within = unbiased_from(rows, tolerance)
    report = Report(f"How long truncations of {settings['name']} have to be", settings)
    report.data |= {"truncations": rows, "knobs": knobs, "bias_within_tolerance_from": within}
    report.data["verdict"] = verdict(probe, knobs, tolerance)
    report.table(
        f"Gradient by all of theta ({probe.gradients.shape[2]} weights)",
        [
            {
                "truncation": row["truncation"],
                "bias": row["bias"],
                "cosine": row["cosine"],
                "noise": row["noise"],
                "ms per estimate": 1000 * row["seconds"],
                "memory, MB": None if row["memory"] is None else row["memory"] / 1e6,
            }
            for row in rows
        ],
    )
    bounds = {"below": "< ", "above": "> ", "inside": "", "nowhere": "", "diverged": ""}
    for knob in knobs:
        report.table(
            f"{knob['name']}, times a factor",
            [
                {
                    "truncation": row["truncation"],
                    "slope here": f"{Measured(row['slope'], row['slope_error'])}"
                    + " wrong sign" * row["wrong_sign"],
                    "rests at": bounds[row["optimum_is"]] + number(row["optimum"]),
                    "off by": row["off_by"],
                    "meta-loss there": row["meta_loss_there"],
                    "excess": f"{row['excess']:.1%}",
                }
                for row in knob["rows"]
            ],
        )
    report.text(
        f"The bias of the gradient falls below {tolerance:.0%} of its norm at a truncation of "
        f"{within}."
    )
    report.text(report.data["verdict"])
    size = (4.6 * (len(probe.knobs) + 1), 3.9)
    report.figure("horizon", lambda figure: _draw(figure, probe, rows), size)
    return report


def whole_rows(probe: HorizonProbe) -> list[dict[str, Any]]:
    """Returns, per truncation, how its gradient by all of theta compares with the exact one."""
    means = probe.gradients.mean(1)
    count = probe.gradients.shape[1]
    noise = np.linalg.norm(probe.gradients.std(1, ddof=1), axis=-1) / count**0.5
    true, norm = means[-1], np.linalg.norm(means[-1])
    rows = []
    for i, truncation in enumerate(probe.truncations):
        own = np.linalg.norm(means[i])
        rows.append(
            {
                "truncation": truncation,
                "bias": _ratio(np.linalg.norm(means[i] - true), norm),
                "cosine": _ratio(float(means[i] @ true), norm * own),
                "noise": _ratio(noise[i], norm),
                "seconds": probe.seconds[i],
                "memory": probe.memory[i],
            }
        )
    return rows


def _ratio(a: Any, b: Any) -> float:
    return float(a / b) if b > 0 else float("nan")


def _knob_rows(probe: HorizonProbe, knob: KnobResult, tolerance: float) -> dict[str, Any]:
    means, errors = knob.mean_slopes()
    here = int(np.argmin(np.abs(np.log(knob.factors))))
    best, lowest = knob.best()
    rows: list[dict[str, Any]] = []
    for i, truncation in enumerate(probe.truncations):
        optimum, place = knob.rest(i)
        slope, error, true = means[here, i], errors[here, i], means[here, -1]
        there = knob.loss_at(optimum)
        rows.append(
            {
                "truncation": truncation,
                "slope": float(slope),
                "slope_error": float(error),
                "wrong_sign": bool(
                    slope * true < 0 and abs(slope) > 2 * error and abs(true) > 2 * errors[here, -1]
                ),
                "optimum": optimum,
                "optimum_is": place,
                "off_by": optimum / best,
                "meta_loss_there": there,
                "excess": float(np.maximum(0.0, _ratio(there - lowest, abs(lowest)))),
            }
        )
    enough = probe.truncations[-1]
    for row in reversed(rows):
        if not row["excess"] <= tolerance:
            break
        enough = row["truncation"]
    return {
        "name": knob.name,
        "best_factor": best,
        "rows": rows,
        "enough": enough,
    }


def verdict(probe: HorizonProbe, knobs: list[dict[str, Any]], tolerance: float) -> str:
    """Returns one sentence to act on."""
    horizon, shortest = probe.truncations[-1], probe.truncations[0]
    for knob in knobs:
        last = knob["rows"][-1]
        if last["optimum_is"] == "diverged":
            return (
                f"Training diverges where {knob['name']} stands: the best factor tried is "
                f"{knob['best_factor']:.3g}; begin there and probe again."
            )
        if last["excess"] > tolerance:
            return (
                f"From where {knob['name']} stands, not even the gradient of all {horizon} steps "
                f"leads to its best (factor {knob['best_factor']:.3g}; it rests with a meta-loss "
                f"{last['excess']:.0%} higher): begin there, or smooth the way with lopt.PES."
            )
    enough = max(knob["enough"] for knob in knobs)
    bad = [
        (row, knob["name"]) for knob in knobs for row in knob["rows"] if row["excess"] > tolerance
    ]
    if not bad:
        seen = shortest if enough == shortest else enough
        return (
            f"Truncations down to {seen} of {horizon} inner steps cost at most {tolerance:.0%} of "
            "meta-loss: short ones are safe here."
        )
    row, name = max(bad, key=lambda pair: pair[0]["excess"])
    off = row["off_by"]
    beyond = "" if row["optimum_is"] == "inside" else "at least "
    way = f"{1 / off:.3g} times too small" if off < 1 else f"{off:.3g} times too large"
    remedy = (
        "only the whole horizon will do"
        if enough == horizon
        else f"use truncations of at least {enough} of its {horizon} inner steps"
    )
    return (
        f"A truncation of {row['truncation']} would make {name} {beyond}{way} and the meta-loss "
        f"{row['excess']:.0%} higher than it could be: {remedy}, or an estimator that is unbiased "
        "at any truncation, such as lopt.PES."
    )


def unbiased_from(rows: list[dict[str, Any]], tolerance: float) -> int:
    """Returns the truncation from which on the gradient's own bias is within the tolerance."""
    found = rows[-1]["truncation"]
    for row in reversed(rows):
        if not row["bias"] <= tolerance:
            break
        found = row["truncation"]
    return found


def _draw(figure: Any, probe: HorizonProbe, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    colors = matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(probe.truncations)))
    *each, axes = panels(figure, len(probe.knobs) + 1, len(probe.knobs) + 1)
    for own, knob in zip(each, probe.knobs, strict=True):
        means, errors = knob.mean_slopes()
        for i, truncation in enumerate(probe.truncations):
            own.plot(knob.factors, means[:, i], color=colors[i], label=f"{truncation}")
            low, high = means[:, i] - errors[:, i], means[:, i] + errors[:, i]
            own.fill_between(knob.factors, low, high, color=colors[i], alpha=0.2, lw=0)
            optimum, where = knob.rest(i)
            if where == "inside":
                own.plot([optimum], [0], "o", color=colors[i], mec="black", ms=7, zorder=3)
        top = np.nanquantile(np.abs(means), 0.85) or 1.0
        own.axhline(0, color="black", lw=0.8)
        finish(own, log="x", title=f"{knob.name}: slope of the meta-loss", xlabel="factor")
        own.set(ylim=(-top, top))
        own.get_legend().set_title("truncation")
    lengths = probe.truncations[:-1]
    axes.plot(lengths, [row["bias"] for row in rows[:-1]], "o-", label="bias, all of theta")
    axes.plot(lengths, [1 - row["cosine"] for row in rows[:-1]], "s--", label="1 - cosine")
    finish(axes, log="xy", xlabel="truncation", title="against the whole gradient")
