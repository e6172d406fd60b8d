"""The reparameterisation gradient: differentiate at a perturbed theta.

The gradient of E[L(theta + e)] is E[grad L(theta + e)] (Kingma & Welling 2014, arXiv:1312.6114; for
learned optimizers Metz et al. 2019, arXiv:1810.10180).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from typing_extensions import override

from lopt.core.checks import check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, State, Theta
from lopt.estimators.antithetic import pair, perturbation
from lopt.estimators.truncation import restart_together


class Reparameterized(AbstractGradientEstimator):
    """Another estimator's gradient at theta + e, e ~ N(0, sigma^2 I).

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
