"""Combinations of estimators: the mean over particles."""

import equinox as eqx
import jax
import jax.numpy as jnp

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params, State


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
        return jax.vmap(self.one.prepare, (None, 0))(params, keys)

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the mean estimate, and the particles' next states."""
        keys = jax.random.split(key, self.num)

        def estimate(each: tuple[State, Key]) -> tuple[Estimate, State]:
            return self.one.estimate(params, *each)

        if self.at_once is None:
            estimates, state = jax.vmap(estimate)((state, keys))
        else:
            estimates, state = jax.lax.map(estimate, (state, keys), batch_size=self.at_once)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), estimates), state
