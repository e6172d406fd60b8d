"""Evolution strategies: the gradient of a smoothed meta-loss from evaluations or derivatives.

Salimans et al. 2017, arXiv:1703.03864; for learned optimizers Metz et al. 2019, arXiv:1810.10180.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.stats import rankdata
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.checks import check_integer, check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, State, Theta
from lopt.estimators.antithetic import check_weights, pair, perturbation, score
from lopt.estimators.truncation import (
    AbstractHorizonSchedule,
    TruncatedState,
    check_windows,
    restart_together,
    windows_of,
)


class ES(AbstractGradientEstimator):
    """Evolution strategies over whole episodes, by the score function.

    With e ~ N(0, sigma^2 I) and L the meta-loss of `inner`, an antithetic pair gives
    e (L(theta + e) - L(theta - e)) / (2 sigma^2), a single run e L(theta + e) / sigma^2. Both are
    unbiased for the gradient of E[L(theta + e)].

    Attributes:
        inner: what is measured.
        sigma: standard deviation of the perturbation of theta.
        antithetic: whether each perturbation is tried in both directions.
        sign: whether the difference of a pair is replaced by its sign: no longer unbiased, but
            indifferent to the scale of losses.
    """

    inner: InnerTraining
    sigma: float = eqx.field(static=True, default=0.01)
    antithetic: bool = eqx.field(static=True, default=True)
    sign: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_positive("ES", "sigma", self.sigma, 0.01)
        if self.sign and not self.antithetic:
            raise ValueError("ES(sign=True, antithetic=False): a sign needs a pair to compare.")

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        return ()

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        noise, losses = self.evaluate(params, key)
        return Estimate(losses.mean(), self.score(noise, losses)), state

    def evaluate(self, params: Theta, key: Key) -> tuple[Theta, Float[Array, " arm"]]:
        """Returns a perturbation, and the meta-losses at theta + noise and theta - noise."""
        noise_key, episode_key = jax.random.split(key)
        noise = perturbation(noise_key, params, self.sigma)
        if not self.antithetic:
            perturbed = jax.tree.map(jnp.add, params, noise)
            return noise, self.inner.meta_loss(perturbed, episode_key)[None]
        both = pair(params, noise)
        return noise, jax.vmap(self.inner.meta_loss, (0, None))(both, episode_key)

    def score(self, noise: Theta, losses: Float[Array, " arm"]) -> Theta:
        """Returns the estimate that losses, or utilities in their place, amount to."""
        if not self.antithetic:
            return score(noise, 2 * losses[0], jnp.zeros_like(losses[0]), self.sigma)
        if self.sign:
            losses = jnp.stack([jnp.sign(losses[0] - losses[1]), jnp.zeros_like(losses[1])])
        return score(noise, losses[0], losses[1], self.sigma)


class RankedES(AbstractGradientEstimator):
    """Evolution strategies with rank shaping: losses count by their order only.

    The losses of `num` particles, of both arms together, are replaced by utilities equally spaced
    from -1/2 for the lowest to 1/2 for the highest; equal ones share their mean. Losses that are
    not finite are the highest, so that theta moves away from them. `Estimate.dropped` counts the
    particles with such a loss, though their ranks count.

    Attributes:
        one: the estimator of each particle.
        num: particles; with a single arm at least 2.
    """

    one: ES
    num: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer("RankedES", "num", self.num, 1 if self.one.antithetic else 2)

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        return ()

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        keys = jax.random.split(key, self.num)
        noises, losses = jax.vmap(self.one.evaluate, (None, 0))(params, keys)
        finite = jnp.isfinite(losses)
        # Equal losses share their mean rank, so that pairs that say nothing count for nothing.
        ranks = rankdata(jnp.where(finite, losses, jnp.inf).ravel()).astype(losses.dtype)
        utilities = (ranks - 1) / (losses.size - 1) - 0.5
        scores = jax.vmap(self.one.score)(noises, utilities.reshape(losses.shape))
        grads = jax.tree.map(lambda leaf: leaf.mean(axis=0), scores)
        loss = jnp.where(finite, losses, 0).sum() / finite.sum().astype(losses.dtype)
        dropped = self.num - finite.all(axis=1).sum(dtype=jnp.int32)
        return Estimate(loss, grads, dropped), state


class TruncatedES(AbstractGradientEstimator):
    """Antithetic evolution strategies inside a window.

    Both partners start from one state, which counts as data, and the episode goes on as the
    positive partner did. Like truncated backpropagation it does not see how theta shaped the state
    that a window starts from, and is biased towards short horizons.

    Attributes:
        inner: what is measured.
        truncation: inner steps per estimate; divides `inner.horizon`.
        sigma: standard deviation of the perturbation of theta.
        stagger, schedule: of episodes, as those of `GPES`.

    Reference: the baseline TES of Vicol et al. 2021, arXiv:2112.13835.
    """

    inner: InnerTraining
    truncation: int = eqx.field(static=True)
    sigma: float = eqx.field(static=True, default=0.01)
    stagger: bool = eqx.field(static=True, default=True)
    schedule: AbstractHorizonSchedule | None = None

    def __check_init__(self) -> None:
        check_windows("TruncatedES", self.inner, self.truncation, self.schedule)
        check_positive("TruncatedES", "sigma", self.sigma, 0.01)

    @override
    def prepare(self, params: Theta, key: Key) -> TruncatedState:
        check_weights(params)
        clock = windows_of(self).begin(key)
        return TruncatedState(self.inner.begin(params, key, clock.length), clock)

    @override
    def estimate(
        self, params: Theta, state: TruncatedState, key: Key
    ) -> tuple[Estimate, TruncatedState]:
        noise_key, key = jax.random.split(key)
        noise = perturbation(noise_key, params, self.sigma)
        windows = windows_of(self)
        clock = windows.restart_if_over(state.clock, key)

        def window(theta: Theta) -> tuple[Float[Array, " step"], Episode]:
            episode = state.episode_to_run(self.inner, theta, key, clock.length)
            return self.inner.advance(theta, episode, self.truncation)

        losses, episodes = jax.vmap(window)(pair(params, noise))
        means = jnp.mean(losses, axis=1)
        estimate = Estimate(means.mean(), score(noise, means[0], means[1], self.sigma))
        kept = jax.tree.map(lambda leaf: leaf[0], episodes)
        return estimate, TruncatedState(kept, windows.advance(clock, losses))


class Reparameterized(AbstractGradientEstimator):
    """Another estimator's gradient at theta + e, e ~ N(0, sigma^2 I): Kingma & Welling 2014.

    Of `MetaTask(inner)` it is unbiased for the gradient of E[L(theta + e)]; of a truncated
    estimator it has that one's bias. The noise and the randomness of both arms are those that `ES`
    and its relatives draw from the same key, as `InverseVariance` needs. If the episode of one arm
    breaks, both restart.

    Attributes:
        one: the estimator that differentiates: MetaTask, TruncatedBackprop, ForwardMode.
        sigma: standard deviation of the perturbation of theta.
        antithetic: whether the mean is taken over theta + e and theta - e.
    """

    one: AbstractGradientEstimator
    sigma: float = eqx.field(static=True, default=0.01)
    antithetic: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        check_positive("Reparameterized", "sigma", self.sigma, 0.01)

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        arms = self._arms(params, jax.tree.map(jnp.zeros_like, params))
        return jax.vmap(self.one.prepare, (0, None))(arms, key)

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        noise_key, key = jax.random.split(key)
        arms = self._arms(params, perturbation(noise_key, params, self.sigma))
        estimates, state = jax.vmap(self.one.estimate, (0, 0, None))(arms, state, key)
        found = estimates.loss, estimates.grads, estimates.extra
        loss, grads, extra = jax.tree.map(lambda leaf: leaf.mean(0), found)
        dropped = jnp.sum(jnp.asarray(estimates.dropped), dtype=jnp.int32)
        return Estimate(loss, grads, dropped, extra), restart_together(state)

    def _arms(self, params: Theta, noise: Theta) -> Theta:
        both = pair(params, noise)
        return both if self.antithetic else jax.tree.map(lambda leaf: leaf[:1], both)
