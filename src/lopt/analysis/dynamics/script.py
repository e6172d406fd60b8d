"""Scripted gradients: what an optimizer answers to an impulse, a step, a change of sign.

The estimator of a run returns gradients from a list instead of a derivative, so that any optimizer
is measured as engineers measure filters, through `lopt.unroll` as everything else.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from lopt.analysis.dynamics.checks import (
    check_optimizer,
    check_same_trees,
    needs_value,
)
from lopt.core.checks import check_integer, check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params
from lopt.core.unroll import Step, start, unroll

Signal = Literal["impulse", "step", "sign flip"]


class ScriptedGradients(AbstractGradientEstimator):
    """Returns gradients and losses from a list, whatever the params.

    Attributes:
        grads: for each step, like params with a leading axis.
        losses: for each step.
    """

    grads: Params
    losses: Float[Array, " time"]

    def prepare(self, params: Params, key: Key) -> Int[Array, ""]:
        """Returns zero, the place in the list."""
        return jnp.zeros((), jnp.int32)

    def estimate(
        self, params: Params, state: Int[Array, ""], key: Key
    ) -> tuple[Estimate, Int[Array, ""]]:
        """Returns what the list has next."""
        grads = jax.tree.map(lambda leaf: leaf[state], self.grads)
        return Estimate(self.losses[state], grads), state + 1


def scripted_updates(
    optimizer: optax.GradientTransformation,
    grads: PyTree[Float[Array, "time ..."]],
    params: Params | None = None,
    losses: Float[Array, " loss"] | None = None,
) -> Params:
    """Returns the updates that an optimizer answers to a list of gradients with.

    Params move by the updates, as they do in training.

    Args:
        optimizer: any Optax optimizer.
        grads: like params, with a leading axis of steps. A learned rule that normalises over a
            tensor sees nothing but signs in a tensor of one coordinate: give it the coordinate of
            interest among others.
        params: the first ones; zeros by default.
        losses: what is passed as `value`; without them nothing is, as `optimizer.update` alone
            would have it.

    Raises:
        TypeError: if `optimizer` is none.
        ValueError: if the optimizer needs a loss value and gets none, or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from lopt.analysis.dynamics import scripted_updates
        >>> found = scripted_updates(optax.sgd(1.0, momentum=0.5), jnp.array([1.0, 0.0, 0.0]))
        >>> print(found)
        [-1.   -0.5  -0.25]
    """
    check_optimizer("scripted_updates", "optimizer", optimizer)
    first = jax.tree.map(lambda leaf: leaf[0], grads)
    params = optax.tree.zeros_like(first) if params is None else params
    check_same_trees("scripted_updates", "each of grads", first, "params", params)
    length = len(jax.tree.leaves(grads)[0])
    if losses is not None and losses.shape != (length,):
        raise ValueError(
            f"scripted_updates(losses) has shape {losses.shape}, but there are {length} "
            "gradients; pass a loss for each."
        )
    if losses is None:
        if needs_value(optimizer, params):
            raise ValueError(
                "scripted_updates(losses=None): this optimizer needs the loss as `value`, and "
                "scripted gradients have none; pass losses=, one for each step."
            )
        optimizer = _without_value(optimizer)
        losses = jnp.zeros(length, jax.tree.leaves(grads)[0].dtype)
    estimator = ScriptedGradients(grads, losses)
    # Nothing is random, but for optimizers that are: theirs is the key in their own state.
    state = start(estimator, optimizer, params, jax.random.key(0))
    return unroll(estimator, optimizer, state, length, record=_updates)[1]


def signal(
    kind: Signal, num_steps: int, at: int = 0, height: float = 1.0
) -> Float[Array, " num_steps"]:
    """Returns a gradient over time: what filters are tested with.

    Args:
        kind: "impulse", `height` at step `at` and zero elsewhere; "step", zero before it and
            `height` from there on; "sign flip", `height` before it and -height from there on.
        num_steps: how many.
        at: when it happens.
        height: how large.

    Raises:
        ValueError: if the kind is none of these, or `at` is not one of the steps.
    """
    if kind not in ("impulse", "step", "sign flip"):
        raise ValueError(f"signal(kind={kind!r}) must be 'impulse', 'step' or 'sign flip'.")
    check_integer("signal", "num_steps", num_steps, hint=50)
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < num_steps:
        raise ValueError(f"signal(at={at!r}) must be a step from 0 to {num_steps - 1}.")
    check_positive("signal", "height", height, 1.0)
    after = jnp.arange(num_steps) >= at
    if kind == "impulse":
        return jnp.where(jnp.arange(num_steps) == at, height, 0.0)
    return jnp.where(after, height, 0.0) if kind == "step" else jnp.where(after, -height, height)


def responses(
    optimizer: optax.GradientTransformation,
    signals: dict[str, Float[Array, " time"]],
    losses: Float[Array, " time"] | None = None,
) -> dict[str, Float[Array, " time"]]:
    """Returns the updates of a single coordinate, from zero, for each of several signals.

    Raises:
        TypeError: if `optimizer` is none.
        ValueError: if the optimizer needs a loss value and gets none.
    """
    return {
        name: scripted_updates(optimizer, grads[:, None], losses=losses)[:, 0]
        for name, grads in signals.items()
    }


def _updates(step: Step) -> Params:
    return step.updates


class _Dropping(eqx.Module):
    """An update function that is not told the loss."""

    update: Callable[..., Any]

    def __call__(self, updates: Params, state: Any, params: Any = None, **extra: Any) -> Any:
        return self.update(updates, state, params)


def _without_value(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(optimizer.init, _Dropping(optimizer.update))
