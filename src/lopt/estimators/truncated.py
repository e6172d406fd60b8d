"""Truncated backpropagation through inner training.

Exact for what happens inside a window, blind to the effect of theta before it: biased towards
short horizons unless the window is the whole episode (Wu et al. 2018, arXiv:1803.02021).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, Scalar, Theta
from lopt.estimators.truncation import check_truncation, initial_age, next_age


class TruncatedState(eqx.Module):
    """An episode in progress, and its age in inner steps."""

    episode: Episode
    age: Int[Array, ""]


class TruncatedBackprop(AbstractGradientEstimator):
    """The gradient of the mean objective over the next `truncation` inner steps.

    The state that a window starts from counts as data. With `truncation` equal to the horizon
    this is the exact gradient of the meta-loss.

    Attributes:
        inner: what is measured.
        truncation: inner steps per estimate; divides `inner.horizon`.
        stagger: whether particles start at random windows, so as not to restart in step.
    """

    inner: InnerTraining
    truncation: int = eqx.field(static=True)
    stagger: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        check_truncation(self, self.inner, self.truncation)

    def prepare(self, params: Theta, key: Key) -> TruncatedState:
        """Begins an episode."""
        age_key, episode_key = jax.random.split(key)
        return TruncatedState(
            self.inner.begin(params, episode_key),
            initial_age(age_key, self.inner, self.truncation, self.stagger),
        )

    def estimate(
        self, params: Theta, state: TruncatedState, key: Key
    ) -> tuple[Estimate, TruncatedState]:
        """Runs the episode on for one truncation and differentiates it."""

        def window(theta: Theta) -> tuple[Scalar, TruncatedState]:
            # Inside of the derivative: a fresh optimizer state may depend on theta.
            fresh = TruncatedState(self.inner.begin(theta, key), jnp.zeros_like(state.age))
            over = state.age >= self.inner.horizon
            current = jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, state)
            losses, episode = self.inner.advance(theta, current.episode, self.truncation)
            age = next_age(current.age, losses, self.inner, self.truncation)
            return jnp.mean(losses), TruncatedState(episode, age)

        (loss, state), grads = jax.value_and_grad(window, has_aux=True)(params)
        return Estimate(loss, grads), state
