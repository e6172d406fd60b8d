"""Evolution strategies: the gradient of a smoothed meta-loss from evaluations alone.

Salimans et al. 2017, arXiv:1703.03864; for learned optimizers Metz et al. 2019, arXiv:1810.10180.
"""

import equinox as eqx
import jax

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, State, Theta
from lopt.estimators.antithetic import check_sigma, pair, perturbation, score


class ES(AbstractGradientEstimator):
    """Antithetic evolution strategies over whole episodes.

    Unbiased for E[L(theta + e)], e ~ N(0, sigma^2 I), with L the meta-loss of `inner`.

    Attributes:
        inner: what is measured.
        sigma: standard deviation of the perturbation of theta.
    """

    inner: InnerTraining
    sigma: float = eqx.field(static=True, default=0.01)

    def __check_init__(self) -> None:
        check_sigma(self, self.sigma)

    def prepare(self, params: Theta, key: Key) -> State:
        """Returns the empty state: every estimate runs an episode of its own."""
        return ()

    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        """Runs one antithetic pair of episodes."""
        noise_key, episode_key = jax.random.split(key)
        noise = perturbation(noise_key, params, self.sigma)
        losses = jax.vmap(self.inner.meta_loss, (0, None))(pair(params, noise), episode_key)
        return Estimate(losses.mean(), score(noise, losses[0], losses[1], self.sigma)), state
