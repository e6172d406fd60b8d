"""Learned optimizers: update rules whose weights, theta, lie beside them, trained like any network.

Most designs are features of each coordinate and a small rule; `lopt.Coordinatewise` composes them.
"""

import abc
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt.core.border import Begin, Optimizer, Scaled, Update
from lopt.core.checks import check_integer
from lopt.core.types import Key, NumSteps, Params, State, Theta


class AbstractLearnedOptimizer(eqx.Module):
    """A family of optimizers, one for each `theta`. Fields are configuration, never weights."""

    @abc.abstractmethod
    def init(self, key: Key) -> Theta:
        """Returns initial weights."""

    @abc.abstractmethod
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        """Returns the state before the first step of a run, of `num_steps` where that is known."""

    @abc.abstractmethod
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        """Returns updates (added to the parameters, in their dtype) and the next state.

        `value` is the training loss, as for Optax's optimizers. Every leaf has a gradient: those
        without are left out by `optimizer`.
        """

    @property
    def max_steps(self) -> int | None:
        """The longest run that it has values for; None for any."""
        return None

    @property
    def needs_num_steps(self) -> bool:
        """Whether it has to be told the length of the run."""
        return False

    def optimizer(
        self,
        theta: Theta,
        num_steps: NumSteps = None,
        learning_rate: Any = None,
        weight_decay: Any = 0.0,
        mask: Any = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the Optax optimizer with weights `theta`.

        It is a pytree with the arrays of `theta` as leaves: as an argument of a compiled function,
        new weights do not compile anything again, and neither does another length or rate that is
        an array. Leaves whose gradient is None have no update, and keep their state.
        `flax.nnx.Optimizer` takes it if Flax was imported before.

        Args:
            theta: the weights.
            num_steps: the length of the run, for designs that use it.
            learning_rate: a factor of all updates: a number or an Optax schedule.
            weight_decay: updates u of params p become learning_rate (u - weight_decay p), as in
                `optax.adamw`.
            mask: what decays, by default everything: a tree of booleans, or a function from params
                to one.

        Raises:
            ValueError: if `theta` is another design's, or `num_steps` is missing; by `init`, if
                params are not floats; by `update`, if gradients are not those of params.
        """
        name = f"{type(self).__name__}.optimizer"
        if num_steps is None and self.needs_num_steps:
            raise ValueError(f"{name}(theta) needs the length of the run; try num_steps=1000.")
        if isinstance(num_steps, int | float):
            check_integer(name, "num_steps", num_steps, hint=1000)
        own, given = (
            {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(t)}
            for t in (eqx.filter_eval_shape(self.init, jax.random.key(0)), theta)
        )
        if wrong := sorted(own.items() ^ given.items()):
            where = wrong[0][0]
            raise ValueError(
                f"{name}(theta) has weights of another design or size: theta{where} has the shape "
                f"{given.get(where)}, expected {own.get(where)}; lopt.load returns both that fit."
            )
        length = None if num_steps is None else jnp.asarray(num_steps, jnp.int32)
        if (nnx := sys.modules.get("flax.nnx")) is not None:
            nnx.register_data_type(Optimizer)
        learned: Any = self
        stays = isinstance(weight_decay, int | float) and weight_decay == 0
        if learning_rate is not None or not stays:
            rate = 1.0 if learning_rate is None else learning_rate
            decays = mask if mask is None or callable(mask) else lambda _: mask
            learned = Scaled(self, rate, None if stays else weight_decay, decays)
        begin = Begin(learned, theta, length)
        return Optimizer(begin, Update(begin))


Tensor = Float[Array, "..."]
Columns = Float[Array, "_column ..."]


class AbstractFeatures(eqx.Module):
    """What a rule gets to see of each coordinate.

    Features are written for one tensor. `update` does the work that needs the whole of it, such as
    factored moments; `columns` is elementwise, so that it can be computed a slab at a time.
    """

    def init(self, key: Key) -> Theta:
        """Returns the features' own weights, such as learned decays; `()` if there are none."""
        return ()

    @abc.abstractmethod
    def begin(self, param: Tensor) -> State:
        """Returns the accumulators of a tensor: a pytree, of one structure for all tensors.

        Its arrays have one bank axis in front, and behind it the tensor's axes, or some of them.
        """

    @abc.abstractmethod
    def update(
        self, theta: Theta, grad: Tensor, state: State, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Any, State]:
        """Takes in the gradient of a tensor, after `step` steps; returns views and accumulators.

        Views are all that `columns` is given: a pytree of arrays whose last axes broadcast to the
        coordinates, behind any leading axes; or of scalars.
        """

    @abc.abstractmethod
    def columns(self, views: Any) -> tuple[Columns, ...]:
        """Returns the features that differ between coordinates, in stacks. Elementwise.

        The first axis of each stack counts its features, the others broadcast to the coordinates:
        what is the same along an axis of a large tensor need not be repeated along it.
        """

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        """Returns the features that all coordinates share, such as time, after `step` steps."""
        return jnp.zeros((0,), dtype)

    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Returns the name of each column, then of each shared feature, as recordings use them."""

    def column_names(self) -> tuple[str, ...]:
        """Returns the name of each column: of what coordinates do not share."""
        names = self.names()
        shared = self.shared(jnp.zeros((), jnp.int32), jnp.float32)
        return names[: len(names) - len(shared)]

    def select(self, names: tuple[str, ...]) -> "AbstractFeatures":
        """Returns features with at least these names; all, if they have weights of their own."""
        return self


class AbstractRule(eqx.Module):
    """The map from the features of one coordinate to its outputs.

    `apply` sees the features on the first axis, and any number of coordinates behind it, which it
    must treat alike and apart from one another.
    """

    def init(self, key: Key) -> Theta:
        """Returns initial weights; `()` if there are none."""
        return ()

    def begin(self, theta: Theta, shape: tuple[int, ...]) -> State:
        """Returns the memory of some coordinates: arrays of `shape` behind a bank axis, if any."""
        return ()

    @abc.abstractmethod
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        """Returns the outputs for each coordinate, stacked in front, and the next memory."""

    @property
    def required_features(self) -> tuple[str, ...] | None:
        """The names of the features that it was made for; None if any will do."""
        return None

    @property
    def is_elementwise(self) -> bool:
        """Whether it is a few elementwise operations: large tensors then need no slabs."""
        return False
