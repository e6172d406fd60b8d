"""Combinations of estimators: the mean over particles, weighted sums, inverse-variance mixes."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from lopt.core.checks import check_integer
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params, State
from lopt.estimators.checks import check_estimator, is_real
from lopt.estimators.truncation import restart_together

AXIS = "particles"


class Mean(AbstractGradientEstimator):
    """The mean of `num` independent particles of one estimator.

    Attributes:
        one: the estimator of each particle.
        num: the number of particles.
        at_once: particles computed side by side; a divisor of `num`, all of them by default. Fewer
            at once take less memory, and may be faster when they fit into a processor's cache.
    """

    one: AbstractGradientEstimator
    num: int = eqx.field(static=True)
    at_once: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        check_estimator("Mean", "one", self.one)
        check_integer("Mean", "num", self.num)
        if self.at_once is None:
            return
        check_integer("Mean", "at_once", self.at_once, hint=1)
        if self.num % self.at_once:
            raise ValueError(f"Mean(at_once={self.at_once}) must divide num={self.num}; try 1.")

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the particles' states, stacked."""
        keys = jax.random.split(key, self.num)
        return self._spread(jax.vmap(self.one.prepare, (None, 0))(params, self._spread(keys)))

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the mean estimate, and the particles' next states."""
        keys = jax.random.split(key, self.num)
        state, keys = self._spread((state, keys))

        def estimate(each: tuple[State, Key]) -> tuple[Estimate, State]:
            return self.one.estimate(params, *each)

        if self.num == 1 or self.at_once == 1:
            # An axis of length one, as `vmap` has it, costs products of recurrent rules a third.
            estimates, state = jax.lax.map(estimate, (state, keys))
        elif self.at_once is None:
            estimates, state = jax.vmap(estimate)((state, keys))
        else:
            estimates, state = jax.lax.map(estimate, (state, keys), batch_size=self.at_once)
        return _mean_of_finite(estimates), self._spread(state)

    def _spread(self, particles: Any) -> Any:
        devices = dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)
        if devices == 1 or self.at_once is not None:
            return particles
        if self.num % devices:
            raise ValueError(
                f"Mean(num={self.num}) cannot be spread evenly over {devices} devices; "
                "use the mesh of lopt.particle_mesh(estimator)."
            )
        return jax.lax.with_sharding_constraint(particles, PartitionSpec(AXIS))


class Sum(AbstractGradientEstimator):
    """A weighted sum of estimators: of loss and gradient both.

    With a `Mean` for each of several families, one outer step trains on all of them; each
    architecture is compiled once. Terms draw from keys of their own. A term whose loss or gradient
    is not finite is left out, and counted in `Estimate.dropped` as one particle at least; the loss
    is not a number only if none is left.

    Attributes:
        terms: the estimators, a tuple.
        weights: one for each, a tuple; all one by default.
    """

    terms: tuple[AbstractGradientEstimator, ...]
    weights: tuple[float, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not self.terms:
            raise ValueError("Sum(terms=...) must be a tuple of at least one estimator.")
        for term in self.terms:
            check_estimator("Sum", "terms", term)
        weights = self._weights()
        fine = isinstance(weights, tuple) and len(weights) == len(self.terms)
        if not fine or not all(is_real(weight) and math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"Sum(weights={self.weights!r}) must be a tuple of {len(self.terms)} finite "
                "numbers, one for each of its terms."
            )

    def _weights(self) -> tuple[float, ...]:
        return (1.0,) * len(self.terms) if self.weights is None else self.weights

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the terms' states."""
        keys = jax.random.split(key, len(self.terms))
        return tuple(term.prepare(params, k) for term, k in zip(self.terms, keys, strict=True))

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the weighted sum of the terms' estimates."""
        keys = jax.random.split(key, len(self.terms))
        estimates, states = zip(
            *(
                term.estimate(params, old, k)
                for term, old, k in zip(self.terms, state, keys, strict=True)
            ),
            strict=True,
        )

        each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_counted, estimates))
        finite = _finite(each)

        def weighted(leaf: Array) -> Array:
            weights = jnp.asarray(self._weights(), leaf.dtype)
            return (_along(weights, leaf) * jnp.where(_along(finite, leaf), leaf, 0)).sum(0)

        loss = jnp.where(finite.any(), weighted(each.loss), jnp.nan)
        dropped = jnp.where(finite, each.dropped, jnp.maximum(each.dropped, 1))
        return Estimate(loss, jax.tree.map(weighted, each.grads), _total(dropped)), states


class InverseVariance(AbstractGradientEstimator):
    """Two estimators of one gradient, mixed weight by weight by their inverse variances.

    Over `num` particles, with means m and unbiased variances v + 1e-8 of either estimator, each
    weight's gradient is (m_a / v_a + m_b / v_b) / (1 / v_a + 1 / v_b). Both see the same keys:
    `ES` and `Reparameterized`, or `TruncatedES` and `Reparameterized(TruncatedBackprop)`, then use
    the same antithetic pairs on the same episodes, which restart together if one of them breaks.
    The weights come from the samples that they weigh, which biases the mix a little.

    What shares its noise has correlated errors, and those can make this mix up to 1.5 times as
    noisy as the better of the two. With `covariance`, the shares are those of least variance among
    all from 0 to 1, a's being (v_b - c) / (v_a + v_b - 2 c) with the covariance c of the two over
    the particles that are finite in both; without correlation, they are those above. That takes
    many particles, a hundred or more: from few of heavy tails, a covariance is a guess.

    Mean and variance of each estimator are over those of its particles that are finite. With fewer
    than two of these it has no variance, and the other counts alone; if both have fewer, the
    gradient is zero. The loss is the mean over all that is finite. `Estimate.dropped` counts the
    particles of which neither half was used.

    The published clip of +-0.1 is an outer transformation: `optax.clip(0.1)`.

    Attributes:
        one, other: the two estimators of each particle.
        num: the number of particles, at least 2.
        covariance: whether shares take into account that the errors of the two are correlated.

    Reference: Metz et al. 2019, arXiv:1810.10180, section 4.2.
    """

    one: AbstractGradientEstimator
    other: AbstractGradientEstimator
    num: int = eqx.field(static=True)
    covariance: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_estimator("InverseVariance", "one", self.one)
        check_estimator("InverseVariance", "other", self.other)
        check_integer("InverseVariance", "num", self.num, 2)
        # Not every estimator has one; of two that have, the noise is to be the same.
        sigmas = [vars(each)["sigma"] for each in (self.one, self.other) if "sigma" in vars(each)]
        if len(set(sigmas)) > 1:
            raise ValueError(
                f"InverseVariance(one, other) smooths by sigma={sigmas[0]} and {sigmas[1]}, which "
                "are gradients of two different losses; give both the same sigma."
            )

    def prepare(self, params: Params, key: Key) -> State:
        """Returns both estimators' states, stacked."""
        keys = jax.random.split(key, self.num)
        prepare = jax.vmap(lambda k: (self.one.prepare(params, k), self.other.prepare(params, k)))
        return prepare(keys)

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the mix."""
        keys = jax.random.split(key, self.num)

        def both(states: State, key: Key) -> tuple[Any, State]:
            one, first = self.one.estimate(params, states[0], key)
            other, second = self.other.estimate(params, states[1], key)
            return (one, other), restart_together((first, second))

        (one, other), state = jax.vmap(both)(state, keys)
        fine = _finite(one), _finite(other)

        def mix(a: Array, b: Array) -> Array:
            (mean_a, spread_a), (mean_b, spread_b) = moments = [*map(_moments, fine, (a, b))]
            correlation = _correlation(fine[0] & fine[1], (a, b), moments) if self.covariance else 0
            # Zero where the spread of one is unknown; not a number where both are.
            ratio = jnp.minimum(spread_a, spread_b) / jnp.maximum(spread_a, spread_b)
            share = ratio * (ratio - correlation) / (1 + ratio**2 - 2 * ratio * correlation)
            # Of equal estimators, either will do.
            share = jnp.maximum(jnp.where(jnp.isnan(share), 0, share), 0)
            quiet, noisy = (
                jnp.where(spread_a < spread_b, *m) for m in ((mean_a, mean_b), (mean_b, mean_a))
            )
            return jnp.where(jnp.isnan(ratio), 0, (1 - share) * quiet + share * noisy)

        grads = jax.tree.map(mix, one.grads, other.grads)
        either = jnp.concatenate(fine)
        loss = _mean_where(either, jnp.concatenate([one.loss, other.loss]))
        used = jnp.stack([finite & (_total(finite) > 1) for finite in fine]).any(0)
        dropped = _total(~used) + _total(one.dropped) + _total(other.dropped)
        return Estimate(jnp.where(either.any(), loss, jnp.nan), grads, dropped), state


def _moments(finite: Bool[Array, " particle"], leaf: Array) -> tuple[Array, Array]:
    """Returns mean and standard deviation, (variance + 1e-8)^(1/2), over the finite particles.

    With fewer than two, the deviation is infinite; otherwise never, though squares may overflow.
    """
    kept = jnp.where(_along(finite, leaf), leaf, 0)
    # A quarter, as reciprocals of the largest numbers are so small that they count as zero.
    scale = 0.25 * jnp.maximum(jnp.abs(kept).max(0), 1e-4)
    scaled = 0.25 * kept / scale[None]
    mean = _mean_where(finite, scaled)
    number = _total(finite).astype(leaf.dtype)
    squares = _mean_where(finite, (scaled - mean[None]) ** 2)
    variance = squares * number / jnp.maximum(number - 1, 1)
    spread = jnp.hypot(scale * (4 * jnp.sqrt(variance)), 1e-4)
    largest = jnp.asarray(jnp.finfo(leaf.dtype).max, leaf.dtype)
    return scale * (4 * mean), jnp.where(number > 1, jnp.minimum(spread, largest), jnp.inf)


def _correlation(
    finite: Bool[Array, " particle"],
    leaves: tuple[Array, Array],
    moments: list[tuple[Array, Array]],
) -> Array:
    """Returns the correlation over the particles that are finite in both; zero with fewer than two.

    `moments` are mean and standard deviation of either, whatever particles they are from.
    """

    def standard(leaf: Array, mean: Array, spread: Array) -> Array:
        # Quarters, as the difference of two of the largest numbers overflows.
        kept = jnp.where(_along(finite, leaf), 0.25 * leaf - 0.25 * mean[None], 0)
        return 4 * (kept / spread[None])

    one, other = (standard(leaf, *each) for leaf, each in zip(leaves, moments, strict=True))
    number = jnp.maximum(_total(finite) - 1, 1).astype(one.dtype)
    return jnp.clip((one * other).sum(0) / number, -1, 1)


def _finite(estimates: Estimate) -> Bool[Array, " particle"]:
    """Returns which particles have a finite loss and gradient."""
    leaves = [estimates.loss, *jax.tree.leaves(estimates.grads)]
    axes = [tuple(range(1, leaf.ndim)) for leaf in leaves]
    fine = [jnp.isfinite(leaf).all(axis) for leaf, axis in zip(leaves, axes, strict=True)]
    return jnp.stack(fine).all(0)


def _along(each: Array, leaf: Array) -> Array:
    """Returns one value per particle in a shape that goes with `leaf`."""
    return each.reshape(-1, *(1,) * (leaf.ndim - 1))


def _mean_where(chosen: Bool[Array, " particle"], leaf: Array) -> Array:
    """Returns the mean over some particles; zero if there are none."""
    count = jnp.maximum(chosen.sum(dtype=jnp.int32), 1).astype(leaf.dtype)
    # Divided before they are added, as a sum may overflow where a mean does not.
    return (jnp.where(_along(chosen, leaf), leaf, 0) / count).sum(0)


def _total(counts: Any) -> Int[Array, ""]:
    return jnp.sum(jnp.asarray(counts), dtype=jnp.int32)


def _counted(estimate: Estimate) -> Estimate:
    """Returns the estimate with its count as an array, also where it is a number of Python's."""
    return Estimate(estimate.loss, estimate.grads, jnp.asarray(estimate.dropped, jnp.int32))


def _mean_of_finite(estimates: Estimate) -> Estimate:
    finite = _finite(estimates)
    mean = functools.partial(_mean_where, finite)
    grads, loss = jax.tree.map(mean, (estimates.grads, estimates.loss))
    loss = jnp.where(finite.any(), loss, jnp.nan)
    return Estimate(loss, grads, _total(~finite) + _total(estimates.dropped))


def particle_mesh(estimator: AbstractGradientEstimator) -> Mesh:
    """Returns a mesh of as many devices as the particles of `estimator` divide among evenly.

    On several accelerators particles then run side by side. On a CPU each core can be made a
    device, before JAX is first used, by `jax.config.update("jax_num_cpu_devices", 2)`: XLA runs
    small programs on one core, and more of them on more cores. `lopt train` does both.

        with jax.set_mesh(lopt.particle_mesh(meta)):
            state, losses = lopt.unroll(meta, optimizer, state, 100)
    """
    means = jax.tree.leaves(estimator, is_leaf=lambda node: isinstance(node, Mean))
    # Those computed a few at once are not spread: more devices would only repeat their work.
    spread = [mean for mean in means if isinstance(mean, Mean) and mean.at_once is None]
    numbers = [mean.num for mean in spread] or [1]
    devices = jax.local_devices()
    count = max(d for d in range(1, len(devices) + 1) if not any(num % d for num in numbers))
    return Mesh(np.array(devices[:count]), (AXIS,))
