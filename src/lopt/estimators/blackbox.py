"""Black-box methods behind the same outer loop: random search, population methods, policy gradient.

Search methods do not estimate a gradient. They propose the next theta, and return as `grads` what
`optax.sgd(1.0)` subtracts to arrive there; with another outer optimizer they are only directions.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from lopt.core.checks import check_integer, check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Scalar, State, Theta
from lopt.estimators.antithetic import check_weights, perturbation, score
from lopt.estimators.finite import total
from lopt.estimators.truncation import check_fraction


class RandomSearch(AbstractGradientEstimator):
    """Moves to the best of `num` random neighbours, if it is better than staying.

    All candidates are judged on the same episode. Use it with `optax.sgd(1.0)`.

    Attributes:
        inner: what is measured.
        num: candidates theta + e, e ~ N(0, sigma^2 I), per estimate.
        sigma: standard deviation of the perturbation of theta.
    """

    inner: InnerTraining
    num: int = eqx.field(static=True)
    sigma: float = eqx.field(static=True, default=0.01)

    def __check_init__(self) -> None:
        check_positive("RandomSearch", "sigma", self.sigma, 0.01)
        check_integer("RandomSearch", "num", self.num)

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        return ()

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        noise_key, episode_key = jax.random.split(key)
        keys = jax.random.split(noise_key, self.num)
        noises = jax.vmap(perturbation, (0, None, None))(keys, params, self.sigma)
        # Theta itself comes first and wins ties.
        noises = jax.tree.map(lambda n: jnp.concatenate([jnp.zeros_like(n[:1]), n]), noises)
        thetas = jax.tree.map(lambda leaf, n: leaf[None] + n, params, noises)
        losses = jax.vmap(self.inner.meta_loss, (0, None))(thetas, episode_key)
        best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
        grads = jax.tree.map(lambda n: -n[best], noises)
        return Estimate(losses[best], grads, total(~jnp.isfinite(losses[1:]))), state


class Evosax(AbstractGradientEstimator):
    """A population method of the library evosax: CMA-ES, OpenAI-ES and their relatives.

    The whole population is judged on the same episode. Use it with `optax.sgd(1.0)`: theta is then
    the mean of the method's search distribution.

    Attributes:
        inner: what is measured.
        num: the size of the population.
        strategy: a distribution-based algorithm of evosax, such as "CMA_ES", "Sep_CMA_ES", "SNES",
            "Open_ES".
        sigma: its initial standard deviation; for "Open_ES" also the rate of its Adam.

    Needs the extra `blackbox`: pip install "lopt[blackbox]".

    Reference: Lange 2022, arXiv:2212.04180.
    """

    inner: InnerTraining
    num: int = eqx.field(static=True)
    strategy: str = eqx.field(static=True, default="CMA_ES")
    sigma: float = eqx.field(static=True, default=0.01)

    def __check_init__(self) -> None:
        check_positive("Evosax", "sigma", self.sigma, 0.01)
        check_integer("Evosax", "num", self.num, 2)
        names = _strategies()
        if self.strategy not in names:
            raise ValueError(
                f"Evosax(strategy={self.strategy!r}) is not among the distribution-based "
                f"algorithms of evosax: {', '.join(sorted(names))}."
            )

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        check_weights(params)
        with _lenient():
            algorithm, settings = self._algorithm(params)
            state = algorithm.init(key, params, settings)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), state)

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        ask_key, tell_key, episode_key = jax.random.split(key, 3)
        with _lenient():
            algorithm, settings = self._algorithm(params)
            population, asked = algorithm.ask(ask_key, state, settings)
        population = jax.tree.map(lambda p, like: p.astype(like.dtype), population, params)
        losses = jax.vmap(self.inner.meta_loss, (0, None))(population, episode_key)
        finite = jnp.isfinite(losses)
        worst = jnp.max(jnp.where(finite, losses, -jnp.inf))
        fitness = jnp.where(finite, losses, jnp.where(jnp.isfinite(worst), worst, 0))
        with _lenient():
            told, _ = algorithm.tell(tell_key, population, fitness, asked, settings)
            # A generation of which nothing is finite says nothing.
            told = jax.tree.map(
                lambda new, old: jnp.where(finite.any(), new, old).astype(old.dtype), told, state
            )
            mean = algorithm.get_mean(told)
        grads = jax.tree.map(lambda old, new: old - new.astype(old.dtype), params, mean)
        loss = jnp.where(finite, losses, 0).sum() / finite.sum().astype(losses.dtype)
        return Estimate(loss, grads, total(~finite)), told

    def _algorithm(self, params: Theta) -> tuple[Any, Any]:
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        build = _strategies()[self.strategy]
        if self.strategy == "Open_ES":
            # Its own Adam would move by 1e-3, whatever the scale of the search.
            own = {"optimizer": optax.adam(self.sigma), "std_schedule": lambda step: self.sigma}
            algorithm = build(self.num, like, **own)
            return algorithm, algorithm.default_params
        algorithm = build(self.num, like)
        return algorithm, algorithm.default_params.replace(std_init=self.sigma)


class PolicyGradient(AbstractGradientEstimator):
    """The score function with a baseline (REINFORCE), theta being the mean of a Gaussian policy.

    Returns e (L(theta + e) - b) / sigma^2 for e ~ N(0, sigma^2 I), with b the exponential average
    of earlier losses. As b does not depend on e, this is unbiased for the gradient of
    E[L(theta + e)].

    Attributes:
        inner: what is measured.
        sigma: standard deviation of the policy.
        decay: of the baseline's average, from 0, the last loss, to below 1.

    Reference: Williams 1992, "Simple statistical gradient-following algorithms".
    """

    inner: InnerTraining
    sigma: float = eqx.field(static=True, default=0.01)
    decay: float = eqx.field(static=True, default=0.9)

    def __check_init__(self) -> None:
        check_positive("PolicyGradient", "sigma", self.sigma, 0.01)
        check_fraction("PolicyGradient", "decay", self.decay, 0.9)

    @override
    def prepare(self, params: Theta, key: Key) -> Scalar:
        check_weights(params)
        loss = self.inner.meta_loss(params, key)
        return jnp.where(jnp.isfinite(loss), loss, 0)

    @override
    def estimate(self, params: Theta, state: Scalar, key: Key) -> tuple[Estimate, Scalar]:
        noise_key, episode_key = jax.random.split(key)
        noise = perturbation(noise_key, params, self.sigma)
        loss = self.inner.meta_loss(jax.tree.map(jnp.add, params, noise), episode_key)
        grads = score(noise, 2 * loss, 2 * state, self.sigma)
        average = self.decay * state + (1 - self.decay) * loss
        return Estimate(loss, grads), jnp.where(jnp.isfinite(loss), average, state)


def _strategies() -> dict[str, Any]:
    try:
        from evosax.algorithms import distribution_based
    except ImportError as error:
        raise ImportError(
            "Evosax needs the extra blackbox; install it with: pip install 'lopt[blackbox]'"
        ) from error
    return {name: found for name in _TESTED if (found := getattr(distribution_based, name, None))}


# Those that are functions of the population and its losses alone, as the tests run them.
_TESTED = ("CMA_ES", "Sep_CMA_ES", "SNES", "Open_ES", "PGPE", "SimpleES", "MA_ES", "Rm_ES")


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Lets evosax mix types and ranks where its user has told JAX not to."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
