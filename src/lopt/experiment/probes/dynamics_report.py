"""The report of `lopt probe dynamics`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt.analysis.dynamics import Alignment, LearningRate, Portrait, UpdateDistribution
from lopt.experiment.baselines import BASELINES
from lopt.experiment.probes import dynamics_figures as figures
from lopt.experiment.probes.dynamics import DynamicsProbe, Watched
from lopt.experiment.probes.dynamics_watch import HISTOGRAM
from lopt.experiment.report import Cell, Report, measured, number, shown_steps

FINAL = 10


def dynamics_report(probe: DynamicsProbe, settings: dict[str, Any]) -> Report:
    """Returns the report of what was found; `settings` are what was asked for."""
    report = Report(f"The dynamics of {settings['run']}", settings, _numbers(probe))
    report.heading("Training")
    report.text(
        f"{settings['seeds']} fresh tasks of the run, {probe.steps} steps each; all optimizers "
        "begin at the same params and see the same batches. The rates of references are the best "
        "of half decades for just these runs (mean training loss; * at the grid's edge).",
        detail=True,
    )
    report.figure(
        "courses",
        partial(figures.draw_courses, optimizers=probe.optimizers),
        (13.8, 3.8),
        "Mean and standard error over seeds.",
    )
    title = f"Training ({probe.steps} steps, {settings['seeds']} seeds; * at the grid's edge)"
    report.table(title, [_training(one) for one in probe.optimizers])
    report.heading("How large updates are")
    for one in probe.optimizers:
        report.figure(
            f"updates_{one.name}",
            partial(
                figures.draw_histograms,
                found=_over_seeds(one.seen.updates),
                histogram=HISTOGRAM,
                names=probe.tensors,
            ),
            figures.grid_size(len(probe.tensors), 4.0, 3.4),
            f"{one.name}: the distribution of |update| in each tensor, of all seeds together. "
            f"Shares of less than {HISTOGRAM.lowest:g}, zeros included, are not drawn.",
        )
    report.heading("Alignment with references")
    aligned = probe.learned.seen.alignment
    report.figure(
        "alignment",
        partial(
            figures.draw_alignment,
            found={name: _mean_over_seeds(aligned[name]) for name in BASELINES},
            rate=_mean_over_seeds(probe.learned.seen.rate),
            names=probe.tensors,
        ),
        (13.8, 3.8),
        "The learned optimizer on its own path: what the references would have done there. Means "
        "over seeds.",
    )
    report.table(
        "The learned optimizer against references, on its own path",
        [_alignment(name, aligned[name]) for name in BASELINES],
    )
    report.heading("Noise")
    report.text(
        f"How gradients of {settings['batches']} batches at one checkpoint vary, and the updates "
        "made of them. The tail index is that of published studies, over all coordinates "
        "together: unequal coordinates lower it, as heavy tails do.",
        detail=True,
    )
    report.figure(
        "noise",
        partial(figures.draw_noise, optimizers=probe.optimizers),
        (13.8, 7.0),
        "Each on its own path, states frozen.",
    )
    noise = [row for one in probe.optimizers for row in _noise(one)]
    report.table("Noise of gradients (g) and updates (u)", noise)
    report.heading("In the valley")
    report.text(
        "f(x, y) = (x - y)^2 / 2. A coordinatewise rule that is odd in gradients and ignores "
        "params keeps x + y; drift is 1 - |x + y| at the end / at the start. References have the "
        "best rates for the valley.",
        detail=True,
    )
    portraits = {one.name: one.portrait for one in probe.optimizers if one.portrait is not None}
    report.figure(
        "valley",
        partial(figures.draw_portraits, found=portraits),
        figures.grid_size(len(portraits), 3.7, 4.0),
        "Paths from a grid of starts (arrows: first updates, dots: ends). Every point of the "
        "diagonal is a minimum.",
    )
    valley = [_valley(one, one.portrait) for one in probe.optimizers if one.portrait is not None]
    report.table("In the valley (x - y)^2 / 2, and after an impulse (steps)", valley)
    report.heading("Responses to signals")
    report.text(
        "The other coordinates of the tensor have random gradients, as large as in training, so "
        "that rules that normalise over tensors have something to go by.",
        detail=True,
    )
    report.figure(
        "signals",
        partial(
            figures.draw_signals,
            signals=probe.signals,
            found={one.name: one.answers for one in probe.optimizers if one.answers is not None},
        ),
        (4.4 * len(probe.signals), 3.6),
        "Updates of one coordinate, whose gradient is scripted.",
    )
    drawn = {one.name: (one.values, one.curves) for one in probe.features if one.curves is not None}
    if drawn:
        report.heading("Response to each feature")
        report.text(
            "Swing is the spread of a feature over recorded inputs times the root mean square "
            "derivative of the update in it.",
            detail=True,
        )
        report.figure(
            "responses",
            partial(figures.draw_responses, curves=drawn),
            figures.grid_size(len(drawn), 3.5, 2.9),
            "The update as each feature alone is varied, at recorded inputs, and in bold the "
            "mean: the partial dependence.",
        )
    features: list[dict[str, Cell]] = [
        {
            "feature": one.name,
            "swing": one.swing,
            "mean slope": one.slope,
            "spread": one.spread,
            "range of the mean response": None if one.mean is None else float(np.ptp(one.mean)),
        }
        for one in probe.features[:12]
    ]
    report.table("What moves the learned rule's updates most", features)
    for part, reason in probe.left_out.items():
        report.text(f"Left out: {part}. {reason}")
    return report


def _training(one: Watched) -> dict[str, Cell]:
    updates, losses = one.seen.updates, np.asarray(one.seen.loss, float)
    # Of all seeds together: an update that is largest in one of them is the largest.
    largest = np.max(np.asarray(updates.largest, float), axis=(0, 2))
    return {
        "optimizer": one.name,
        "rate": "-" if one.rate is None else number(one.rate.value) + "*" * one.rate.at_edge,
        "mean loss": measured(losses.mean(axis=1)),
        "final loss": measured(losses[:, -FINAL:].mean(axis=1)),
        "largest |u|, first step": float(largest[0]),
        "last step": float(largest[-1]),
        "relative step": float(np.median(updates.overall_relative)),
        "effective rate": float(np.median(one.seen.rate.overall)),
    }


def _alignment(name: str, found: Alignment) -> dict[str, Cell]:
    row: dict[str, Cell] = {"reference": name}
    for label, values in (
        ("cosine", found.overall_cosine),
        ("|u| / |ref|", found.overall_relative),
    ):
        over_time = np.asarray(values, float)
        # Angles to an update of zero are NaN, and left out of the mean.
        mean = np.ma.compressed(np.ma.masked_invalid(over_time).mean(axis=1))
        row[f"{label}, first"] = measured(over_time[:, 0])
        row[f"{label}, mean"] = measured(mean)
        row[f"{label}, last"] = measured(over_time[:, -1])
    return row


def _noise(one: Watched) -> list[dict[str, Cell]]:
    rows = []
    for moment in one.noise:
        row: dict[str, Cell] = {"optimizer": one.name, "step": moment.step}
        for label, name in (
            ("tail", "tail_index"),
            ("trace", "trace"),
            ("top", "top_eigenvalue"),
        ):
            for short, each in (("g", moment.gradients), ("u", moment.updates)):
                values = [getattr(noise, name) for noise in each if noise is not None]
                found = measured(values)
                row[f"{label} {short}"] = found if label == "tail" else found.mean
        rows.append(row)
    return rows


def _valley(one: Watched, portrait: Portrait) -> dict[str, Cell]:
    off = np.abs(np.asarray(portrait.sums)[:, 0]) > 1e-6
    return {
        "optimizer": one.name,
        "rate": None if one.valley_rate is None else one.valley_rate.value,
        # Opposite starts may drift in opposite directions, which must not cancel.
        "|drift|": _median(np.abs(np.asarray(portrait.drift, float)[off])),
        "|change of x+y|": float(np.max(np.abs(portrait.displacement))),
        "oddness": _median(np.asarray(portrait.oddness, float)),
        "reflection": _median(np.asarray(portrait.reflection, float)),
        "final loss": float(np.max(portrait.losses[:, -1])),
        "impulse half after": _half_of_impulse(one),
    }


def _half_of_impulse(one: Watched) -> int | None:
    """Returns the steps until half of what an impulse adds to updates was added."""
    if one.answers is None:
        return None
    added = np.abs(np.asarray(one.answers["impulse"], float) - np.asarray(one.answers["quiet"]))
    total = np.cumsum(added)
    if not (np.isfinite(total[-1]) and total[-1] > 0):
        return None
    return int(np.argmax(total >= total[-1] / 2) - np.argmax(added > 0))


def _numbers(probe: DynamicsProbe) -> dict[str, Any]:
    """Returns what the JSON has besides the tables: courses, by optimizer and tensor."""
    at = np.array(shown_steps(probe.steps)) - 1

    def course(values: Any) -> list[Any]:
        return np.mean(np.asarray(values, float), axis=0)[at].tolist()

    def optimizer(one: Watched) -> dict[str, Any]:
        updates, rate = one.seen.updates, one.seen.rate
        # Tensors such as biases begin at zero: of these no step has a size.
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.asarray(updates.update_norm, float) / np.asarray(updates.param_norm)
        answers = one.answers or {}
        return {
            "learning_rate": None if one.rate is None else one.rate.value,
            "loss": course(one.seen.loss),
            "relative_step": course(updates.overall_relative),
            "effective_rate": course(rate.overall),
            "tensors": {
                tensor: {
                    "counts": np.sum(np.asarray(updates.counts), axis=0)[at, i].tolist(),
                    "largest": np.max(np.asarray(updates.largest), axis=0)[at, i].tolist(),
                    "relative_step": course(relative[..., i]),
                    "effective_rate": course(rate.per_tensor[..., i]),
                }
                for i, tensor in enumerate(probe.tensors)
            },
            "signals": {name: np.asarray(v, float).tolist() for name, v in answers.items()},
        }

    return {
        "tensors": dict(zip(probe.tensors, probe.coordinates, strict=True)),
        "curve_steps": (at + 1).tolist(),
        "rates_tried": {name: one.rates.tolist() for name, one in BASELINES.items()},
        "histogram_edges": HISTOGRAM.edges.tolist(),
        "optimizers": {one.name: optimizer(one) for one in probe.optimizers},
        "alignment": {
            name: {"cosine": course(one.overall_cosine), "relative": course(one.overall_relative)}
            for name, one in probe.learned.seen.alignment.items()
        },
        "signals": {name: np.asarray(v, float).tolist() for name, v in probe.signals.items()},
        "left_out": probe.left_out,
    }


def _mean_over_seeds(found: Alignment | LearningRate) -> Any:
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)


def _over_seeds(found: UpdateDistribution) -> UpdateDistribution:
    """Returns counts of all seeds together, the largest update of any, and mean norms."""
    return UpdateDistribution(
        jnp.sum(found.counts, axis=0),
        jnp.max(found.largest, axis=0),
        jnp.mean(found.update_norm, axis=0),
        jnp.mean(found.param_norm, axis=0),
    )


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None
