"""Learned optimizers: update rules with weights of their own.

`AbstractLearnedOptimizer` keeps configuration in its fields and its weights, `theta`, beside it,
so that theta is trained by the same loop as any network. Most published designs are two pieces,
features of each coordinate and a small rule from features to an update: `lopt.Coordinatewise`
composes them.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt.core.types import Key, Params, Scalar, State, Theta


class AbstractLearnedOptimizer(eqx.Module):
    """A family of optimizers, one for each `theta`. Fields are configuration, never weights."""

    @abc.abstractmethod
    def init(self, key: Key) -> Theta:
        """Returns initial weights."""

    @abc.abstractmethod
    def begin(self, theta: Theta, params: Params) -> State:
        """Returns the optimizer's state before its first step on `params`."""

    @abc.abstractmethod
    def update(
        self,
        theta: Theta,
        grads: Params,
        state: State,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, State]:
        """Returns updates (added to the parameters, in their dtype) and the next state."""

    def made_for(self) -> int | None:
        """Returns how many steps a run may have at most, or None if there is no limit.

        A learned optimizer with one weight per step overrides this.
        """
        return None

    def optimizer(self, theta: Theta) -> optax.GradientTransformationExtraArgs:
        """Returns the Optax optimizer with weights `theta`.

        It is a pytree with the arrays of `theta` as leaves, so it can be an argument of a
        compiled function: new weights do not compile anything again.
        """
        return optax.GradientTransformationExtraArgs(
            Bound(self.begin, theta), Bound(self.update, theta)
        )


class Bound(eqx.Module):
    """A method with its theta in place.

    Like any function, and unlike other modules, it is equal to itself only and can be hashed, so
    that `jax.jit(optimizer.update)` works as it does for every optimizer of Optax.
    """

    method: Callable[..., Any]
    theta: Theta

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Returns `method(theta, ...)`."""
        return self.method(self.theta, *args, **keywords)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


Tensor = Float[Array, "..."]
Tensors = Sequence[Tensor]
Columns = Float[Array, "_column ..."]


class AbstractFeatures(eqx.Module):
    """What a rule gets to see of each coordinate.

    Features see tensors in groups: several small ones (those of rank 1 first), whose coordinates
    `lopt.core.join` lays end to end on one axis, or a single large one in its own shape. `update`
    does the work that needs whole tensors, such as factored moments; `columns` is elementwise, so
    that it can be computed a slab at a time.
    """

    @abc.abstractmethod
    def init(self, key: Key) -> Theta:
        """Returns the features' own weights, such as learned decays; `()` if there are none."""

    @abc.abstractmethod
    def begin(self, params: Tensors) -> State:
        """Returns the accumulators of a group of tensors before its first gradients."""

    @abc.abstractmethod
    def update(
        self, theta: Theta, grads: Tensors, state: State, params: Tensors, step: Int[Array, ""]
    ) -> tuple[Any, State]:
        """Takes in the gradients of a group of tensors, each of rank at least 1.

        `step` is the number of steps taken before this one.

        Returns:
            Views, all that `columns` is given: a pytree of arrays whose last axes broadcast to the
            coordinates, behind any leading axes; or of scalars. And the next accumulators.
        """

    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Returns the name of each column, then of each shared feature, as recordings use them."""

    def column_names(self) -> tuple[str, ...]:
        """Returns the name of each column: of what coordinates do not share."""
        names = self.names()
        shared = self.shared(jnp.zeros((), jnp.int32), jnp.float32)
        return names[: len(names) - len(shared)]

    def select(self, names: tuple[str, ...]) -> "AbstractFeatures":
        """Returns features that have at least these names, without what the others need.

        Features with weights of their own return themselves, as weights are theirs to fit.
        """
        return self

    @abc.abstractmethod
    def columns(self, views: Any) -> tuple[Columns, ...]:
        """Returns the features that differ between coordinates, in stacks. Elementwise.

        The first axis of each stack counts its features, the others broadcast to the coordinates:
        what is the same along an axis of a large tensor need not be repeated along it.
        """

    @abc.abstractmethod
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        """Returns the features that all coordinates share, such as time, after `step` steps."""


class AbstractRule(eqx.Module):
    """The map from the features of one coordinate to its outputs.

    `apply` sees the features on the first axis, and any number of coordinates behind it, which it
    must treat alike and apart from one another.
    """

    @abc.abstractmethod
    def init(self, key: Key) -> Theta:
        """Returns initial weights."""

    @abc.abstractmethod
    def begin(self, theta: Theta, shape: tuple[int, ...]) -> State:
        """Returns the memory of some coordinates: arrays whose last axes are `shape`, or `()`."""

    @abc.abstractmethod
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        """Returns the outputs for each coordinate, stacked in front, and the next memory."""

    def reads(self) -> tuple[str, ...] | None:
        """Returns the names of the features that it was made for, or None if any will do.

        A rule whose inputs have a meaning overrides this.
        """
        return None

    def fuses(self) -> bool:
        """Returns whether it is a few elementwise operations and no product of matrices.

        The compiler then makes one loop of features, rule and update, so that large tensors need
        not be worked on in slabs.
        """
        return False
