"""Persistent evolution strategies: unbiased gradients from truncated unrolls.

Vicol et al. 2021, arXiv:2112.13835.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, Theta
from lopt.estimators.antithetic import check_sigma, pair, perturbation, score
from lopt.estimators.truncation import check_truncation, initial_age, next_age


class PersistentState(eqx.Module):
    """A pair of episodes in progress.

    Attributes:
        episodes: the two partners, stacked, with one task, one key and one step between them.
        noise: the sum of all perturbations since the episodes began.
        age: inner steps taken since then.
    """

    episodes: Episode
    noise: Theta
    age: Int[Array, ""]


class PES(AbstractGradientEstimator):
    """Antithetic persistent evolution strategies.

    Each estimate draws new noise e, adds it to the sum xi of the episode's noises, runs both
    partners on for one truncation, and returns xi (L+ - L-) / (2 sigma^2) with L the mean
    objective over the truncation. Averaged over the windows of an episode that is an unbiased
    gradient of the meta-loss smoothed by independent noise in each window. Episodes restart, with
    xi = 0, at the start of the truncation after the one that ended them.

    Attributes:
        inner: what is measured.
        truncation: inner steps per estimate; divides `inner.horizon`.
        sigma: standard deviation of the perturbation of theta.
        stagger: whether particles start at random windows, so as not to restart in step.
    """

    inner: InnerTraining
    truncation: int = eqx.field(static=True)
    sigma: float = eqx.field(static=True, default=0.01)
    stagger: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        check_truncation(self, self.inner, self.truncation)
        check_sigma(self, self.sigma)

    def prepare(self, params: Theta, key: Key) -> PersistentState:
        """Begins a pair of episodes, both with an optimizer state begun at theta itself."""
        age_key, episode_key = jax.random.split(key)
        zero = jax.tree.map(jnp.zeros_like, params)
        return PersistentState(
            self._begin(pair(params, zero), episode_key),
            zero,
            initial_age(age_key, self.inner, self.truncation, self.stagger),
        )

    def estimate(
        self, params: Theta, state: PersistentState, key: Key
    ) -> tuple[Estimate, PersistentState]:
        """Runs a pair of episodes on for one truncation."""
        noise_key, episode_key = jax.random.split(key)
        noise = perturbation(noise_key, params, self.sigma)
        thetas = pair(params, noise)
        state = self._restart_if_over(thetas, state, episode_key)
        total = jax.tree.map(jnp.add, state.noise, noise)

        axes = _pair_axes(state.episodes)
        losses, episodes = jax.vmap(
            lambda theta, episode: self.inner.advance(theta, episode, self.truncation),
            in_axes=(0, axes),
            out_axes=(0, axes),
        )(thetas, state.episodes)

        means = jnp.mean(losses, axis=1)
        age = next_age(state.age, losses, self.inner, self.truncation)
        estimate = Estimate(means.mean(), score(total, means[0], means[1], self.sigma))
        return estimate, PersistentState(episodes, total, age)

    def _begin(self, thetas: Theta, key: Key) -> Episode:
        one = jax.eval_shape(self.inner.begin, jax.tree.map(lambda t: t[0], thetas), key)
        return jax.vmap(self.inner.begin, (0, None), _pair_axes(one))(thetas, key)

    def _restart_if_over(self, thetas: Theta, state: PersistentState, key: Key) -> PersistentState:
        # Mapped over particles a conditional computes both sides anyway.
        zero = jax.tree.map(jnp.zeros_like, state.noise)
        fresh = PersistentState(self._begin(thetas, key), zero, jnp.zeros_like(state.age))
        over = state.age >= self.inner.horizon
        return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, state)


def _pair_axes(episodes: Episode) -> Any:
    """Axis 0 for what differs between partners, None for what they share.

    A shared key makes the batches shared: drawn and looked up once for both.
    """
    return eqx.tree_at(_shared, jax.tree.map(lambda _: 0, episodes), (None, None, None))


def _shared(episodes: Episode) -> tuple[Any, Any, Any]:
    return episodes.task_key, episodes.train.key, episodes.train.step
