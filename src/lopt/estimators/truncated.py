"""Truncated backpropagation through inner training.

Exact for what happens inside a window, blind to the effect of theta before it: biased towards
short horizons unless the window is the whole episode (Wu et al. 2018, arXiv:1803.02021).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Scalar, Theta, as_pytree
from lopt.core.unroll import check_segments
from lopt.estimators.truncation import (
    AbstractHorizonSchedule,
    TruncatedState,
    check_windows,
    windows_of,
)


def log_of_sum(losses: Float[Array, " step"]) -> Scalar:
    """Returns the logarithm of the sum of losses: windows of small losses count as much as others.

    It is NaN if the sum is not positive.

    Reference: Sobotka et al. 2024, arXiv:2312.07174, and their code.
    """
    # A sum that has vanished in single precision would have no logarithm.
    return jnp.log(jnp.sum(losses) + 1e-8)


class TruncatedBackprop(AbstractGradientEstimator):
    """The gradient of the mean objective over the next `truncation` inner steps.

    The state that a window starts from counts as data. With `truncation` equal to the horizon
    this is the exact gradient of the meta-loss.

    Attributes:
        inner: what is measured.
        truncation: inner steps per estimate; divides `inner.horizon`.
        stagger, schedule: of episodes, as those of `GPES`.
        segments: checkpoint segments of a window, which they divide, see `lopt.unroll`.
        keep_products: whether the matrix products of inner steps are kept.
        reduction: what is made of the objectives of a window's steps, and so the loss of the
            estimate; their mean by default, or another such as `log_of_sum`.
    """

    inner: InnerTraining
    truncation: int = eqx.field(static=True)
    stagger: bool = eqx.field(static=True, default=True)
    schedule: AbstractHorizonSchedule | None = None
    segments: int = eqx.field(static=True, default=1)
    keep_products: bool = eqx.field(static=True, default=False)
    reduction: Callable[[Float[Array, " step"]], Scalar] = eqx.field(
        default=jnp.mean, converter=as_pytree
    )

    def __check_init__(self) -> None:
        check_windows("TruncatedBackprop", self.inner, self.truncation, self.schedule)
        check_segments("TruncatedBackprop", self.segments, "truncation", self.truncation)

    @override
    def prepare(self, params: Theta, key: Key) -> TruncatedState:
        clock = windows_of(self).begin(key)
        return TruncatedState(self.inner.begin(params, key, clock.length), clock)

    @override
    def estimate(
        self, params: Theta, state: TruncatedState, key: Key
    ) -> tuple[Estimate, TruncatedState]:
        windows = windows_of(self)
        clock = windows.restart_if_over(state.clock, key)

        def window(theta: Theta) -> tuple[Scalar, TruncatedState]:
            # Inside of the derivative: a fresh optimizer state may depend on theta.
            episode = state.episode_to_run(self.inner, theta, key, clock.length)
            reverse = {"segments": self.segments, "keep_products": self.keep_products}
            losses, episode = self.inner.advance(theta, episode, self.truncation, **reverse)
            return self.reduction(losses), TruncatedState(episode, windows.advance(clock, losses))

        (loss, state), grads = jax.value_and_grad(window, has_aux=True)(params)
        return Estimate(loss, grads), state
