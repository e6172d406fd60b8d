"""Combinations of estimators: sums, mixes by inverse variance; schedules and parts of one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int
from typing_extensions import override

from lopt.core.checks import check_integer, check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, State, Theta
from lopt.estimators.antithetic import check_weights
from lopt.estimators.finite import alike, along, is_finite, mean_of_finite, mean_where, total
from lopt.estimators.truncation import nodes, restart_together


class Sum(AbstractGradientEstimator):
    """A weighted sum of estimators: of their losses, gradients and `extra`.

    Terms draw from keys of their own. A term whose loss or gradient is not finite is left out, and
    counted in `Estimate.dropped` as one particle at least; the loss is NaN if no term is left.

    Attributes:
        terms: the estimators, a tuple.
        weights: one for each, a tuple; all one by default.
    """

    terms: tuple[AbstractGradientEstimator, ...]
    weights: tuple[float, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not self.terms:
            raise ValueError("Sum(terms=()) must have at least one estimator.")
        weights = self._weights()
        if len(weights) != len(self.terms) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"Sum(weights={weights}) must be {len(self.terms)} finite numbers, one for each of "
                "its terms."
            )

    def _weights(self) -> tuple[float, ...]:
        return (1.0,) * len(self.terms) if self.weights is None else self.weights

    @override
    def prepare(self, params: Params, key: Key) -> State:
        keys = jax.random.split(key, len(self.terms))
        return tuple(term.prepare(params, k) for term, k in zip(self.terms, keys, strict=True))

    @override
    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        keys = jax.random.split(key, len(self.terms))
        triples = zip(self.terms, state, keys, strict=True)
        found = [term.estimate(params, old, k) for term, old, k in triples]
        estimates, states = zip(*found, strict=True)
        each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike(estimates))
        fine = is_finite(each)

        def weighted(leaf: Array) -> Array:
            weights = jnp.asarray(self._weights(), leaf.dtype)
            return (along(weights, leaf) * jnp.where(along(fine, leaf), leaf, 0)).sum(0)

        loss = jnp.where(fine.any(), weighted(each.loss), jnp.nan)
        grads, extra = jax.tree.map(weighted, (each.grads, each.extra))
        dropped = jnp.where(fine, each.dropped, jnp.maximum(each.dropped, 1))
        return Estimate(loss, grads, total(dropped), extra), states


class InverseVariance(AbstractGradientEstimator):
    """Two estimators of one gradient, mixed weight by weight by their inverse variances.

    Over `num` particles, with means m and unbiased variances v + 1e-8 of either estimator, each
    weight's gradient is (m_a / v_a + m_b / v_b) / (1 / v_a + 1 / v_b), biased a little, as these
    are from the same samples. Both see the same keys: `ES` and `Reparameterized`, or `TruncatedES`
    and `Reparameterized(TruncatedBackprop)`, then use the same antithetic pairs on the same
    episodes, which restart together if one of them breaks.

    Shared noise correlates the errors of the two, and can make this mix up to 1.5 times as noisy as
    the better one. With `covariance`, shares in [0, 1] have the least variance; that of a is
    (v_b - c) / (v_a + v_b - 2 c), with the covariance c over particles that are finite in both. It
    takes a hundred particles or more.

    Mean and variance are over finite particles. With fewer than two an estimator has no variance,
    and the other counts alone; if both have fewer, the gradient is zero. `Estimate.dropped` counts
    particles of which neither half was used. The published clip of +-0.1 is `optax.clip(0.1)`.

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
        check_integer("InverseVariance", "num", self.num, 2)
        # Not every estimator has one; of two that have, the noise is to be the same.
        sigmas = [vars(each)["sigma"] for each in (self.one, self.other) if "sigma" in vars(each)]
        if len(set(sigmas)) > 1:
            raise ValueError(
                f"InverseVariance(one, other) smooths by sigma={sigmas[0]} and {sigmas[1]}, which "
                "are gradients of two different losses; give both the same sigma."
            )

    @override
    def prepare(self, params: Params, key: Key) -> State:
        keys = jax.random.split(key, self.num)
        prepare = jax.vmap(lambda k: (self.one.prepare(params, k), self.other.prepare(params, k)))
        return prepare(keys)

    @override
    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        keys = jax.random.split(key, self.num)

        def both(states: State, key: Key) -> tuple[Any, State]:
            one, first = self.one.estimate(params, states[0], key)
            other, second = self.other.estimate(params, states[1], key)
            return (one, other), restart_together((first, second))

        (one, other), state = jax.vmap(both)(state, keys)
        fine = is_finite(one), is_finite(other)

        def mix(a: Array, b: Array) -> Array:
            (mean_a, spread_a), (mean_b, spread_b) = moments = [*map(_moments, fine, (a, b))]
            correlation = _correlation(fine[0] & fine[1], (a, b), moments) if self.covariance else 0
            # Zero where the spread of one is unknown; NaN where both are.
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
        loss = mean_where(either, jnp.concatenate([one.loss, other.loss]))
        used = jnp.stack([each & (total(each) > 1) for each in fine]).any(0)
        dropped = total(~used) + total(one.dropped) + total(other.dropped)
        extra = mean_of_finite(other).extra | mean_of_finite(one).extra
        return Estimate(jnp.where(either.any(), loss, jnp.nan), grads, dropped, extra), state


class Scheduled(AbstractGradientEstimator):
    """Another estimator, with an array in it that changes from estimate to estimate.

    Attributes:
        one: the estimator, such as a `Mean`.
        where: from the estimator to the array, or to several in a tuple.
        schedule: from the number of estimates made, an array, to the value.
    """

    one: AbstractGradientEstimator
    where: Callable[[Any], Any] = eqx.field(static=True)
    schedule: Callable[[Int[Array, ""]], Any] = eqx.field(static=True)

    def __check_init__(self) -> None:
        found = jax.tree.leaves(self.where(self.one))
        if not found or not all(map(eqx.is_array, found)):
            raise ValueError(f"Scheduled(where) must lead to arrays of the estimator, not {found}.")

    @override
    def prepare(self, params: Params, key: Key) -> tuple[Int[Array, ""], State]:
        return jnp.zeros((), jnp.int32), self.one.prepare(params, key)

    @override
    def estimate(
        self, params: Params, state: tuple[Int[Array, ""], State], key: Key
    ) -> tuple[Estimate, tuple[Int[Array, ""], State]]:
        count, old = state
        value = self.schedule(count)
        one = eqx.tree_at(
            self.where, self.one, replace_fn=lambda leaf: jnp.asarray(value, leaf.dtype)
        )
        estimate, new = one.estimate(params, old, key)
        return estimate, (count + 1, new)


class Part(AbstractGradientEstimator):
    """Another estimator, to which a part of theta is all of it; other gradients are zero.

    The time of forward mode and the variance of evolution strategies are in proportion to weights.

    Attributes:
        one: the estimator, of inner training.
        where: from theta to the part, a node of it or a list of some, as for `equinox.tree_at`.
    """

    one: AbstractGradientEstimator
    where: Callable[[Theta], Any] = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not nodes(self.one, InnerTraining):
            raise ValueError(f"Part(one={self.one!r:.40}) has no inner training; try lopt.ES.")

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        check_weights(self.where(params))
        return self._of(params).prepare(self.where(params), key)

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        estimate, state = self._of(params).estimate(self.where(params), state, key)
        grads = eqx.tree_at(self.where, jax.tree.map(jnp.zeros_like, params), estimate.grads)
        return dataclasses.replace(estimate, grads=grads), state

    def _of(self, theta: Theta) -> Any:
        """Returns the estimator, whose optimizers have the rest of this theta."""

        def learned(one: AbstractGradientEstimator) -> list[AbstractLearnedOptimizer]:
            return [inner.learned for inner in nodes(one, InnerTraining)]

        rest = [_Remaining(each, theta, self.where) for each in learned(self.one)]
        return eqx.tree_at(learned, self.one, rest)


class _Remaining(eqx.Module):
    """What inner training asks of a learned optimizer, for a part of its theta."""

    learned: AbstractLearnedOptimizer
    theta: Theta
    where: Callable[[Theta], Any] = eqx.field(static=True)

    @property
    def needs_num_steps(self) -> bool:
        return self.learned.needs_num_steps

    def optimizer(self, part: Theta, num_steps: NumSteps) -> optax.GradientTransformation:
        return self.learned.optimizer(eqx.tree_at(self.where, self.theta, part), num_steps)


class Clipped(AbstractGradientEstimator):
    """An estimator whose gradients g are divided by 1 + (|g| / norm)^2.

    Gradients through many steps explode now and then, and then have no direction: they count less
    the larger they are, and half of the norm at most. Inside of `Mean`, each particle's.

    Attributes:
        one: the estimator.
        norm: that of a gradient that is halved.
    """

    one: AbstractGradientEstimator
    norm: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_positive("Clipped", "norm", self.norm, 1.0)

    @override
    def prepare(self, params: Params, key: Key) -> State:
        return self.one.prepare(params, key)

    @override
    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        estimate, state = self.one.estimate(params, state, key)
        ratio = optax.tree.norm(estimate.grads) / self.norm
        # Squares of large norms are not finite, and nothing is left of such gradients.
        grads = jax.tree.map(lambda leaf: leaf / (1 + ratio**2).astype(leaf.dtype), estimate.grads)
        return dataclasses.replace(estimate, grads=grads), state


def _moments(finite: Bool[Array, " particle"], leaf: Array) -> tuple[Array, Array]:
    """Returns mean and standard deviation, (variance + 1e-8)^(1/2), over the finite particles.

    With fewer than two, the deviation is infinite; otherwise never, though squares may overflow.
    """
    kept = jnp.where(along(finite, leaf), leaf, 0)
    # A quarter, as reciprocals of the largest numbers are so small that they count as zero.
    scale = 0.25 * jnp.maximum(jnp.abs(kept).max(0), 1e-4)
    scaled = 0.25 * kept / scale[None]
    mean = mean_where(finite, scaled)
    number = total(finite).astype(leaf.dtype)
    squares = mean_where(finite, (scaled - mean[None]) ** 2)
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
        kept = jnp.where(along(finite, leaf), 0.25 * leaf - 0.25 * mean[None], 0)
        return 4 * (kept / spread[None])

    one, other = (standard(leaf, *each) for leaf, each in zip(leaves, moments, strict=True))
    number = jnp.maximum(total(finite) - 1, 1).astype(one.dtype)
    return jnp.clip((one * other).sum(0) / number, -1, 1)
