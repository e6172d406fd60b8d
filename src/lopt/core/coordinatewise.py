"""Coordinatewise learned optimizers: one rule for every weight of every network.

Features and rule are exchangeable parts: this is the seam where a symbolic expression can take the
place of a network. Small tensors are laid end to end, so that the rule is compiled and called
once for all of them; large ones are worked on in slabs, so that their features never exist at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.blocks import BLOCK_SIZE, map_blocks
from lopt.core.groups import join, split
from lopt.core.learned import (
    AbstractFeatures,
    AbstractLearnedOptimizer,
    AbstractRule,
    Columns,
    Tensor,
)
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta


class CoordinatewiseState(eqx.Module):
    """The state of a coordinatewise optimizer.

    Attributes:
        step: the number of steps taken.
        features: accumulators, one entry per group of tensors.
        memory: the rule's memory, one entry per group of tensors.
    """

    step: Int[Array, ""]
    features: tuple[State, ...]
    memory: tuple[State, ...]


class Coordinatewise(AbstractLearnedOptimizer):
    """One rule applied to every coordinate: update = scale(rule(features)).

    Attributes:
        features: what the rule sees.
        rule: features to outputs.
        scale: the rule's outputs, stacked in front, to the update that is added to the parameter.
        normalise: whether each column is given unit second moment over its tensor, that is
            multiplied by 1 / sqrt(1e-5 + <column^2>).
        block_size: the number of coordinates that a slab of a larger tensor has, about.

    Theta is `{"features": ..., "rule": ...}`. Accumulators and arithmetic are at least float32.
    """

    features: AbstractFeatures
    rule: AbstractRule
    scale: Callable[[Columns], Tensor]
    normalise: bool = eqx.field(static=True, default=True)
    block_size: int = eqx.field(static=True, default=BLOCK_SIZE)

    def __check_init__(self) -> None:
        if not isinstance(self.scale, eqx.Module):
            raise TypeError(
                f"Coordinatewise(scale={self.scale}) must be an equinox.Module with __call__, "
                "such as lopt.learned.DirectionMagnitude: a function is no pytree."
            )
        reads, names = self.rule.reads(), self.features.names()
        if reads is not None and reads != names:
            raise ValueError(
                f"Coordinatewise(rule) was made for the features {', '.join(reads)}, but is given "
                f"{', '.join(names)}; use the features that it was made for."
            )
        if self.block_size < 1:
            raise ValueError(f"Coordinatewise(block_size={self.block_size}) must be at least 1.")

    def init(self, key: Key) -> Theta:
        """Returns the initial weights of features and rule."""
        features_key, rule_key = jax.random.split(key)
        return {"features": self.features.init(features_key), "rule": self.rule.init(rule_key)}

    def begin(
        self, theta: Theta, params: Params, num_steps: NumSteps = None
    ) -> CoordinatewiseState:
        """Returns empty accumulators and the rule's initial memory."""
        groups = self.groups([as_tensor(leaf) for leaf in jax.tree.leaves(params)])
        return CoordinatewiseState(
            jnp.zeros((), jnp.int32),
            tuple(self.features.begin(group.tensors) for group in groups),
            tuple(
                self.rule.begin(_cast(theta["rule"], group.tensors[0]), join(group.tensors).shape)
                for group in groups
            ),
        )

    def update(
        self,
        theta: Theta,
        grads: Params,
        state: CoordinatewiseState,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, CoordinatewiseState]:
        """Returns updates in the dtype of `params`, and the next state.

        Raises:
            ValueError: if `params` is missing, or `grads` or `state` do not belong to it.
        """
        if params is None:
            raise ValueError(
                "Coordinatewise.update(params=None): its features see the parameters; "
                "pass them, as in optimizer.update(grads, state, params)."
            )
        leaves, structure = jax.tree.flatten(params)
        found: Any = jax.tree.structure(grads)
        if found != structure:
            raise ValueError(
                f"Coordinatewise.update(grads) has structure {found}, but params has {structure}; "
                "differentiate with respect to the same pytree that is passed as params."
            )
        for grad, leaf in zip(jax.tree.leaves(grads), leaves, strict=True):
            if jnp.shape(grad) != jnp.shape(leaf):
                raise ValueError(
                    f"Coordinatewise.update(grads) has an array of shape {jnp.shape(grad)} where "
                    f"params has {jnp.shape(leaf)}; pass the gradient at these params."
                )
        groups = self.groups([as_tensor(leaf) for leaf in leaves])
        if _shapes(state) != _shapes(jax.eval_shape(self.begin, theta, params)):
            raise ValueError(
                "Coordinatewise.update(state) is not a state of these params; "
                "begin with optimizer.init(params)."
            )
        slopes = [as_tensor(grad) for grad in jax.tree.leaves(grads)]
        updates, accumulators, memories = list(leaves), [], []
        for group, old, memory in zip(groups, state.features, state.memory, strict=True):
            like = group.tensors[0]
            view, new = self.features.update(
                _cast(theta["features"], like), group.pick(slopes), old, group.tensors, state.step
            )
            shared = self.features.shared(state.step, like.dtype)
            work = self._in_slabs if len(group.tensors) == 1 else self._together
            update, memory = work(_cast(theta["rule"], like), shared, view, memory, group.tensors)
            accumulators.append(new)
            memories.append(memory)
            for i, part in zip(group.places, split(update, group.tensors), strict=True):
                updates[i] = part.reshape(leaves[i].shape).astype(leaves[i].dtype)
        state = CoordinatewiseState(state.step + 1, tuple(accumulators), tuple(memories))
        return jax.tree.unflatten(structure, updates), state

    def groups(self, tensors: list[Tensor]) -> list["Group"]:
        """Returns tensors in groups: all small ones of a dtype, and each large one."""
        together: dict[Any, list[int]] = {}
        for i in sorted(range(len(tensors)), key=lambda i: tensors[i].ndim > 1):
            large = tensors[i].size > self.block_size
            together.setdefault(i if large else tensors[i].dtype, []).append(i)
        return [Group(places, [tensors[i] for i in places]) for places in together.values()]

    def _together(
        self,
        theta: Theta,
        shared: Float[Array, " shared"],
        view: Any,
        memory: State,
        tensors: list[Tensor],
    ) -> tuple[Tensor, State]:
        """Applies the rule once to small tensors laid end to end."""
        columns = jnp.concatenate(self.features.columns(view))
        flat = [tensor.reshape(-1) for tensor in tensors]
        parts = split(columns, flat)
        moments = jnp.stack([_sums(part) / part.shape[1] for part in parts], axis=1)
        factors = jnp.split(self._factor(moments), len(parts), axis=1)
        columns = join([p * f for p, f in zip(parts, factors, strict=True)], flat)
        outputs, memory = self.rule.apply(theta, columns, shared, memory)
        return self.scale(outputs), memory

    def _in_slabs(
        self,
        theta: Theta,
        shared: Float[Array, " shared"],
        view: Any,
        memory: State,
        tensors: list[Tensor],
    ) -> tuple[Tensor, State]:
        """Applies the rule to one large tensor; no more than a slab has its features at once."""
        (tensor,) = tensors

        def sums(arguments: Any) -> list[tuple[Tensor, ...]]:
            view, like = arguments
            # A stack with fewer entries than coordinates stands for several of them in each.
            return [
                tuple(_sums(stack) * (like.size * len(stack) / stack.size))
                for stack in self.features.columns(view)
            ]

        def apply(arguments: Any) -> tuple[Tensor, State]:
            view, memory, like = arguments
            columns = _concatenate(self.features.columns(view), factors, like.shape)
            outputs, memory = self.rule.apply(theta, columns, shared, memory)
            return self.scale(outputs), memory

        block_size = tensor.size if self.rule.fuses() else self.block_size
        totals = map_blocks(sums, (view, tensor), tensor.shape, block_size)
        factors = [self._factor(jnp.stack(total) / tensor.size) for total in totals]
        return map_blocks(apply, (view, memory, tensor), tensor.shape, block_size)

    def _factor(self, moments: Tensor) -> Tensor:
        """Returns what gives features of these second moments unit ones, or ones."""
        return jax.lax.rsqrt(1e-5 + moments) if self.normalise else jnp.ones_like(moments)


class Group(NamedTuple):
    """Tensors that features and rule see together, and their places in tree order."""

    places: list[int]
    tensors: list[Tensor]

    def pick(self, arrays: list[Tensor]) -> list[Tensor]:
        """Returns the group's part of a list of all tensors."""
        return [arrays[i] for i in self.places]


def _shapes(state: State) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(state), [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]


def _sums(stack: Columns) -> Tensor:
    """Returns the sum of squares of each feature of a stack."""
    return jnp.sum(stack * stack, axis=tuple(range(1, stack.ndim)))


def _concatenate(
    stacks: tuple[Columns, ...], factors: list[Tensor], shape: tuple[int, ...]
) -> Columns:
    """Returns all features, each times its factor, with the coordinates' shape behind them."""
    scaled = (
        stack * factor.reshape(-1, *(1,) * len(shape))
        for stack, factor in zip(stacks, factors, strict=True)
    )
    return jnp.concatenate([jnp.broadcast_to(s, (len(s), *shape)) for s in scaled])


def as_tensor(leaf: Tensor) -> Tensor:
    """Gives a scalar one axis, and a half-precision array the precision of accumulators."""
    array = jnp.atleast_1d(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"A learned optimizer was given an array of dtype {array.dtype}; params must be "
            "floating-point, try equinox.partition(model, equinox.is_inexact_array)[0]."
        )
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def _cast(theta: Theta, tensor: Tensor) -> Theta:
    return jax.tree.map(lambda weight: weight.astype(tensor.dtype), theta)
