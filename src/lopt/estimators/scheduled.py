"""An estimator in which a number, such as a weight of its objective, follows a schedule."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params, State


class Scheduled(AbstractGradientEstimator):
    """Another estimator, with an array in it that changes from estimate to estimate.

    Attributes:
        one: the estimator, such as a `Mean`.
        where: from the estimator to the array, or to several in a tuple.
        schedule: from the number of estimates made, an array, to the value.

    Example: `Scheduled(Mean(PES(inner, 10), 8), lambda mean: mean.one.inner.objective.direction,
    optax.linear_schedule(1.0, 0.2, 1000))`.
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
