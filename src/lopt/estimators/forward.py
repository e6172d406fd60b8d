"""Forward-mode meta-gradients: derivatives carried along with the run.

Memory does not grow with the horizon; time grows with the number of directions (Franceschi et al.
2017, arXiv:1703.01785). Random directions trade variance for time (Silver et al. 2022,
arXiv:2108.08052). Carried from step to step of one endless run they are real-time recurrent
learning (Williams & Zipser 1989).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, Scalar, State, Theta
from lopt.estimators.truncation import (
    CLOCK,
    AbstractHorizonSchedule,
    Clock,
    check_windows,
    where,
    windows_of,
)

Directions = Float[Array, "direction weight"]


class ForwardMode(AbstractGradientEstimator):
    """The gradient of the meta-loss of a whole episode, by forward-mode differentiation.

    Exact with all directions. With k random ones v ~ N(0, I), the mean of v (v . gradient) is
    unbiased.

    Attributes:
        inner: what is measured.
        directions: random directions per estimate; None takes all of theta's.
        at_once: directions computed side by side, all of them by default; fewer take less memory,
            and repeat the run itself for each slice.
    """

    inner: InnerTraining
    directions: int | None = eqx.field(static=True, default=None)
    at_once: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        for field, value in (("directions", self.directions), ("at_once", self.at_once)):
            if value is not None:
                check_integer("ForwardMode", field, value, hint=1)

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        return ()

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        flat, unravel = ravel_pytree(params)
        directions = _directions(key, flat, self.directions)
        meta_loss = eqx.Partial(InnerTraining.meta_loss, self.inner, key=key)
        loss, slopes = slopes_along(meta_loss, params, directions, self.at_once)
        return Estimate(loss, unravel(_combine(slopes, directions, self.directions))), state


class OnlineState(eqx.Module):
    """An episode in progress with its derivatives.

    Attributes:
        episode: the run.
        tangents: the derivative of each floating-point array of the episode along each direction,
            on a new leading axis; None for other leaves.
        directions: those directions; with all of theta's, an identity that is never stored.
        clock: where the episode is.
    """

    episode: Episode
    tangents: Any
    directions: Directions | None
    clock: Clock


class OnlineForwardMode(AbstractGradientEstimator):
    """The gradient of the next window, with derivatives carried along from window to window.

    Unlike truncated backpropagation it sees how theta shaped the state that a window starts from:
    averaged over the windows of an episode at constant theta it is the exact gradient of the
    meta-loss. As theta changes while an episode runs, carried derivatives belong to the thetas of
    their time; no episode ever has to end.

    Attributes:
        inner: what is measured.
        truncation: inner steps per estimate; divides `inner.horizon`.
        directions: random directions, drawn when an episode begins; None takes all of theta's.
            A single one is the cheapest unbiased online estimate, of rank one.
        stagger, schedule: of episodes, as those of `GPES`.
    """

    inner: InnerTraining
    truncation: int = eqx.field(static=True)
    directions: int | None = eqx.field(static=True, default=None)
    stagger: bool = eqx.field(static=True, default=True)
    schedule: AbstractHorizonSchedule | None = None

    def __check_init__(self) -> None:
        check_windows("OnlineForwardMode", self.inner, self.truncation, self.schedule)
        if self.directions is not None:
            check_integer("OnlineForwardMode", "directions", self.directions, hint=1)

    @override
    def prepare(self, params: Theta, key: Key) -> OnlineState:
        flat, unravel = ravel_pytree(params)
        directions = _directions(key, flat, self.directions)
        clock = windows_of(self).begin(key)
        episode, tangents = self._begin(params, directions, key, unravel, clock.length)
        kept = None if self.directions is None else directions
        return OnlineState(episode, tangents, kept, clock)

    @override
    def estimate(self, params: Theta, state: OnlineState, key: Key) -> tuple[Estimate, OnlineState]:
        flat, unravel = ravel_pytree(params)
        over = state.clock.over
        directions = fresh_directions = _directions(key, flat, self.directions)
        if state.directions is not None:
            directions = jnp.where(over, fresh_directions, state.directions)
        windows = windows_of(self)
        clock = windows.restart_if_over(state.clock, key)
        fresh = self._begin(params, fresh_directions, key, unravel, clock.length)
        episode, tangents = where(over, fresh, (state.episode, state.tangents))
        floats, others = eqx.partition(episode, eqx.is_inexact_array)

        def window(theta: Theta, floats: Any) -> tuple[tuple[Scalar, Any], tuple[Any, Any]]:
            episode = eqx.combine(floats, others)
            losses, episode = self.inner.advance(theta, episode, self.truncation)
            floats, rest = eqx.partition(episode, eqx.is_inexact_array)
            return (jnp.mean(losses), floats), (rest, losses)

        def along(direction: Float[Array, " weight"], tangent: Any) -> Any:
            return jax.jvp(window, (params, floats), (unravel(direction), tangent), has_aux=True)

        (loss, floats), (slopes, tangents), (rest, losses) = jax.vmap(
            along, out_axes=(None, 0, None)
        )(directions, tangents)
        grads = unravel(_combine(slopes, directions, self.directions))
        kept = None if self.directions is None else directions
        # Derivatives may overflow while losses stay bounded; carried on they would never recover.
        clock = windows.advance(clock, (losses, slopes, tangents))
        return Estimate(loss, grads), OnlineState(eqx.combine(floats, rest), tangents, kept, clock)

    def _begin(
        self,
        theta: Theta,
        directions: Directions,
        key: Key,
        unravel: Callable[[Array], Theta],
        length: Int[Array, ""],
    ) -> tuple[Episode, Any]:
        def begin(theta: Theta) -> tuple[Any, Any]:
            return eqx.partition(self.inner.begin(theta, key, length), eqx.is_inexact_array)

        def along(direction: Float[Array, " weight"]) -> tuple[Any, Any, Any]:
            return jax.jvp(begin, (theta,), (unravel(direction),), has_aux=True)

        floats, tangents, others = jax.vmap(along, out_axes=(None, 0, None))(directions)
        return eqx.combine(floats, others), tangents


def _directions(key: Key, flat: Float[Array, " weight"], number: int | None) -> Directions:
    if number is None:
        return jnp.eye(flat.size, dtype=flat.dtype)
    # The next after that of a clock: the episode begins with the key itself.
    return jax.random.normal(jax.random.fold_in(key, CLOCK - 1), (number, flat.size), flat.dtype)


def _combine(
    slopes: Float[Array, " direction"], directions: Directions, number: int | None
) -> Float[Array, " weight"]:
    """Returns the slopes along all directions, or the mean of slope times direction."""
    return slopes if number is None else slopes @ directions / number


@eqx.filter_jit
def slopes_along(
    loss: Callable[[Theta], Scalar],
    theta: Theta,
    directions: Directions,
    at_once: int | None = None,
) -> tuple[Scalar, Float[Array, " direction"]]:
    """Returns a loss and its derivatives along some directions, `at_once` of them side by side."""
    unravel = ravel_pytree(theta)[1]

    def push(slice_: Directions) -> tuple[Scalar, Float[Array, " direction"]]:
        def along(direction: Float[Array, " weight"]) -> tuple[Scalar, Scalar]:
            return jax.jvp(loss, (theta,), (unravel(direction),))

        if len(slice_) == 1:
            # XLA computes products of batches, even of one, more slowly.
            return jax.tree.map(lambda x, of: x.reshape(of), along(slice_[0]), ((), (1,)))
        # The run itself is not mapped: its part of the work is done once per slice.
        return jax.vmap(along, out_axes=(None, 0))(slice_)

    count = len(directions)
    if at_once is None or at_once >= count:
        return push(directions)
    # Slices of one size compile once; directions of zero fill up the last.
    slices = -(-count // at_once)
    filled = jnp.pad(directions, ((0, slices * at_once - count), (0, 0)))
    losses, slopes = jax.lax.map(push, filled.reshape(slices, at_once, -1))
    return losses[0], slopes.ravel()[:count]
