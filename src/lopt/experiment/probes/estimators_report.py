"""The report of `lopt probe estimators`: a table, and what estimates and meta-losses look like."""

import dataclasses
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lopt.experiment.probes.estimators import EstimatorProbe, Row, probe_estimators
from lopt.experiment.probes.slices import Slices, loss_slices
from lopt.experiment.probes.subject import default_truncation, subject
from lopt.experiment.report import Measured, Report, finish, number
from lopt.experiment.settings import ProbeSettings


def probe_subject(name: str, settings: ProbeSettings) -> Report:
    """Measures the estimators of a recipe or a task."""
    began = time.perf_counter()
    inner, theta = subject(
        name, settings.settings, settings.horizon, settings.weights, settings.seed
    )
    length = settings.truncation or default_truncation(inner.horizon)
    settings = dataclasses.replace(settings, horizon=inner.horizon, truncation=length)
    key, slices_key = jax.random.split(jax.random.key(settings.seed))
    with Console(stderr=True).status("tracing") as status:
        result = probe_estimators(inner, theta, key, settings, settings.only, status.update)
        status.update("slices of the meta-loss")
        lengths = (length, inner.horizon, 3 * inner.horizon)
        slices = loss_slices(inner, theta, slices_key, lengths)
    head = {
        "name": name,
        **dataclasses.asdict(settings),
        "weights": None if settings.weights is None else str(settings.weights),
        "devices": len(jax.local_devices()),
        "platform": jax.default_backend(),
        "seconds": time.perf_counter() - began,
    }
    return estimators_report(result, slices, head)


def estimators_report(probe: EstimatorProbe, slices: Slices, settings: dict[str, Any]) -> Report:
    """Returns the report of what was found; `settings` are what was asked for."""
    report = Report(f"Estimators of the meta-gradient of {settings['name']}", settings)
    report.data |= {
        "versions": {name: version(name) for name in ("lopt", "jax", "equinox", "optax")},
        "weights": probe.weights,
        "budget_of_inner_steps": probe.budget,
        "truth_norm": probe.truth_norm,
        "truth_relative_standard_error": probe.truth_error,
        "truth_dropped": probe.truth_dropped,
        "estimators": [vars(row) | {"biased": row.biased} for row in probe.rows],
        "slices": {
            "lengths": list(slices.lengths),
            "line": slices.line.tolist(),
            "losses": slices.losses.tolist(),
            "plane": slices.plane.tolist(),
            "surfaces": None if slices.surfaces is None else slices.surfaces.tolist(),
        },
    }
    report.table(
        f"Estimators at {probe.weights} weights, {probe.budget} inner steps each",
        [
            {
                "estimator": _label(row),
                "bias": number(row.bias, 2) + "*" * bool(row.biased),
                "chance": number(row.bias_by_chance, 2),
                "along truth": str(Measured(row.along, row.along_error)),
                "variance": number(row.variance, 2),
                "S/N": number(row.signal_to_noise, 2),
                "us/step": number(row.seconds * 1e6, 2),
                "MiB": number(None if row.memory is None else row.memory / 2**20, 2),
            }
            for row in probe.rows
        ],
    )
    report.text(_legend(probe))
    report.figure("probe", lambda figure: _picture(figure, probe, slices), (13.0, 9.6))
    return report


def _legend(probe: EstimatorProbe) -> str:
    if probe.truth_dropped:
        truth = (
            f"Full backpropagation was not finite in {probe.truth_dropped} of its samples: it is "
            "no truth here, so no bias is given."
        )
    elif probe.truth_norm is None or probe.truth_error is None:
        truth = "Full backpropagation is too noisy to be the truth here, so no bias is given."
    else:
        truth = (
            f"Truth: full backpropagation, norm {probe.truth_norm:.3g}, "
            f"standard error {100 * probe.truth_error:.1f} %. "
            "Bias: |mean - truth| / |truth|; * is more than chance."
        )
    return (
        f"{truth} Chance: the bias of an estimator without any. Variance: of one weight, mean over "
        "weights. S/N: |mean|^2 over the sum of variances."
    )


def _picture(figure: Any, probe: EstimatorProbe, slices: Slices) -> None:
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    above.suptitle(
        f"estimators at {probe.weights} weights, {probe.budget:,} inner steps each", fontsize=12
    )
    _bars(above, probe)
    below.suptitle("the meta-loss of one episode around theta", fontsize=12)
    _curves(below, slices)


def _bars(figure: Any, probe: EstimatorProbe) -> None:
    rows = probe.rows[::-1]
    places = np.arange(len(rows))
    panels: Any = figure.subplots(1, 5, sharey=True)
    columns: list[tuple[str, Sequence[float | None]]] = [
        ("bias / |truth|", [row.bias for row in rows]),
        ("variance per weight", [row.variance for row in rows]),
        ("signal to noise", [row.signal_to_noise for row in rows]),
        ("time per inner step [µs]", [row.seconds * 1e6 for row in rows]),
        ("memory [MiB]", [None if r.memory is None else r.memory / 2**20 for r in rows]),
    ]
    for axes, (title, values) in zip(panels, columns, strict=True):
        shown = np.array([value if value else np.nan for value in values], float)
        colors = ["#d62728" if row.biased else "#1f77b4" for row in rows]
        axes.scatter(shown, places, c=colors, zorder=3, s=34)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, lw=0.5)
        if np.isfinite(shown).any():
            axes.set_xscale("log")
            low, high = np.nanmin(shown), np.nanmax(shown)
            axes.set_xlim(low / 3, high * 3)
        else:
            axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center")
            axes.set_xticks([])
    panels[0].set_yticks(places, [_label(row) for row in rows], fontsize=9)
    panels[0].set_ylim(-0.7, len(rows) - 0.3)
    chance = np.array([np.nan if r.bias_by_chance is None else r.bias_by_chance for r in rows])
    if np.isfinite(chance).any():
        panels[0].barh(
            places, chance, height=0.75, left=0, color="#bbbbbb", alpha=0.6, label="by chance"
        )
        low = np.nanmin([*chance, *(r.bias for r in rows if r.bias)])
        panels[0].set_xlim(low / 3, None)
        panels[0].scatter([], [], c="#d62728", label="biased")
        panels[0].scatter([], [], c="#1f77b4", label="not found biased")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _label(row: Row) -> str:
    return row.name + (f" ({row.dropped} dropped)" if row.dropped else "")


def _curves(figure: Any, slices: Slices) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    surfaces = slices.surfaces
    panels = figure.subplots(1, 1 if surfaces is None else 3, squeeze=False)[0]
    axes = panels[0]
    shades = np.linspace(0.25, 0.9, len(slices.lengths))
    for length, losses, shade in zip(slices.lengths, _finite(slices.losses), shades, strict=True):
        color = colormaps["viridis"](1 - shade)
        axes.plot(slices.line, losses, color=color, label=f"{length} steps", lw=1.6)
    positive = all(np.nanmin(losses, initial=np.inf) > 0 for losses in _finite(slices.losses))
    finish(
        axes,
        log=positive,
        xlabel="along one direction [norms of theta]",
        ylabel="meta-loss",
        title="one random direction",
    )
    if surfaces is None:
        return
    for axes, i in zip(panels[1:], (0, -1), strict=True):
        surface = _finite(surfaces[i])
        low, high = np.nanmin(surface, initial=np.inf), np.nanmax(surface, initial=-np.inf)
        norm: Any = LogNorm(low, high) if 0 < low < high < np.inf else Normalize()
        mesh = axes.pcolormesh(slices.plane, slices.plane, surface, norm=norm, shading="nearest")
        figure.colorbar(mesh, ax=axes, label="meta-loss")
        axes.plot(0, 0, "w+", ms=10)
        axes.set_facecolor("#dddddd")  # where the loss is not finite
        axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        axes.set_title(f"two random directions, {slices.lengths[i]} steps", fontsize=10)


def _finite(values: np.ndarray) -> np.ndarray:
    # Beyond 1e30 a run has diverged as well, and axes overflow.
    return np.where(np.isfinite(values) & (np.abs(values) < 1e30), values, np.nan)
