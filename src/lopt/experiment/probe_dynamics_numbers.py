"""The numbers of `lopt probe dynamics`, as they go into its JSON and its tables."""

from typing import Any

import numpy as np
from jaxtyping import Array

from lopt.analysis.dynamics import Portrait
from lopt.experiment.probe_dynamics import DynamicsProbe, Watched
from lopt.experiment.probe_dynamics_answers import Feature
from lopt.experiment.probe_dynamics_watch import HISTOGRAM, RATES, REFERENCES, Checkpoint

# At which updates are told apart by tensor; the published ones, and the last.
SHOWN = (1, 5, 10, 30, 100, 300, 500)
FINAL = 10
NOISE = ("tail_index", "trace", "top_eigenvalue", "mean_norm", "silent")


def numbers_of(probe: DynamicsProbe) -> dict[str, Any]:
    """Returns everything that was found out, as lists and dictionaries.

    Steps are numbered from 1. Means are over seeds; the standard error is theirs, and none of one.
    """
    shown = sorted({step for step in SHOWN if step < probe.steps} | {probe.steps})
    aligned = probe.learned.seen.alignment
    return {
        "tensors": dict(zip(probe.tensors, probe.coordinates, strict=True)),
        "shown_steps": shown,
        "rates_tried": list(RATES),
        "histogram_edges": HISTOGRAM.edges.tolist(),
        "optimizers": [_optimizer(one, probe, shown) for one in probe.optimizers],
        "alignment": {
            name: {
                "cosine": _course(one.overall_cosine),
                "relative": _course(one.overall_relative),
                "tensors": {
                    tensor: {
                        "cosine": _column(one.cosine, i, shown),
                        "relative": _column(one.relative, i, shown),
                    }
                    for i, tensor in enumerate(probe.tensors)
                },
            }
            for name, one in ((name, aligned[name]) for name in REFERENCES)
        },
        "signals": {
            name: np.asarray(grads, float).tolist() for name, grads in probe.signals.items()
        },
        "features": [_feature(one) for one in probe.features],
        "left_out": probe.left_out,
    }


def _optimizer(one: Watched, probe: DynamicsProbe, shown: list[int]) -> dict[str, Any]:
    seen, updates = one.seen, one.seen.updates
    losses = np.asarray(seen.loss, float)
    relative = np.asarray(updates.overall_relative, float)
    # Of all seeds together: an update that is largest in one of them is the largest.
    largest = np.max(np.asarray(updates.largest, float), axis=(0, 2))
    return {
        "optimizer": one.name,
        "learning_rate": None if one.rate is None else one.rate.value,
        "learning_rate_at_edge_of_grid": one.rate is not None and one.rate.at_edge,
        "mean_loss": mean_and_error(losses.mean(axis=1)),
        "final_loss": mean_and_error(losses[:, -FINAL:].mean(axis=1)),
        "largest_update": [float(largest[step - 1]) for step in shown],
        "median_relative_step": float(np.median(relative)),
        "median_effective_rate": float(np.median(seen.rate.overall)),
        "loss": losses.mean(axis=0).tolist(),
        "relative_step": relative.mean(axis=0).tolist(),
        "effective_rate": np.mean(np.asarray(seen.rate.overall, float), axis=0).tolist(),
        "tensors": {tensor: _tensor(one, i, shown) for i, tensor in enumerate(probe.tensors)},
        "noise": [_moment(moment) for moment in one.noise],
        "valley": None if one.portrait is None else _valley(one, one.portrait),
        "signals": None if one.answers is None else _signals(one.answers),
    }


def _tensor(one: Watched, tensor: int, shown: list[int]) -> dict[str, Any]:
    updates, at = one.seen.updates, np.asarray(shown) - 1
    counts = np.sum(np.asarray(updates.counts), axis=0)
    largest = np.max(np.asarray(updates.largest, float), axis=0)
    # Tensors such as biases begin at zero: of these no step has a size.
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.asarray(updates.update_norm, float) / np.asarray(updates.param_norm, float)
    return {
        "counts": counts[at, tensor].tolist(),
        "largest": largest[at, tensor].tolist(),
        "relative_step": _column(relative, tensor, shown),
        "effective_rate": _column(one.seen.rate.per_tensor, tensor, shown),
    }


def _moment(moment: Checkpoint) -> dict[str, Any]:
    return {
        "step": moment.step,
        **{
            which: {
                name: mean_and_error(
                    np.array([getattr(noise, name) for noise in found if noise is not None], float)
                )
                for name in NOISE
            }
            for which, found in (("gradients", moment.gradients), ("updates", moment.updates))
        },
    }


def _valley(one: Watched, portrait: Portrait) -> dict[str, Any]:
    drift = np.asarray(portrait.drift, float)
    off = np.abs(np.asarray(portrait.sums)[:, 0]) > 1e-6
    return {
        "learning_rate": None if one.valley_rate is None else one.valley_rate.value,
        "learning_rate_at_edge_of_grid": one.valley_rate is not None and one.valley_rate.at_edge,
        # Opposite starts may drift in opposite directions, which must not cancel.
        "median_drift": _median(np.abs(drift[off])),
        "drift_from_to": [float(np.min(drift[off])), float(np.max(drift[off]))],
        "largest_change_of_sum": float(np.max(np.abs(portrait.displacement))),
        "median_oddness_defect": _median(np.asarray(portrait.oddness, float)),
        "largest_oddness_defect": _largest(np.asarray(portrait.oddness, float)),
        "median_reflection_defect": _median(np.asarray(portrait.reflection, float)),
        "median_swap_defect": _median(np.asarray(portrait.swap, float)),
        "largest_final_loss": float(np.max(portrait.losses[:, -1])),
        "starts": np.asarray(portrait.paths, float)[:, 0].tolist(),
        "ends": np.asarray(portrait.paths, float)[:, -1].tolist(),
    }


def _signals(answers: dict[str, Array]) -> dict[str, Any]:
    # What the impulse adds to the update that there would be without it.
    added = np.abs(np.asarray(answers["impulse"], float) - np.asarray(answers["quiet"], float))
    total = np.cumsum(added)
    half = None
    if np.isfinite(total[-1]) and total[-1] > 0:
        half = int(np.argmax(total >= total[-1] / 2) - np.argmax(added > 0))
    return {
        "steps_to_half_of_impulse": half,
        "updates": {name: np.asarray(values, float).tolist() for name, values in answers.items()},
    }


def _feature(one: Feature) -> dict[str, Any]:
    return {
        "feature": one.name,
        "swing": one.swing,
        "slope": one.slope,
        "spread": one.spread,
        "values": one.values.tolist(),
        "mean": None if one.mean is None else np.asarray(one.mean, float).tolist(),
    }


def _course(values: Any) -> dict[str, Any]:
    """Returns a number at the first step, over all steps and at the last, and the mean over time.

    Steps without a number, such as angles to an update of zero, are left out of the mean.
    """
    values = np.asarray(values, float)
    counted = np.ma.masked_invalid(values).mean(axis=1)
    return {
        "first": mean_and_error(values[:, 0]),
        "mean": mean_and_error(np.ma.compressed(counted)),
        "last": mean_and_error(values[:, -1]),
        "over_time": values.mean(axis=0).tolist(),
    }


def _column(values: Any, tensor: int, shown: list[int]) -> list[float]:
    means = np.mean(np.asarray(values, float), axis=0)
    return [float(means[step - 1, tensor]) for step in shown]


def mean_and_error(values: np.ndarray) -> dict[str, float | None]:
    """Returns mean and standard error; none where they are not finite."""
    finite = len(values) > 0 and bool(np.isfinite(values).all())
    error = (
        float(np.std(values, ddof=1) / len(values) ** 0.5) if finite and len(values) > 1 else None
    )
    return {"mean": float(np.mean(values)) if finite else None, "standard_error": error}


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _largest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.max(finite)) if finite.size else None
