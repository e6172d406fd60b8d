"""How short may a truncation be? Meta-gradient and optimum against truncation length.

Each knob, a hyperparameter or the scale of a rule's updates, is turned to several positions. The
slopes there say which way truncated backpropagation would turn it, and where it would come to rest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from lopt.analysis.truncation import Knob, TruncationSweep, truncations_of
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Scalar, Theta
from lopt.estimators import TruncatedBackprop
from lopt.experiment.probes.subject import Subject, subject
from lopt.experiment.report import Measured, Report, bands, finish, panels, stages
from lopt.experiment.report.statistics import mean_and_error
from lopt.experiment.settings import HorizonSettings
from lopt.experiment.trainings import Keys, OverDevices, mean_estimate
from lopt.learned import Learnable

MOST_KNOBS = 6
Rows = Sequence[Mapping[str, Any]]


def probe_truncation(name: str, settings: HorizonSettings, of: Subject | None = None) -> Report:
    """Measures what truncations do, of what has a name, or is given."""
    inner, theta = of or subject(name, settings, longest=200)
    lengths = settings.truncations or truncations_of(inner.horizon)
    if len(lengths) < 2 or lengths[-1] != inner.horizon:
        raise ValueError(
            f"truncations={lengths} must be at least two and end with the horizon "
            f"{inner.horizon}; try {truncations_of(inner.horizon)}, or a longer horizon."
        )
    settings = dataclasses.replace(settings, horizon=inner.horizon, truncations=lengths)
    title = f"How long truncations of {name} have to be"
    report = Report(title, {"name": name, **dataclasses.asdict(settings)})
    # All truncations and positions share their episodes.
    keys = jax.random.split(jax.random.key(settings.seed), settings.episodes)
    half, reach = settings.positions // 2 + 1, float(np.log(settings.reach))
    turned, numbers, rows, knobs = {}, {}, dict[str, Rows](), _knobs(inner, theta)
    with stages("probing", len(knobs) + 1) as announce:
        for what, knob, most in knobs:
            announce(f"turning {what}")
            below, above = np.linspace(-reach, 0, half), np.linspace(0, min(reach, most), half)
            logs = np.unique([*below, *above])
            losses, slopes = sweep(dataclasses.replace(inner, learned=knob), lengths, logs, keys)
            mean, error = mean_and_error(slopes)
            found = {"logs": logs, "losses": losses.mean(0), "slopes": mean, "errors": error}
            turned[what], rows[what] = (logs, slopes), _rest_rows(lengths, **found)
            numbers[what] = jax.tree.map(np.ndarray.tolist, found)
            report.table(f"{what}, times a factor", rows[what])
        announce("the whole gradient, one truncation after the other")
        gradients = _gradient_rows(inner, theta, lengths, keys)
    report.table(f"Gradient by all of theta ({ravel_pytree(theta)[0].size:,} weights)", gradients)
    within = _shortest(gradients, "bias", settings.tolerance)
    report.text(
        f"The bias of the gradient falls below {settings.tolerance:.0%} of its norm at a "
        f"truncation of {within}."
    )
    report.text(verdict(rows, settings.tolerance))
    draw, caption = partial(_draw, turned=turned, gradients=gradients), "Dots: where descent rests."
    report.figure("horizon", draw, caption=caption, **numbers)
    return report


def _knobs(inner: InnerTraining, theta: Theta) -> list[tuple[str, Knob, float]]:
    """Returns what is multiplied, in words, a knob for it, and the log of its largest factor."""
    learned = inner.learned
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    if not isinstance(learned, Learnable) or len(leaves) > MOST_KNOBS:
        return [("update scale", Knob(learned, theta), np.inf)]
    forms = {name: form for name, _, form in learned.initial}
    knobs = []
    for path, leaf in leaves:
        words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        # Constants of schedules other than values have logarithms of their own.
        own = words[-1] in ("power", "factor", "time_constant")
        form, name = "log" if own else forms[words[0]], ".".join(words)
        named = {"log": name, "log_one_minus": f"1 - {name}", "identity": f"exp({name})"}[form]
        # One minus a decay is at most one.
        most = float(-jnp.max(leaf)) if form == "log_one_minus" else np.inf
        direction = jax.tree_util.tree_map_with_path(
            lambda where, x, path=path: jnp.full_like(x, where == path), theta
        )
        knobs.append((named, Knob(learned, theta, direction), most))
    return knobs


def sweep(
    inner: InnerTraining, lengths: tuple[int, ...], logs: np.ndarray, keys: Keys
) -> tuple[np.ndarray, np.ndarray]:
    """Turns a knob, the learned optimizer of `inner`, to the logarithms of some factors.

    Returns the meta-loss of the whole episode, by episode and position; and its derivative by the
    logarithm of the factor as each truncation sees it, by episode, position and truncation.
    """

    def run(sweep: TruncationSweep, item: tuple[Scalar, Key]) -> tuple[Array, Array]:
        def record(step: Any) -> tuple[Array, Array]:
            return step.loss, step.estimator_state.slopes

        place, key = item
        return mean_estimate((sweep, place), key, inner.horizon // lengths[0], record)

    shape = (len(keys), len(logs))
    places = np.tile(logs, len(keys)).astype(inner.learned.init(keys[0]).dtype)
    program = OverDevices(run, TruncationSweep(inner, lengths), min(len(places), 32))
    losses, slopes = program((places, keys[np.repeat(np.arange(len(keys)), len(logs))]))
    return losses.astype(float).reshape(shape), slopes.astype(float).reshape(*shape, len(lengths))


def resting(logs: np.ndarray, slopes: np.ndarray) -> tuple[float, str]:
    """Returns the factor at which descent along slopes comes to rest, from where the knob stands.

    And "inside", or "below" or "above" if that is beyond the positions tried, or "nowhere" for a
    truncation that sees nothing of the knob, or "diverged" where there is no slope to begin with.
    """
    i = int(np.argmin(np.abs(logs)))
    if not np.isfinite(slopes[i]) or not np.any(np.nan_to_num(slopes)):
        return np.nan, "nowhere" if np.isfinite(slopes[i]) else "diverged"
    way = -1 if slopes[i] > 0 else 1
    while 0 <= i + way < len(logs) and np.isfinite(slopes[i + way]):
        here, there = slopes[i], slopes[i + way]
        if here * there <= 0:
            share = here / (here - there) if here != there else 0.0
            return float(np.exp(logs[i] + share * (logs[i + way] - logs[i]))), "inside"
        i += way
    return float(np.exp(logs[i])), "below" if way < 0 else "above"


def _rest_rows(
    lengths: Sequence[int], logs: Any, losses: Any, slopes: Any, errors: Any
) -> list[dict[str, Any]]:
    here = int(np.argmin(np.abs(logs)))
    least = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    best, lowest, rows = float(np.exp(logs[least])), losses[least], []
    sure = np.abs(slopes[here]) > 2 * errors[here]
    wrong = (slopes[here] * slopes[here, -1] < 0) & sure & sure[-1]
    for i, length in enumerate(lengths):
        factor, where = resting(logs, slopes[:, i])
        there = float(np.interp(np.log(factor), logs, losses))
        slope = Measured(float(slopes[here, i]), float(errors[here, i]))
        excess = float(np.maximum(0.0, _ratio(there - lowest, abs(lowest))))
        seen = {"truncation": length, "slope": slope, "wrong sign": bool(wrong[i])}
        rest = {"rests at": factor, "where": where, "off by": factor / best}
        rows.append(seen | rest | {"meta-loss there": there, "excess": excess, "best": best})
    return rows


def _gradient_rows(
    inner: InnerTraining, theta: Theta, lengths: Sequence[int], keys: Keys
) -> list[dict[str, Any]]:
    found = []
    for length in lengths:
        sample = partial(mean_estimate, count=inner.horizon // length)
        estimator = TruncatedBackprop(inner, length, stagger=False)
        program = OverDevices(sample, (estimator, theta), len(keys))
        found.append((length, program, *mean_and_error(program(keys).astype(float))))
    true = found[-1][2]
    norm = np.linalg.norm(true)
    return [
        {
            "truncation": length,
            "bias": _ratio(np.linalg.norm(mean - true), norm),
            "cosine": _ratio(mean @ true, norm * np.linalg.norm(mean)),
            "noise": _ratio(np.linalg.norm(error), norm),
            "ms per estimate": 1e3 * program.seconds * length / inner.horizon / program.batch,
            "memory, MB": program.memory / program.batch / 1e6,
        }
        for length, program, mean, error in found
    ]


def _ratio(a: Any, b: Any) -> float:
    return float(a / b) if b > 0 else float("nan")


def _shortest(rows: Rows, column: str, tolerance: float) -> int:
    """Returns the truncation from which on a column is within the tolerance; the last if none."""
    beyond = [i for i, row in enumerate(rows) if not row[column] <= tolerance]
    return rows[min(max(beyond, default=-1) + 1, len(rows) - 1)]["truncation"]


def verdict(knobs: Mapping[str, Rows], tolerance: float) -> str:
    """Returns one sentence to act on, from the rows of each knob."""
    for name, rows in knobs.items():
        last, horizon = rows[-1], rows[-1]["truncation"]
        best = f"{last['best']:.3g}"
        if last["where"] == "diverged":
            return (
                f"Training diverges where {name} stands: the best factor tried is {best}; begin "
                "there and probe again."
            )
        if last["excess"] > tolerance:
            return (
                f"From where {name} stands, not even the gradient of all {horizon} steps leads to "
                f"its best (factor {best}; it rests with a meta-loss {last['excess']:.0%} higher): "
                "begin there, or smooth the way with lopt.PES."
            )
    enough = max(_shortest(rows, "excess", tolerance) for rows in knobs.values())
    every = [(name, row) for name, rows in knobs.items() for row in rows]
    name, row = max(every, key=lambda one: np.nan_to_num(one[1]["excess"]))
    if not row["excess"] > tolerance:
        return (
            f"Truncations down to {enough} of {horizon} inner steps cost at most {tolerance:.0%} "
            "of meta-loss: short ones are safe here."
        )
    off, beyond = row["off by"], "" if row["where"] == "inside" else "at least "
    way = f"{1 / off:.3g} times too small" if off < 1 else f"{off:.3g} times too large"
    remedy = f"use truncations of at least {enough} of its {horizon} inner steps"
    if enough == horizon:
        remedy = "only the whole horizon will do"
    return (
        f"A truncation of {row['truncation']} would make {name} {beyond}{way} and the meta-loss "
        f"{row['excess']:.0%} higher than it could be: {remedy}, or an estimator that is unbiased "
        "at any truncation, such as lopt.PES."
    )


def _draw(figure: Any, turned: Mapping[str, Any], gradients: Rows) -> None:
    lengths = [row["truncation"] for row in gradients]
    *each, axes = panels(figure, len(turned) + 1, len(turned) + 1, (4.6, 3.9))
    for own, (name, (logs, slopes)) in zip(each, turned.items(), strict=True):
        by_length = {f"{length}": slopes[..., i] for i, length in enumerate(lengths)}
        style: Any = {"title": f"{name}: slope of the meta-loss", "xlabel": "factor"}
        bands(own, by_length, steps=np.exp(logs), log="x", ordered=True, **style)
        means = slopes.mean(axis=0)
        for line, mean in zip(own.get_lines(), means.T, strict=True):
            rest, where = resting(logs, mean)
            if where == "inside":
                own.plot([rest], [0], "o", color=line.get_color(), mec="black", ms=7, zorder=3)
        top = np.nanquantile(np.abs(means), 0.85) or 1.0
        own.axhline(0, color="black", lw=0.8)
        own.set(ylim=(-top, top))
        own.get_legend().set_title("truncation")
    bias, cosine = ([row[column] for row in gradients[:-1]] for column in ("bias", "cosine"))
    axes.plot(lengths[:-1], bias, "o-", label="bias, all of theta")
    axes.plot(lengths[:-1], 1 - np.array(cosine), "s--", label="1 - cosine")
    finish(axes, log="xy", xlabel="truncation", title="against the whole gradient")
