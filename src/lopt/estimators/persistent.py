"""Evolution strategies that carry their noise from window to window of an episode.

PES: Vicol et al. 2021, arXiv:2112.13835. NRES and the family GPES between the two: Li et al. 2023,
arXiv:2304.12180. ES-Single: Vicol 2023, arXiv:2304.11153.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.checks import check_integer, check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, Theta
from lopt.estimators.antithetic import pair, perturbation, score
from lopt.estimators.truncation import (
    AbstractHorizonSchedule,
    Clock,
    check_windows,
    where,
    windows_of,
)


class PersistentState(eqx.Module):
    """A pair of episodes in progress.

    Attributes:
        episodes: the two partners, stacked, with one task, one key and one step between them.
        noise: the perturbation that was applied last.
        total: the sum of all different perturbations since the episodes began.
        held: inner steps for which `noise` has been applied.
        clock: where the episodes are.
    """

    episodes: Episode
    noise: Theta
    total: Theta
    held: Int[Array, ""]
    clock: Clock


class GPES(AbstractGradientEstimator):
    """Antithetic persistent evolution strategies whose noise is renewed every `period` inner steps.

    Each estimate runs both partners, at theta + e and theta - e, on for one truncation, and returns
    xi (L+ - L-) / (2 sigma^2) with L the mean objective over the truncation and xi the sum of the
    different e since the episodes began. Averaged over the windows of an episode that is an
    unbiased gradient of the meta-loss smoothed by independent noise in each period. Episodes
    restart, with xi = 0 and new noise, at the start of the truncation after the one that ended
    them.

    A period of one truncation is PES, one as long as the episode is NRES.

    Attributes:
        inner: what is measured.
        truncation: inner steps per estimate; divides `inner.horizon`.
        period: inner steps for which noise is kept, a multiple of `truncation`; None keeps it for
            the whole episode.
        sigma: standard deviation of the perturbation of theta.
        stagger: whether particles start at random windows, so as not to restart in step.
        schedule: of the length of episodes; always `inner.horizon` by default.
    """

    inner: InnerTraining
    truncation: int = eqx.field(static=True)
    period: int | None = eqx.field(static=True)
    sigma: float = eqx.field(static=True, default=0.01)
    stagger: bool = eqx.field(static=True, default=True)
    schedule: AbstractHorizonSchedule | None = None

    def __check_init__(self) -> None:
        check_windows("GPES", self.inner, self.truncation, self.schedule)
        check_positive("GPES", "sigma", self.sigma, 0.01)
        if self.period is not None:
            remedy = f"{2 * self.truncation} or another multiple of truncation={self.truncation}"
            check_integer("GPES", "period", self.period, hint=remedy)
            if self.period % self.truncation:
                raise ValueError(f"GPES(period={self.period}) does not fit; try {remedy}.")

    @override
    def prepare(self, params: Theta, key: Key) -> PersistentState:
        zero = jax.tree.map(jnp.zeros_like, params)
        clock = windows_of(self).begin(key)
        episodes = self._begin(pair(params, zero), key, clock.length)
        return PersistentState(episodes, zero, zero, jnp.zeros((), jnp.int32), clock)

    @override
    def estimate(
        self, params: Theta, state: PersistentState, key: Key
    ) -> tuple[Estimate, PersistentState]:
        noise_key, key = jax.random.split(key)
        over = state.clock.over
        due = over | (state.held == 0)
        fresh = perturbation(noise_key, params, self.sigma)
        noise = where(due, fresh, state.noise)
        thetas = pair(params, noise)
        total = jax.tree.map(
            lambda xi, e: jnp.where(over, 0, xi) + jnp.where(due, e, 0), state.total, noise
        )
        windows = windows_of(self)
        clock = windows.restart_if_over(state.clock, key)
        # Mapped over particles a conditional computes both sides anyway.
        episodes = where(over, self._begin(thetas, key, clock.length), state.episodes)

        axes = _pair_axes(episodes)
        losses, episodes = jax.vmap(
            lambda theta, episode: self.inner.advance(theta, episode, self.truncation),
            in_axes=(0, axes),
            out_axes=(0, axes),
        )(thetas, episodes)

        means = jnp.mean(losses, axis=1)
        held = jnp.where(due, 0, state.held) + self.truncation
        if self.period is not None:
            held = jnp.where(held >= self.period, 0, held)
        estimate = Estimate(means.mean(), score(total, means[0], means[1], self.sigma))
        clock = windows.advance(clock, losses)
        return estimate, PersistentState(episodes, noise, total, held, clock)

    def _begin(self, thetas: Theta, key: Key, length: Int[Array, ""]) -> Episode:
        one = jax.eval_shape(self.inner.begin, jax.tree.map(lambda t: t[0], thetas), key, length)
        return jax.vmap(self.inner.begin, (0, None, None), _pair_axes(one))(thetas, key, length)


def PES(
    inner: InnerTraining,
    truncation: int,
    sigma: float = 0.01,
    stagger: bool = True,
    schedule: AbstractHorizonSchedule | None = None,
) -> GPES:
    """Antithetic persistent evolution strategies: new noise in every window.

    Unbiased for the meta-loss smoothed by independent noise in each window; its variance grows with
    the number of windows. Arguments as those of `GPES`.
    """
    check_windows("PES", inner, truncation, schedule)
    check_positive("PES", "sigma", sigma, 0.01)
    return GPES(inner, truncation, truncation, sigma, stagger, schedule)


def NRES(
    inner: InnerTraining,
    truncation: int,
    sigma: float = 0.01,
    stagger: bool = True,
    schedule: AbstractHorizonSchedule | None = None,
) -> GPES:
    """Noise-reuse evolution strategies: one perturbation per episode.

    Unbiased for the same smoothed meta-loss as `ES`, from windows, and of all `GPES` the one with
    the least variance in most problems. Arguments as those of `GPES`.
    """
    check_windows("NRES", inner, truncation, schedule)
    check_positive("NRES", "sigma", sigma, 0.01)
    return GPES(inner, truncation, None, sigma, stagger, schedule)


ESSingle = NRES  # found independently: Vicol 2023, arXiv:2304.11153


def _pair_axes(episodes: Episode) -> Any:
    """Axis 0 for what differs between partners; None for what they share, so batches as well."""
    shared = lambda e: (e.task_key, e.train.key, e.train.step, e.num_steps)  # noqa: E731
    return eqx.tree_at(shared, jax.tree.map(lambda _: 0, episodes), (None,) * 4)
