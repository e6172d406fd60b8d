"""Probing estimators: bias, noise and cost of every one of them at one theta.

A sample of an estimator is its mean over a pair of whole episodes, 2 x horizon inner steps, window
by window where it has windows; both partners of an antithetic pair count. Samples are independent,
so that the variance over any budget of inner steps follows from theirs.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy import stats

import lopt.estimators as est
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.inner import InnerTraining, MetaTask
from lopt.core.types import Key, Theta
from lopt.experiment.probes.subject import Subject, subject
from lopt.experiment.report import Measured, Report, finish, panels, stages
from lopt.experiment.settings import ProbeSettings
from lopt.experiment.trainings import OverDevices, mean_estimate

# Differences below this, relative to the truth, are called rounding.
ROUNDING = 1e-4
SIGNIFICANT = 1e-3
# Of larger thetas the report has only the mean of the variances, so that it stays readable.
MOST_LISTED = 10_000


def probe_estimators(name: str, settings: ProbeSettings, of: Subject | None = None) -> Report:
    """Measures bias, noise and cost of the estimators of what has a name, or is given."""
    inner, theta = of or subject(name, settings)
    weights = ravel_pytree(theta)[0].size
    if not weights:
        raise ValueError("Theta has no weights: there is no gradient to probe.")
    window = settings.truncation or default_truncation(inner.horizon)
    settings = dataclasses.replace(settings, horizon=inner.horizon, truncation=window)
    entries = _entries(inner, settings, window, weights)
    key, slices_key = jax.random.split(jax.random.key(settings.seed))
    rows: list[dict[str, Any]] = []
    variances = {}
    with stages("probing", len(entries) + 3) as announce:
        announce("compiling")
        programs = []
        for entry in entries:
            sample = partial(mean_estimate, count=entry.estimates)
            size = max(1, round(settings.at_once / entry.pairs))
            programs.append(OverDevices(sample, (entry.estimator, theta), size))
            programs[-1].trace(jax.random.split(key, size))
        # XLA compiles one program on one core: two at a time keep two cores busy.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(OverDevices.compile, programs))
        announce("measuring the truth")
        truth_key = jax.random.fold_in(key, len(entries))
        count = 2 * max(1, round(settings.samples / entries[0].pairs))
        truth = _Moments.of(programs[0](jax.random.split(truth_key, count)))
        square = float(truth.mean @ truth.mean)
        trusted = square > 4 * truth.noise and not truth.dropped
        for i, (entry, program) in enumerate(zip(entries, programs, strict=True)):
            announce(f"measuring {entry.name}")
            count = max(2, round(settings.samples / entry.pairs))
            own = _Moments.of(program(jax.random.split(jax.random.fold_in(key, i), count)))
            known = own.size > 1 and entry.gradient
            each = np.sum(own.deviations**2, axis=0) * own.size * entry.pairs / settings.particles
            if known and weights <= MOST_LISTED:
                # Four digits: more would say nothing, and fill megabytes.
                variances[entry.name] = [float(f"{value:.3e}") for value in each]
            signal = max(0.0, float(own.mean @ own.mean) - own.noise)
            pairs = program.batch * entry.pairs
            row = {"estimator": entry.name, **_bias(own, truth if known and trusted else None)}
            row["variance"] = float(each.mean()) if known else None
            row["S/N"] = signal / float(each.sum()) if known and each.any() else None
            row["µs/step"] = 1e6 * program.seconds / (2 * inner.horizon * pairs)
            row |= {"MiB": program.memory / 2**20, "samples": own.size, "dropped": own.dropped}
            rows.append(row | {"compile s": program.compile_seconds, "at once": pairs})
        announce("slices of the meta-loss")
        shown = dataclasses.replace(inner, tasks=inner.tasks.architectures()[0])
        slices = loss_slices(shown, theta, slices_key, (window, inner.horizon, 3 * inner.horizon))
    said = f"not finite in {truth.dropped} of its samples" if truth.dropped else "too noisy"
    said = f"Full backpropagation is {said}: it is no truth here, so no bias is given."
    steps = 2 * inner.horizon * settings.particles
    report = Report(f"Meta-gradients of {name}", {"name": name, **dataclasses.asdict(settings)})
    report.data |= {"weights": weights, "budget_of_inner_steps": steps}
    report.data |= {"truth_dropped": truth.dropped, "variances": variances}
    if trusted:
        norm, error = square**0.5, (truth.noise / square) ** 0.5
        report.data |= {"truth_norm": norm, "truth_relative_standard_error": error}
        said = (
            f"Truth: full backpropagation, norm {norm:.3g}, standard error {error:.1%}. Bias: "
            "|mean - truth| / |truth|; by chance: that of an estimator without any."
        )
    budget = f"{weights:,} weights, {steps:,} inner steps each"
    report.table(f"Estimators at {budget}", rows)
    report.text(
        f"{said} Variance: of one weight, mean over weights. S/N: |mean|^2 over the sum of "
        "variances. MiB: of temporary memory."
    )
    report.figure("estimators", lambda figure: _draw_rows(figure, rows), (13.0, 5.4), budget)
    draw, numbers = partial(_draw_slices, **slices), jax.tree.map(np.ndarray.tolist, slices)
    caption = "The meta-loss of one episode around theta."
    report.figure("slices", draw, caption=caption, **numbers)
    return report


def default_truncation(horizon: int) -> int:
    """Returns the largest divisor of the horizon that is at most a quarter of it."""
    return max((d for d in range(1, horizon // 4 + 1) if horizon % d == 0), default=1)


class _Entry(NamedTuple):
    """An estimator; how many estimates are a sample, and of how many pairs of episodes.

    Of one that gives no gradient, but a direction of a scale of its own, only the cost is measured.
    """

    name: str
    estimator: AbstractGradientEstimator
    estimates: int
    pairs: float = 1.0
    gradient: bool = True


def _entries(
    inner: InnerTraining, settings: ProbeSettings, window: int, weights: int
) -> list[_Entry]:
    sigma, only = settings.sigma, settings.only
    number = None if weights <= settings.exact_below else settings.directions
    full, es = MetaTask(inner), est.ES(inner, sigma)
    smooth = est.Reparameterized(full, sigma)
    online = est.OnlineForwardMode(inner, window, number, stagger=False)
    gpes = est.GPES(inner, window, 2 * window, sigma, False)
    windows, half = inner.horizon // window, settings.particles // 2
    listed = [
        _Entry("full backprop", full, 2),
        _Entry("TruncatedBackprop", est.TruncatedBackprop(inner, window, False), 2 * windows),
        _Entry(f"ForwardMode ({number or 'all'})", est.ForwardMode(inner, number), 2),
        _Entry(f"OnlineForwardMode ({number or 'all'})", online, 2 * windows),
        _Entry("Reparameterized", smooth, 1),
        _Entry("ES", es, 1),
        _Entry("ES, one arm", est.ES(inner, sigma, antithetic=False), 2),
        # Its first baseline takes an episode of its own.
        _Entry("PolicyGradient", est.PolicyGradient(inner, sigma), 2, 1.5),
        _Entry("TruncatedES", est.TruncatedES(inner, window, sigma, False), windows),
        _Entry("PES", est.PES(inner, window, sigma, False), windows),
        _Entry("GPES, two windows", gpes, windows),
        _Entry("NRES", est.NRES(inner, window, sigma, False), windows),
        _Entry("InverseVariance", est.InverseVariance(es, smooth, half), 1, 2.0 * half),
        _Entry("RankedES", est.RankedES(es, half), 1, float(half), gradient=False),
        # Theta itself is the first of its candidates.
        _Entry("RandomSearch", est.RandomSearch(inner, 2 * half - 1, sigma), 1, float(half), False),
    ]
    for name in only:
        if not any(entry.name.startswith(name) for entry in listed):
            known = "; ".join(entry.name for entry in listed)
            raise ValueError(f"There is no estimator {name!r} to probe; there are: {known}.")
    chosen = [e for e in listed[1:] if (e.name.startswith(only) if only else e.gradient)]
    chosen, kinds = [listed[0], *chosen], len(inner.tasks.architectures())
    if kinds == 1:
        return chosen
    # A sample is of a task of each architecture.
    means = [e._replace(estimator=est.Mean(e.estimator, kinds)) for e in chosen]
    return [e._replace(pairs=kinds * e.pairs) for e in means]


class _Moments(NamedTuple):
    """The mean of the finite samples and its noise; how many these are, and how many others."""

    mean: np.ndarray
    deviations: np.ndarray  # scaled so that deviations.T @ deviations is the covariance of the mean
    noise: float  # the sum of the variances of the mean
    size: int
    dropped: int

    @classmethod
    def of(cls, samples: np.ndarray) -> "_Moments":
        finite = samples[np.isfinite(samples).all(axis=1)].astype(float)
        count = len(finite)
        if count < 2:
            finite = np.full((2, samples.shape[1]), np.nan)
        mean = finite.mean(axis=0)
        deviations = (finite - mean) / (len(finite) * (len(finite) - 1)) ** 0.5
        return cls(mean, deviations, float(np.sum(deviations**2)), count, len(samples) - count)


def _bias(own: _Moments, truth: _Moments | None) -> dict[str, Any]:
    if truth is None:
        return dict.fromkeys(("bias", "by chance", "biased", "along truth", "p-value"))
    square = float(truth.mean @ truth.mean)
    difference = own.mean - truth.mean
    both = np.concatenate([own.deviations, truth.deviations])
    noise = own.noise + truth.noise + ROUNDING**2 * square
    # |difference|^2 is, without bias, about chi-square scaled to its first two moments.
    freedom = noise**2 / float(np.sum((both @ both.T) ** 2) + (ROUNDING**2 * square) ** 2)
    chance = float(stats.chi2.sf(freedom * float(difference @ difference) / noise, freedom))
    along_error = float(np.linalg.norm(both @ truth.mean)) / square
    return {
        "bias": float(np.linalg.norm(difference)) / square**0.5,
        "by chance": (noise / square) ** 0.5,
        "biased": chance < SIGNIFICANT,
        "along truth": Measured(float(own.mean @ truth.mean) / square, along_error),
        "p-value": chance,
    }


def loss_slices(
    inner: InnerTraining, theta: Theta, key: Key, lengths: Sequence[int]
) -> dict[str, Any]:
    """Computes the meta-loss of one episode of some lengths along random directions from theta.

    Directions have the norm of theta (or 1, if it is zero) and are orthogonal; distances along
    them, in such norms, go from -1 to 1. There are no surfaces if theta has but one weight.
    """
    ends = np.unique(lengths)
    direction_key, episode_key = jax.random.split(key)
    flat, unravel = ravel_pytree(theta)
    drawn = jax.random.normal(direction_key, (flat.size, min(2, flat.size)), flat.dtype)
    norm = jnp.linalg.norm(flat)
    directions = jnp.linalg.qr(drawn)[0].T * jnp.where(norm > 0, norm, 1)

    def losses(shared: Any, place: Float[Array, " axis"]) -> Float[Array, " length"]:
        inner, flat = shared
        theta = unravel(flat + place @ directions)
        runs = [(inner.begin(theta, episode_key, jnp.asarray(n)), int(n)) for n in ends]
        return jnp.stack([inner.advance(theta, run, n)[0].mean() for run, n in runs])

    program = OverDevices(losses, (inner, flat), 64)

    def at(places: np.ndarray) -> np.ndarray:
        found = program(places.astype(flat.dtype)).astype(float).T
        # Beyond 1e30 a run has diverged as well, and axes overflow.
        return np.where(np.abs(found) < 1e30, found, np.nan)

    line, plane, surfaces = np.linspace(-1, 1, 101), np.linspace(-1, 1, 21), None
    on_line = at(np.pad(line[:, None], ((0, 0), (0, len(directions) - 1))))
    if len(directions) == 2:
        places = np.stack(np.meshgrid(plane, plane), axis=-1).reshape(-1, 2)
        surfaces = at(places).reshape(len(ends), len(plane), len(plane))
    return {"lengths": ends, "line": line, "losses": on_line, "plane": plane, "surfaces": surfaces}


def _draw_rows(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = np.arange(len(rows))[::-1]
    biased = np.array([bool(row["biased"]) for row in rows])
    columns = ("bias", "variance", "S/N", "µs/step", "MiB")
    for axes, column in zip(figure.subplots(1, 5, sharey=True), columns, strict=True):
        names = (column, "by chance")
        values, chance = np.array([[row[n] or np.nan for row in rows] for n in names], float)
        axes.plot(np.where(biased, np.nan, values), places, "o", label="not found biased")
        axes.plot(np.where(biased, values, np.nan), places, "o", color="#d62728", label="biased")
        if column == "bias":
            axes.plot(chance, places, "|", ms=16, color="#999999", label="by chance", zorder=1)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        finish(axes, log="x", legend=False, title=column)
        low, high = axes.get_xlim()
        axes.set_xlim(low / 4, high * 4)  # more than a decade, so that a power of ten is in it
        axes.xaxis.set_minor_formatter("")
    axes.set_yticks(places, [row["estimator"] for row in rows])


def _draw_slices(
    figure: Any, lengths: Any, line: Any, losses: Any, plane: Any, surfaces: Any
) -> None:
    first, *planes = panels(figure, 1 if surfaces is None else 3, size=(4.4, 4.2))
    for length, values in zip(lengths, losses, strict=True):
        first.plot(line, values, label=f"{length} steps", lw=1.6)
    along = "along one direction [norms of theta]"
    finish(first, log=not (losses <= 0).any(), xlabel=along, ylabel="meta-loss")
    for axes, i in zip(planes, (0, -1), strict=False):
        norm = "log" if 0 < np.nanmin(surfaces[i], initial=np.inf) < np.inf else None
        mesh = axes.pcolormesh(plane, plane, surfaces[i], norm=norm)
        figure.colorbar(mesh, ax=axes, label="meta-loss")
        axes.plot(0, 0, "w+", ms=10)
        axes.set_facecolor("#dddddd")  # where the loss is not finite
        axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
        axes.set_title(f"two random directions, {lengths[i]} steps", fontsize=10)
