"""Combinations of estimators: the mean over particles, weighted sums, inverse-variance mixes."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params, State

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
        if not isinstance(self.num, int) or self.num < 1:
            raise ValueError(f"Mean(num={self.num!r}) must be a positive integer; try 16.")
        if self.at_once is not None and (self.at_once < 1 or self.num % self.at_once):
            raise ValueError(f"Mean(at_once={self.at_once}) must divide num={self.num}.")

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

        if self.at_once is None:
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
    architecture is compiled once. Terms draw from keys of their own.

    Attributes:
        terms: the estimators.
        weights: one for each; all one by default.
    """

    terms: tuple[AbstractGradientEstimator, ...]
    weights: tuple[float, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not self.terms:
            raise ValueError("Sum(terms=()) needs at least one estimator.")
        weights = self._weights()
        if len(weights) != len(self.terms) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"Sum(weights={self.weights}) must be {len(self.terms)} finite numbers, one for "
                "each of its terms."
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

        def weighted(*leaves: Array) -> Array:
            terms = [w * leaf for w, leaf in zip(self._weights(), leaves, strict=True)]
            return functools.reduce(jnp.add, terms)

        loss = weighted(*(estimate.loss for estimate in estimates))
        grads = jax.tree.map(weighted, *(estimate.grads for estimate in estimates))
        return Estimate(loss, grads, sum(estimate.dropped for estimate in estimates)), states


class InverseVariance(AbstractGradientEstimator):
    """Two estimators of one gradient, mixed weight by weight by their inverse variances.

    Over `num` particles, with means m and unbiased variances v + 1e-8 of either estimator, each
    weight's gradient is (m_a / v_a + m_b / v_b) / (1 / v_a + 1 / v_b). Both see the same keys:
    `ES` and `Reparameterized` then use the same antithetic pairs on the same episodes. The weights
    come from the samples that they weigh, which biases the mix a little. Particles for which either
    is not finite are left out of both; fewer than two leave a gradient of zero.

    The published clip of +-0.1 is an outer transformation: `optax.clip(0.1)`.

    Attributes:
        one, other: the two estimators of each particle.
        num: the number of particles, at least 2.

    Reference: Metz et al. 2019, arXiv:1810.10180, section 4.2.
    """

    one: AbstractGradientEstimator
    other: AbstractGradientEstimator
    num: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not isinstance(self.num, int) or self.num < 2:
            raise ValueError(
                f"InverseVariance(num={self.num!r}) must be an integer of at least 2: variances "
                "are measured between particles; try 16."
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
            return (one, other), (first, second)

        (one, other), state = jax.vmap(both)(state, keys)
        finite = _finite(one) & _finite(other)
        count = finite.sum(dtype=jnp.int32)

        def moments(leaf: Array) -> tuple[Array, Array]:
            mean, number = _mean_where(finite, leaf), count.astype(leaf.dtype)
            variance = _mean_where(finite, (leaf - mean) ** 2) * number / jnp.maximum(number - 1, 1)
            return mean, variance + 1e-8

        def mix(a: Array, b: Array) -> Array:
            (mean_a, variance_a), (mean_b, variance_b) = moments(a), moments(b)
            # Divided by both variances; this form stays finite when they are large.
            share = variance_b / (variance_a + variance_b)
            return jnp.where(count > 1, share * mean_a + (1 - share) * mean_b, 0)

        grads = jax.tree.map(mix, one.grads, other.grads)
        loss = jnp.where(count > 0, (moments(one.loss)[0] + moments(other.loss)[0]) / 2, jnp.nan)
        return Estimate(loss, grads, self.num - count), state


def _finite(estimates: Estimate) -> Bool[Array, " particle"]:
    """Returns which particles have a finite loss and gradient."""
    leaves = [estimates.loss, *jax.tree.leaves(estimates.grads)]
    axes = [tuple(range(1, leaf.ndim)) for leaf in leaves]
    fine = [jnp.isfinite(leaf).all(axis) for leaf, axis in zip(leaves, axes, strict=True)]
    return jnp.stack(fine).all(0)


def _mean_where(chosen: Bool[Array, " particle"], leaf: Array) -> Array:
    """Returns the mean over some particles; zero if there are none."""
    keep = chosen.reshape(-1, *(1,) * (leaf.ndim - 1))
    count = jnp.maximum(chosen.sum(dtype=jnp.int32), 1).astype(leaf.dtype)
    return jnp.where(keep, leaf, 0).sum(0) / count


def _mean_of_finite(estimates: Estimate) -> Estimate:
    finite = _finite(estimates)
    count = finite.sum(dtype=jnp.int32)
    mean = functools.partial(_mean_where, finite)
    grads, loss = jax.tree.map(mean, (estimates.grads, estimates.loss))
    dropped = len(finite) - count + jnp.sum(jnp.asarray(estimates.dropped), dtype=jnp.int32)
    return Estimate(jnp.where(count > 0, loss, jnp.nan), grads, dropped)


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
