"""Coordinatewise learned optimizers: one rule for every weight of every network.

Features and rule are exchangeable parts: this is the seam where a symbolic expression can take the
place of a network. The state looks like params; how tensors are grouped, laid end to end and cut
into slabs is a matter of one update's program.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
from typing_extensions import override

from lopt.core import tensors
from lopt.core.devices import is_sharded
from lopt.core.learned import (
    AbstractFeatures,
    AbstractLearnedOptimizer,
    AbstractRule,
    Columns,
    Tensor,
)
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta, as_pytree

# Tensors of more coordinates than this cost more to copy than another application of a rule does.
SMALL = 1024


class CoordinatewiseState(eqx.Module):
    """The number of steps taken, and the accumulators and memory of one tensor.

    In place of each array is a tree like params of arrays, of at least float32, with the shape of
    their leaf behind one bank axis, or without one of its axes if they are factored.
    """

    step: Int[Array, ""]
    features: State
    memory: State


class Inputs(eqx.Module):
    """What a rule was given at a step, for every coordinate of params in tree order.

    Columns are as the rule sees them, normalised or not; memory is that before the step.
    """

    columns: Float[Array, "column coordinate"]
    shared: Float[Array, " shared"]
    memory: State

    def at(self, coordinates: Int[Array, " chosen"]) -> "Inputs":
        """Returns the inputs of some coordinates, NaN for those that there are not."""

        def pick(array: Array) -> Array:
            return array.at[:, coordinates].get(mode="fill", fill_value=jnp.nan)

        return Inputs(pick(self.columns), self.shared, jax.tree.map(pick, self.memory))


class Coordinatewise(AbstractLearnedOptimizer):
    """One rule applied to every coordinate: update = scale(rule(features)).

    Attributes:
        features, rule: what the rule sees, and what it makes of that.
        scale: the rule's outputs, stacked in front, to the update that is added to the parameter.
        normalise: whether each column is multiplied by 1 / sqrt(1e-5 + <column^2>) of its tensor.
        block_size: how many coordinates a slab of a larger tensor has, about; an eighth if there
            is a memory.
        stacked: names of keys or attributes of params, such as "blocks" or ("encoder", "decoder"):
            what lies below them holds tensors of its own along a first axis, one more for each name
            on the path, as layers do that are stacked for a scan.

    Theta is `{"features": ..., "rule": ...}`. Arithmetic is at least float32.
    """

    features: AbstractFeatures
    rule: AbstractRule
    scale: Callable[[Columns], Tensor] = eqx.field(converter=as_pytree)
    normalise: bool = eqx.field(static=True, default=True)
    block_size: int = eqx.field(static=True, default=tensors.BLOCK_SIZE)
    stacked: tuple[str, ...] = eqx.field(
        static=True, default=(), converter=lambda s: (s,) if isinstance(s, str) else tuple(s)
    )

    def __check_init__(self) -> None:
        required, names = self.rule.required_features, self.features.names()
        if required is not None and required != names:
            raise ValueError(
                f"Coordinatewise(rule) was made for the features {', '.join(required)}, but is "
                f"given {', '.join(names)}; use the features that it was made for."
            )

    @override
    def init(self, key: Key) -> Theta:
        features_key, rule_key = jax.random.split(key)
        return {"features": self.features.init(features_key), "rule": self.rule.init(rule_key)}

    @override
    def begin(
        self, theta: Theta, params: Params, num_steps: NumSteps = None
    ) -> CoordinatewiseState:
        def one(tensor: Tensor) -> tuple[State, State]:
            memory = self.rule.begin(_cast(theta["rule"], tensor), tensor.shape)
            # The sum lies on devices as the tensor does.
            zero = jnp.zeros_like(tensor)[None]
            return self.features.begin(tensor), jax.tree.map(lambda m: m + zero, memory)

        leaves, hows, structure = self._flatten(params)
        states = [
            tensors.map_stack(one, (how.stack(jnp.zeros_like(leaf)),))
            for how, leaf in zip(hows, leaves, strict=True)
        ]
        return self._state(theta, jnp.zeros((), jnp.int32), states, hows, structure)

    @override
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
        stacks, hows, structure = self._stacks(theta, grads, state, params)
        # Without coordinates there is nothing to compute.
        done: list[Any] = [(stack.grad, stack.features, stack.memory) for stack in stacks]
        alike: dict[Any, list[int]] = {}
        for i, stack in enumerate(stacks):
            if stack.param.size:
                kind: Any = stack.param.dtype, stack.param.shape[1:]
                if jax.tree.leaves(stack.memory) and not stack.is_small():
                    kind += (i,)  # a stack would be a copy of all memory
                if is_sharded(stack.param):
                    # What is stacked already may be sharded along that axis, and stays as it is.
                    kind += jax.typeof(stack.param).sharding, len(stack.param) > 1 and i
                alike.setdefault(kind, []).append(i)
        groups = [tensors.concatenate([stacks[i] for i in same]) for same in alike.values()]
        for same, found in zip(alike.values(), self._work(theta, state.step, groups), strict=True):
            parts = tensors.divide(found, [len(stacks[i].param) for i in same])
            for i, part in zip(same, parts, strict=True):
                done[i] = part
        updates = [
            how.unstack(one).astype(jnp.result_type(leaf))
            for (one, *_), how, leaf in zip(done, hows, jax.tree.leaves(params), strict=True)
        ]
        new = self._state(theta, state.step + 1, [one[1:] for one in done], hows, structure)
        return structure.unflatten(updates), new

    def inputs(
        self, theta: Theta, grads: Params, state: CoordinatewiseState, params: Params
    ) -> Inputs:
        """Returns what `update` would give the rule: all features of all coordinates at once."""
        stacks, _, _ = self._stacks(theta, grads, state, params)
        dtype = max((stack.param.dtype for stack in stacks), key=lambda dtype: dtype.itemsize)
        stacks = [jax.tree.map(lambda leaf: leaf.astype(dtype), stack) for stack in stacks]
        seen = [self._see(theta, state.step, stack)[0] for stack in stacks]
        columns = _join([one.columns() for one in seen])
        memory = _join([_behind(stack.memory) for stack in stacks])
        return Inputs(columns, self.features.shared(state.step, dtype), memory)

    def _work(
        self, theta: Theta, step: Int[Array, ""], groups: list["_Stack"]
    ) -> list[tuple[Tensor, State, State]]:
        """Returns updates and states of groups, each of which is a stack of tensors."""
        done: dict[int, tuple[Tensor, State, State]] = {}
        small: dict[Any, list[int]] = {}
        for i, group in enumerate(groups):
            if group.is_small() and not is_sharded(group.param):
                small.setdefault(group.param.dtype, []).append(i)
            else:  # one after another
                count, work = len(group.param), eqx.Partial(self._stack, theta, step)
                cut = 0, count, count if is_sharded(group.param) else 1
                update, state = tensors.in_slabs(work, group[:2], group[2:], *cut)
                done[i] = update, *state
        for same in small.values():
            done |= zip(same, self._together(theta, step, [groups[i] for i in same]), strict=True)
        return [done[i] for i in range(len(groups))]

    def _together(
        self, theta: Theta, step: Int[Array, ""], groups: list["_Stack"]
    ) -> list[tuple[Tensor, State, State]]:
        """Returns updates and states of small tensors, which the rule sees end to end."""
        seen = [self._see(theta, step, group) for group in groups]
        memory = _join([_behind(group.memory) for group in groups])
        columns = _join([one.columns() for one, _ in seen])
        found = self._over(eqx.Partial(self._apply, theta, step), columns, memory, columns[0])
        parts = jax.tree.map(lambda a: tensors.split(a, [g.param.shape for g in groups]), found)
        own = jax.tree.transpose(jax.tree.structure(found), None, parts)
        return [(u, new, _behind(m)) for (u, m), (_, new) in zip(own, seen, strict=True)]

    def _stack(
        self, theta: Theta, step: Int[Array, ""], given: tuple[Tensor, Tensor], kept: State
    ) -> tuple[Tensor, State]:
        """Returns updates and states of tensors of one shape."""
        group = _Stack(*given, *kept)
        seen, new = self._see(theta, step, group)
        work = eqx.Partial(self._slab, theta, step)  # memory is turned slab by slab: no copy of it
        update, memory = self._over(work, seen, group.memory, group.param[0])
        return update, (new, memory)

    def _over(self, function: Any, arrays: Any, kept: State, param: Tensor) -> Any:
        """Returns what a function makes of a tensor, in slabs if it is large."""
        # Memories are as large as dozens of features.
        size = math.ceil(self.block_size / 8) if jax.tree.leaves(kept) else self.block_size
        whole = is_sharded(param) or self.rule.is_elementwise
        cut = tensors.slabs_of(param.shape, param.size if whole else size)
        return tensors.in_slabs(function, arrays, kept, *cut)

    def _slab(self, theta: Theta, step: Array, seen: Any, memory: State) -> tuple[Tensor, State]:
        update, memory = self._apply(theta, step, seen.columns(), _behind(memory))
        return update, _behind(memory)

    def _apply(
        self, theta: Theta, step: Int[Array, ""], columns: Columns, memory: State
    ) -> tuple[Tensor, State]:
        """Returns the update and the next memory of some coordinates."""
        shared = self.features.shared(step, columns.dtype)
        outputs, memory = self.rule.apply(_cast(theta["rule"], columns), columns, shared, memory)
        return self.scale(outputs), memory

    def _see(self, theta: Theta, step: Int[Array, ""], group: "_Stack") -> tuple["_Seen", State]:
        """Returns what the rule sees of a stack of tensors, and next accumulators."""
        weights = _cast(theta["features"], group.param)

        def one(grad: Tensor, param: Tensor, old: State) -> tuple[Any, ...]:
            view, new = self.features.update(weights, grad, old, param, step)
            sums = eqx.Partial(_sums, self.features)
            squares, _ = self._over(sums, (view, param), (), param)
            scale = jax.lax.rsqrt if self.normalise else jnp.ones_like
            factors = [scale(1e-5 + square / param.size) for square in squares]
            return view, [factor.reshape(-1, *(1,) * param.ndim) for factor in factors], new

        view, factors, new = tensors.map_stack(one, group[:3])
        return _Seen(self.features, view, factors, group.param), new

    def _flatten(self, params: Params) -> tuple[list[Tensor], list[tensors.Stacking], Any]:
        """Returns params as tensors, how each is stacked, and their structure."""
        paths, structure = jax.tree_util.tree_flatten_with_path(params)
        leaves, hows = [tensors.as_tensor(leaf) for _, leaf in paths], []
        for leaf, (path, _) in zip(leaves, paths, strict=True):
            names = [jax.tree_util.keystr((key,), simple=True) for key in path]
            axes = sum(name in self.stacked for name in names)
            if axes > leaf.ndim:
                where = f"{jax.tree_util.keystr(path)} has, whose shape is {leaf.shape}"
                raise ValueError(
                    f"Coordinatewise(stacked={self.stacked}) needs more axes than {where}; name "
                    "what holds stacked layers only."
                )
            hows.append(tensors.Stacking(leaf.shape[:axes], axes == leaf.ndim))
        return leaves, hows, structure

    def _stacks(
        self, theta: Theta, grads: Params, state: CoordinatewiseState, params: Params | None
    ) -> tuple[list["_Stack"], list[tensors.Stacking], Any]:
        """Returns what belongs to each leaf of params, as a stack of tensors."""
        slopes = tensors.gradients(grads, params)
        leaves, hows, structure = self._flatten(params)
        states = tensors.unmirror((state.features, state.memory), structure)
        stacks = []
        for leaf, how, slope, old in zip(leaves, hows, slopes, states, strict=True):
            grad = how.stack(tensors.as_tensor(slope).astype(leaf.dtype))
            features, memory = jax.tree.map(lambda array, how=how: how.stack(array, 1), old)
            stacks.append(_Stack(grad, how.stack(leaf), features, memory))
        return stacks, hows, structure

    def _state(
        self, theta: Theta, step: Array, states: list[Any], hows: list[Any], structure: Any
    ) -> CoordinatewiseState:
        """Returns the state of these stacks, in trees like params, even if those have no leaves."""
        own = [
            jax.tree.map(lambda array, how=how: how.unstack(array, 1), one)
            for how, one in zip(hows, states, strict=True)
        ]
        like: Any = own[0] if own else None
        if not own:
            memory = jax.eval_shape(lambda theta: self.rule.begin(theta, (1, 1)), theta["rule"])
            tensor = jax.ShapeDtypeStruct((1, 1), jnp.float32)
            like = jax.eval_shape(self.features.begin, tensor), memory
        return CoordinatewiseState(step, *tensors.mirror(own, like, structure))


class _Stack(NamedTuple):
    """What belongs to a stack of tensors of one shape, which are on the first axis of all."""

    grad: Tensor
    param: Tensor
    features: State
    memory: State

    def is_small(self) -> bool:
        return math.prod(self.param.shape[1:]) <= SMALL


class _Seen(eqx.Module):
    """What the columns of a stack of tensors are made of."""

    features: AbstractFeatures
    views: Any
    factors: list[Tensor]
    param: Tensor

    def columns(self) -> Columns:
        """Returns all features, each times its factor, and behind them tensors."""

        def one(view: Any, factors: list[Tensor], param: Tensor) -> list[Columns]:
            # A sum with zeros, unlike a broadcast, lies on devices as the tensor does.
            zeros, stacks = jnp.zeros_like(param)[None], self.features.columns(view)
            scaled = [stack * factor for stack, factor in zip(stacks, factors, strict=True)]
            return [s if s.shape[1:] == param.shape else s + zeros for s in scaled]

        seen = self.views, self.factors, self.param
        if len(self.param) > 1:
            stacks = jax.vmap(one, out_axes=1)(*seen)
        else:
            stacks = [s[:, None] for s in one(*jax.tree.map(lambda array: array[0], seen))]
        # The compiler looks through a concatenation if what it indexes is the axis in front.
        return jnp.concatenate(stacks)


def _sums(features: AbstractFeatures, seen: Any, kept: tuple[()]) -> tuple[list[Tensor], tuple[()]]:
    """Returns the sum over coordinates of the square of each feature."""
    view, param = seen

    def one(stack: Columns) -> Tensor:
        # A stack with fewer entries than coordinates stands for several of them in each.
        times = param.size * len(stack) / max(stack.size, 1)
        return jnp.sum(stack * stack, axis=tuple(range(1, stack.ndim))) * times

    return [one(stack) for stack in features.columns(view)], kept


def _join(parts: Iterable[PyTree]) -> PyTree:
    return jax.tree.map(lambda *arrays: tensors.join(arrays, 1), *parts)


def _behind(memory: State) -> State:
    """Exchanges the axes of tensors and of banks."""
    return jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), memory)


def _cast(theta: Theta, tensor: Tensor) -> Theta:
    return jax.tree.map(lambda weight: weight.astype(tensor.dtype), theta)
