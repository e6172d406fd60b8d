"""Probing estimators: bias, noise and cost of every one of them at one theta.

A sample of an estimator is its mean over a pair of whole episodes, 2 x horizon inner steps, window
by window where it has windows; both partners of an antithetic pair count. Samples are independent,
so that the variance over any budget of inner steps follows from theirs.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

import lopt.estimators as est
from lopt.core.devices import device_mesh, round_up, spread
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.inner import InnerTraining, MetaTask
from lopt.core.types import Key, Theta
from lopt.core.unroll import start, unroll
from lopt.experiment.probes.subject import default_truncation
from lopt.experiment.settings import ProbeSettings

# Differences below this, relative to the truth, are called rounding.
ROUNDING = 1e-4
SIGNIFICANT = 1e-3
# Of larger thetas the report has only the mean of the variances, so that it stays readable.
MOST_LISTED = 10_000


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one estimator; None where it cannot be said.

    Attributes:
        name: of the estimator.
        samples: how many were finite, and `dropped`, how many were not.
        bias: norm of (mean - truth) over the norm of the truth.
        bias_by_chance: what `bias` would be without any, from the noise of both.
        chance: the probability of a bias as large without any.
        along: the part of the mean along the truth, 1 without bias, and its standard error.
        variance: of a weight's gradient, mean over weights, for the budget.
        variances: that of each weight, for theta of at most `MOST_LISTED` weights.
        signal_to_noise: the squared norm of the mean, less chance, over the sum of the variances.
        seconds: per inner step, the median over calls.
        compile_seconds: before the first.
        memory: bytes of temporary arrays for the samples computed at once, on all devices.
        at_once: how many pairs of episodes these are.
    """

    name: str
    samples: int
    dropped: int
    bias: float | None
    bias_by_chance: float | None
    chance: float | None
    along: float | None
    along_error: float | None
    variance: float | None
    variances: tuple[float, ...] | None
    signal_to_noise: float | None
    seconds: float
    compile_seconds: float
    memory: int | None
    at_once: float

    @property
    def biased(self) -> bool | None:
        """Whether the bias is more than chance."""
        return None if self.chance is None else self.chance < SIGNIFICANT


@dataclasses.dataclass(frozen=True)
class EstimatorProbe:
    """All rows, for a budget of inner steps.

    Attributes:
        rows: one per estimator.
        weights: of theta.
        budget: inner steps that variance and signal-to-noise are given for.
        truth_norm: the norm of the true gradient; None if full backpropagation is too noisy.
        truth_error: its standard error, relative to that norm.
        truth_dropped: how many of its samples were not finite; with any of these it is no truth.
    """

    rows: tuple[Row, ...]
    weights: int
    budget: int
    truth_norm: float | None
    truth_error: float | None
    truth_dropped: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """An estimator; how many estimates are a sample, and of how many pairs of episodes.

    Of one that gives no gradient, but a direction of a scale of its own, only the cost is measured.
    """

    name: str
    estimator: AbstractGradientEstimator
    estimates: int
    pairs: float = 1.0
    gradient: bool = True


def entries(inner: InnerTraining, settings: ProbeSettings, weights: int) -> list[Entry]:
    """Returns all estimators, full backpropagation first.

    Raises:
        ValueError: if a setting does not fit the horizon.
    """
    sigma = settings.sigma
    window = settings.truncation or default_truncation(inner.horizon)
    number = None if weights <= settings.exact_below else settings.directions
    along = "all" if number is None else number
    full, es = MetaTask(inner), est.ES(inner, sigma)
    smooth = est.Reparameterized(full, sigma)
    online = est.OnlineForwardMode(inner, window, number, stagger=False)
    windows = inner.horizon // window
    noisy: dict[str, Any] = {
        "TruncatedES": est.TruncatedES(inner, window, sigma, False),
        "PES": est.PES(inner, window, sigma, False),
        "GPES, two windows": est.GPES(inner, window, 2 * window, sigma, False),
        "NRES": est.NRES(inner, window, sigma, False),
    }
    half = settings.particles // 2
    return [
        Entry("full backprop", full, 2),
        Entry("TruncatedBackprop", est.TruncatedBackprop(inner, window, False), 2 * windows),
        Entry(f"ForwardMode ({along})", est.ForwardMode(inner, number), 2),
        Entry(f"OnlineForwardMode ({along})", online, 2 * windows),
        Entry("Reparameterized", smooth, 1),
        Entry("ES", es, 1),
        Entry("ES, one arm", est.ES(inner, sigma, antithetic=False), 2),
        # Its first baseline takes an episode of its own.
        Entry("PolicyGradient", est.PolicyGradient(inner, sigma), 2, 1.5),
        *(Entry(name, estimator, windows) for name, estimator in noisy.items()),
        Entry("InverseVariance", est.InverseVariance(es, smooth, half), 1, float(2 * half)),
        Entry("RankedES", est.RankedES(es, half), 1, float(half), gradient=False),
        # Theta itself is the first of its candidates.
        Entry("RandomSearch", est.RandomSearch(inner, 2 * half - 1, sigma), 1, float(half), False),
    ]


def probe_estimators(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    settings: ProbeSettings | None = None,
    only: Sequence[str] = (),
    advance: Callable[[str], None] = lambda doing: None,
) -> EstimatorProbe:
    """Measures every estimator at theta.

    Args:
        inner: what is measured.
        theta: where.
        key: of everything random.
        settings: windows, perturbation, numbers of samples.
        only: names of estimators, or their beginnings; all that give a gradient by default. Full
            backpropagation, the truth, is always there.
        advance: called with a few words about what is done next.

    Raises:
        ValueError: if a setting does not fit the horizon, or there is no such estimator.
    """
    settings = settings or ProbeSettings()
    weights = ravel_pytree(theta)[0].size
    if not weights:
        raise ValueError("Theta has no weights: there is no gradient to probe.")
    listed = entries(inner, settings, weights)
    for name in only:
        if not any(entry.name.startswith(name) for entry in listed):
            known = "; ".join(entry.name for entry in listed)
            raise ValueError(f"There is no estimator {name!r} to probe; there are: {known}.")
    if only:
        listed = [listed[0], *(e for e in listed[1:] if e.name.startswith(tuple(only)))]
    else:
        listed = [entry for entry in listed if entry.gradient]
    # XLA compiles one program on one core: two at a time keep two cores busy.
    with ThreadPoolExecutor(2) as pool:
        programs = [_Program.of(entry, theta, settings.at_once, pool) for entry in listed]
        for entry, program in zip(listed, programs, strict=True):
            advance(f"compiling {entry.name}")
            program.compiled.result()
    measured = []
    truth = np.zeros((0, weights))
    for i, (entry, program) in enumerate(zip(listed, programs, strict=True)):
        advance(f"measuring {entry.name}")
        count = max(2, round(settings.samples / entry.pairs))
        samples, seconds = program(jax.random.fold_in(key, i), count)
        if i == 0:
            truth = program(jax.random.fold_in(key, len(listed)), 2 * settings.samples)[0]
        measured.append((entry, samples, program.cost(seconds, 2 * inner.horizon * entry.pairs)))
    reference = _Moments.of(truth)
    trusted = reference.mean @ reference.mean > 4 * reference.noise and reference.dropped == 0
    budget = 2 * inner.horizon * settings.particles
    rows = tuple(
        _row(entry, samples, cost, reference if trusted else None, settings.particles)
        for entry, samples, cost in measured
    )
    dropped = reference.dropped
    if not trusted:
        return EstimatorProbe(rows, weights, budget, None, None, dropped)
    norm = float(np.sqrt(reference.mean @ reference.mean))
    error = float(reference.noise**0.5) / norm
    return EstimatorProbe(rows, weights, budget, norm, error, dropped)


@dataclasses.dataclass(frozen=True)
class _Moments:
    mean: np.ndarray
    deviations: np.ndarray  # scaled so that deviations.T @ deviations is the covariance of the mean
    count: int
    dropped: int

    @classmethod
    def of(cls, samples: np.ndarray) -> "_Moments":
        finite = np.isfinite(samples).all(axis=1)
        kept = samples[finite].astype(float)
        count = len(kept)
        if count < 2:
            nothing = np.full(samples.shape[1], np.nan)
            return cls(nothing, np.full((1, samples.shape[1]), np.nan), count, len(samples) - count)
        mean = kept.mean(axis=0)
        deviations = (kept - mean) / (count * (count - 1)) ** 0.5
        return cls(mean, deviations, count, len(samples) - count)

    @property
    def noise(self) -> float:
        """The sum of the variances of the mean."""
        return float(np.sum(self.deviations**2))


def _row(
    entry: Entry,
    samples: np.ndarray,
    cost: dict[str, Any],
    truth: _Moments | None,
    particles: int,
) -> Row:
    own = _Moments.of(samples)
    budgets = own.count * entry.pairs / particles
    total = own.noise * budgets
    known = own.count > 1 and entry.gradient
    signal = max(0.0, float(own.mean @ own.mean) - own.noise)
    bias = by_chance = chance = along = along_error = None
    if truth is not None and known:
        square = float(truth.mean @ truth.mean)
        difference = own.mean - truth.mean
        both = np.concatenate([own.deviations, truth.deviations])
        rounding = ROUNDING**2 * square
        noise = float(np.sum(both**2)) + rounding
        noise_squared = float(np.sum((both @ both.T) ** 2)) + rounding**2
        # |difference|^2 is, without bias, about chi-square scaled to its first two moments.
        freedom = noise**2 / noise_squared
        statistic = freedom * float(difference @ difference) / noise
        with jax.numpy_dtype_promotion("standard"):
            chance = float(jax.scipy.special.gammaincc(freedom / 2, statistic / 2))
        bias = float(difference @ difference / square) ** 0.5
        by_chance = (noise / square) ** 0.5
        along = float(own.mean @ truth.mean) / square
        along_error = float(np.sum((both @ truth.mean) ** 2)) ** 0.5 / square
    return Row(
        name=entry.name,
        samples=own.count,
        dropped=own.dropped,
        bias=bias,
        bias_by_chance=by_chance,
        chance=chance,
        along=along,
        along_error=along_error,
        variance=total / samples.shape[1] if known else None,
        variances=_listed(own, budgets) if known else None,
        signal_to_noise=signal / total if known and total > 0 else None,
        **cost,
    )


def _listed(own: _Moments, budgets: float) -> tuple[float, ...] | None:
    variances = np.sum(own.deviations**2, axis=0) * budgets
    # Four digits: more would say nothing, and fill megabytes.
    return tuple(float(f"{v:.3e}") for v in variances) if len(variances) <= MOST_LISTED else None


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled function that takes a batch of samples, spread over the devices."""

    pairs: float
    batch: int
    arguments: Any
    compiled: Future[tuple[Any, float]]

    @classmethod
    def of(cls, entry: Entry, theta: Theta, at_once: int, pool: ThreadPoolExecutor) -> "_Program":
        arrays, static = eqx.partition(entry.estimator, eqx.is_array)

        def sample(arrays: Any, theta: Theta, key: Key) -> Float[Array, " weight"]:
            estimator = eqx.combine(arrays, static)
            # Theta stays where it is: what is measured are estimates of one meta-gradient.
            begin = start(estimator, optax.set_to_zero(), theta, key)
            _, grads = unroll(
                estimator,
                optax.set_to_zero(),
                begin,
                entry.estimates,
                record=lambda step: ravel_pytree(step.grads)[0],
            )
            return grads.mean(0)

        mesh = device_mesh()
        batch = round_up(max(1, round(at_once / entry.pairs)), mesh.size)
        arguments = jax.device_put((arrays, theta), NamedSharding(mesh, PartitionSpec()))
        began = time.perf_counter()
        lowered = jax.jit(jax.vmap(sample, (None, None, 0))).lower(
            *arguments, spread(jax.random.split(jax.random.key(0), batch), mesh)
        )
        traced = time.perf_counter() - began

        def compile_it() -> tuple[Any, float]:
            began = time.perf_counter()
            return lowered.compile(), traced + time.perf_counter() - began

        return cls(entry.pairs, batch, arguments, pool.submit(compile_it))

    def __call__(self, key: Key, count: int) -> tuple[np.ndarray, list[float]]:
        """Returns at least `count` samples, and the seconds that each call took."""
        compiled, results, seconds = self.compiled.result()[0], [], []
        mesh = device_mesh()
        for i in range(-(-count // self.batch)):
            keys = spread(jax.random.split(jax.random.fold_in(key, i), self.batch), mesh)
            began = time.perf_counter()
            results.append(np.asarray(jax.block_until_ready(compiled(*self.arguments, keys))))
            seconds.append(time.perf_counter() - began)
        return np.concatenate(results), seconds

    def cost(self, seconds: list[float], steps: float) -> dict[str, Any]:
        compiled, compile_seconds = self.compiled.result()
        analysis = compiled.memory_analysis()
        memory = None if analysis is None else int(analysis.temp_size_in_bytes) * device_mesh().size
        return {
            "seconds": float(np.median(seconds)) / (steps * self.batch),
            "compile_seconds": compile_seconds,
            "memory": memory,
            "at_once": self.batch * self.pairs,
        }
