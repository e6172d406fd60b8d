"""Coordinatewise learned optimizers: one rule for every weight of every network.

Features and rule are exchangeable parts: this is the seam where a symbolic expression can take the
place of a network. The state looks like params; how tensors are grouped, laid end to end and cut
into slabs is a matter of one update's program.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.devices import is_sharded
from lopt.core.learned import (
    AbstractFeatures,
    AbstractLearnedOptimizer,
    AbstractRule,
    Columns,
    Tensor,
)
from lopt.core.tensors import (
    BLOCK_SIZE,
    Group,
    as_tensor,
    join,
    map_blocks,
    map_stack,
    mirror,
    split,
    unmirror,
)
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta, as_pytree


class CoordinatewiseState(eqx.Module):
    """The state of a coordinatewise optimizer.

    Attributes:
        step: the number of steps taken.
        features: the accumulators of one tensor, of which every array is a tree like params.
        memory: the rule's memory, likewise.

    Arrays have the shape of their leaf behind one bank axis, or lack one of its axes if they are
    factored; they are at least float32.
    """

    step: Int[Array, ""]
    features: State
    memory: State


class Inputs(eqx.Module):
    """What a rule was given at a step, for every coordinate of params in tree order.

    Attributes:
        columns: features that differ between coordinates, as the rule sees them: normalised if it
            has them so.
        shared: features that all coordinates share.
        memory: the rule's memory before the step, arrays with coordinates on their last axis.
    """

    columns: Float[Array, "column coordinate"]
    shared: Float[Array, " shared"]
    memory: State

    def at(self, coordinates: Int[Array, " chosen"]) -> "Inputs":
        """Returns the inputs of some coordinates; those of others than there are, are NaN."""

        def pick(array: Array) -> Array:
            return array.at[:, coordinates].get(mode="fill", fill_value=jnp.nan)

        return Inputs(pick(self.columns), self.shared, jax.tree.map(pick, self.memory))


class Coordinatewise(AbstractLearnedOptimizer):
    """One rule applied to every coordinate: update = scale(rule(features)).

    Attributes:
        features: what the rule sees.
        rule: features to outputs.
        scale: the rule's outputs, stacked in front, to the update that is added to the parameter.
        normalise: whether each column is given unit second moment over its tensor, that is
            multiplied by 1 / sqrt(1e-5 + <column^2>).
        block_size: the number of coordinates that a slab of a larger tensor has, about.
        stacked: names of keys or attributes of params, such as "blocks" or ("encoder", "decoder"):
            what lies below them holds tensors of its own along a first axis, one more for each name
            on the path, as layers do that are stacked for a scan.

    Theta is `{"features": ..., "rule": ...}`. Arithmetic is at least float32. Leaves without a
    gradient (None) have no update, and keep their state.
    """

    features: AbstractFeatures
    rule: AbstractRule
    scale: Callable[[Columns], Tensor] = eqx.field(converter=as_pytree)
    normalise: bool = eqx.field(static=True, default=True)
    block_size: int = eqx.field(static=True, default=BLOCK_SIZE)
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

        def one(tensor: Tensor) -> tuple[State, State]:
            memory = self.rule.begin(_cast(theta["rule"], tensor), tensor.shape)
            # The sum lies on devices as the tensor does.
            zero = jnp.zeros_like(tensor)[None]
            return self.features.begin(tensor), jax.tree.map(lambda m: m + zero, memory)

        leaves, groups, structure = self._flatten(params)
        zeros = [jnp.zeros_like(leaf) for leaf in leaves]
        states = [group.unstack(map_stack(one, (group.stack(zeros, 0),)), 1)[0] for group in groups]
        features, memory = mirror(states, self._like(theta), structure)
        return CoordinatewiseState(jnp.zeros((), jnp.int32), features, memory)

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
        parts, groups, structure = self._parts(theta, grads, state, params)
        updates = [None if part.grad is None else jnp.zeros_like(part.param) for part in parts]
        states = [(part.features, part.memory) for part in parts]
        moving = [i for i, part in enumerate(parts) if part.grad is not None and part.param.size]
        together: dict[Any, list[int]] = {}
        apart: dict[Any, list[int]] = {}
        for i in moving:
            param, group = parts[i].param, groups[i]
            sharded = is_sharded(param)
            if not sharded and math.prod(group.tensor) <= self.block_size:
                together.setdefault(param.dtype, []).append(i)
            else:
                # What is stacked already may be sharded along that axis, and stays as it is.
                own = i if sharded and group.count > 1 else jax.typeof(param).sharding
                apart.setdefault((group.tensor, param.dtype, own), []).append(i)
        for places in together.values():
            for i, update, new in self._together(theta, state.step, places, parts, groups):
                updates[i], states[i] = update, new
        for places in apart.values():
            for i, update, new in self._apart(theta, state.step, Group.of(places, groups), parts):
                updates[i], states[i] = update, new
        updates = [
            None if update is None else update.astype(jnp.result_type(leaf))
            for update, leaf in zip(updates, jax.tree.leaves(params), strict=True)
        ]
        features, memory = mirror(states, self._like(theta), structure)
        return structure.unflatten(updates), CoordinatewiseState(state.step + 1, features, memory)

    def inputs(
        self, theta: Theta, grads: Params, state: CoordinatewiseState, params: Params
    ) -> Inputs:
        """Returns what `update` would give the rule, for every coordinate.

        All features of all coordinates exist at once: of a million weights and 40 features, 160 MB.
        """
        parts, groups, _ = self._parts(theta, grads, state, params)
        dtype = jnp.result_type(*(part.param.dtype for part in parts))
        parts = [jax.tree.map(lambda leaf: leaf.astype(dtype), part) for part in parts]
        order, columns, _ = self._columns(theta, state.step, range(len(parts)), parts, groups)
        shapes = [parts[i].param.shape for i in order]
        in_order = sorted(zip(order, split(columns, shapes), strict=True), key=lambda pair: pair[0])
        memory = _join_trees([part.memory for part in parts])
        shared = self.features.shared(state.step, dtype)
        return Inputs(join([part for _, part in in_order], 1), shared, memory)

    def _together(
        self,
        theta: Theta,
        step: Int[Array, ""],
        places: list[int],
        parts: list["_Part"],
        groups: list[Group],
    ) -> Iterator[tuple[int, Tensor, tuple[State, State]]]:
        """Yields update and state of small tensors, to which the rule is applied once."""
        like = parts[places[0]].param
        order, columns, features = self._columns(theta, step, places, parts, groups)
        memory = _join_trees([parts[i].memory for i in order])
        weights, shared = _cast(theta["rule"], like), self.features.shared(step, like.dtype)
        outputs, memory = self.rule.apply(weights, columns, shared, memory)
        shapes = [parts[i].param.shape for i in order]
        states = zip(features, _split_tree(memory, shapes), strict=True)
        return zip(order, split(self.scale(outputs), shapes), states, strict=True)

    def _columns(
        self,
        theta: Theta,
        step: Int[Array, ""],
        places: Sequence[int],
        parts: list["_Part"],
        groups: list[Group],
    ) -> tuple[list[int], Columns, list[State]]:
        """Returns tensors in the order in which they are laid end to end, and what they have there.

        Those of one shape follow one another and share a program; columns are computed once for
        all.
        """
        weights = _cast(theta["features"], parts[places[0]].param)

        def update(grad: Tensor, old: State, param: Tensor) -> tuple[Any, State]:
            return self.features.update(weights, grad, old, param, step)

        alike: dict[tuple[int, ...], list[int]] = {}
        for i in places:
            alike.setdefault(groups[i].tensor, []).append(i)
        order, views, states = [], [], []
        for shape, same in alike.items():
            order += same
            group = Group.of(same, groups)
            view, new = map_stack(update, self._stacks(group, parts)[:3])
            states += group.unstack(new, 1)
            views.append(jax.tree.map(lambda x, of=shape: _end_to_end(x, of), view))
        view = jax.tree.map(_join_views, *views)
        total = sum(parts[i].param.size for i in order)
        stacks = self.features.columns(view)
        columns = jnp.concatenate([jnp.broadcast_to(s, (len(s), total)) for s in stacks])
        if self.normalise:
            counts: dict[tuple[int, ...], int] = {}
            for i in order:
                counts[groups[i].tensor] = counts.get(groups[i].tensor, 0) + groups[i].count
            runs = split(columns, [(count, math.prod(shape)) for shape, count in counts.items()])
            scaled = [run * self._factor(jnp.mean(run * run, -1, keepdims=True)) for run in runs]
            columns = join(scaled, 1)
        return order, columns, states

    def _apart(
        self, theta: Theta, step: Int[Array, ""], group: Group, parts: list["_Part"]
    ) -> Iterator[tuple[int, Tensor, tuple[State, State]]]:
        """Yields update and state of tensors that are large, or sharded over devices.

        Of large ones no more than a slab has its features at once. Sharded ones are not cut, as
        each device holds a part of them already.
        """
        like = parts[group.places[0]].param
        sharded = is_sharded(like)
        weights, shared = _cast(theta, like), self.features.shared(step, like.dtype)

        def one(
            grad: Tensor, old: State, param: Tensor, memory: State
        ) -> tuple[Tensor, State, State]:
            view, new = self.features.update(weights["features"], grad, old, param, step)

            def sums(arguments: Any) -> list[tuple[Tensor, ...]]:
                view, param = arguments
                return [tuple(_sums(stack, param)) for stack in self.features.columns(view)]

            def apply(arguments: Any) -> tuple[Tensor, State]:
                view, memory, param = arguments
                columns = _concatenate(self.features.columns(view), param, factors)
                outputs, memory = self.rule.apply(weights["rule"], columns, shared, memory)
                return self.scale(outputs), memory

            whole = sharded or self.rule.is_elementwise
            block_size = param.size if whole else self.block_size
            totals = map_blocks(sums, (view, param), param.shape, block_size)
            factors = [self._factor(jnp.stack(total) / param.size) for total in totals]
            update, memory = map_blocks(apply, (view, memory, param), param.shape, block_size)
            return update, new, memory

        stacks = self._stacks(group, parts)
        one_by_one = not (sharded and len(group.places) == 1)
        update, features, memory = map_stack(one, stacks, one_by_one)
        return zip(
            group.places,
            group.unstack(update, 0),
            zip(group.unstack(features, 1), group.unstack(memory, 1), strict=True),
            strict=True,
        )

    def _factor(self, moments: Tensor) -> Tensor:
        """Returns what gives features of these second moments unit ones, or ones."""
        return jax.lax.rsqrt(1e-5 + moments) if self.normalise else jnp.ones_like(moments)

    def _flatten(self, params: Params) -> tuple[list[Tensor], list[Group], Any]:
        """Returns params as tensors, each as a group of its own, and their structure."""
        paths, structure = jax.tree_util.tree_flatten_with_path(params)
        leaves = [as_tensor(leaf) for _, leaf in paths]
        groups = []
        for i, (path, _) in enumerate(paths):
            names = [jax.tree_util.keystr((key,), simple=True) for key in path]
            rank = leaves[i].ndim - sum(name in self.stacked for name in names)
            if rank < 0:
                raise ValueError(
                    f"Coordinatewise(stacked={self.stacked}) needs more axes than "
                    f"{jax.tree_util.keystr(path)} has, whose shape is {leaves[i].shape}; name "
                    "what holds stacked layers only."
                )
            groups.append(Group((i,), (leaves[i].shape,), rank))
        return leaves, groups, structure

    def _parts(
        self, theta: Theta, grads: Params, state: CoordinatewiseState, params: Params | None
    ) -> tuple[list["_Part"], list[Group], Any]:
        """Returns what belongs to each leaf of params."""
        if params is None:
            raise ValueError(
                "Coordinatewise.update(params=None): its features see the parameters; "
                "pass them, as in optimizer.update(grads, state, params)."
            )
        leaves, groups, structure = self._flatten(params)
        try:
            slopes = structure.flatten_up_to(grads)
        except ValueError as error:
            raise ValueError(
                f"Coordinatewise.update(grads) has structure {jax.tree.structure(grads)}, but "
                f"params has {structure}; differentiate with respect to the same pytree that is "
                "passed as params."
            ) from error
        for slope, leaf in zip(slopes, leaves, strict=True):
            if slope is not None and jnp.shape(slope) != leaf.shape:
                raise ValueError(
                    f"Coordinatewise.update(grads) has an array of shape {jnp.shape(slope)} where "
                    f"params has {leaf.shape}; pass the gradient at these params."
                )
        slopes = [
            None if slope is None else as_tensor(slope).astype(leaf.dtype)
            for slope, leaf in zip(slopes, leaves, strict=True)
        ]
        found = unmirror((state.features, state.memory), self._like(theta), structure)
        parts = [
            _Part(slope, features, leaf, memory)
            for slope, leaf, (features, memory) in zip(slopes, leaves, found, strict=True)
        ]
        return parts, groups, structure

    def _like(self, theta: Theta) -> tuple[State, State]:
        """Returns the state of one tensor, as shapes."""
        tensor = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        memory = jax.eval_shape(lambda theta: self.rule.begin(theta, (1, 1)), theta["rule"])
        return jax.eval_shape(self.features.begin, tensor), memory

    @staticmethod
    def _stacks(group: Group, parts: list["_Part"]) -> tuple[Any, ...]:
        """Returns gradients, accumulators, params and memory of a group's tensors."""
        columns = zip(*parts, strict=True)
        return tuple(group.stack(c, banks) for c, banks in zip(columns, (0, 1, 0, 1), strict=True))


class _Part(NamedTuple):
    """What belongs to one leaf of params."""

    grad: Tensor | None
    features: State
    param: Tensor
    memory: State


def _sums(stack: Columns, like: Tensor) -> Tensor:
    """Returns the sum over coordinates of the square of each feature of a stack."""
    # A stack with fewer entries than coordinates stands for several of them in each.
    times = like.size * len(stack) / stack.size
    return jnp.sum(stack * stack, axis=tuple(range(1, stack.ndim))) * times


def _concatenate(
    stacks: tuple[Columns, ...], like: Tensor, factors: list[Tensor] | None = None
) -> Columns:
    """Returns all features, each times its factor, for every coordinate of a tensor."""
    if factors is not None:
        scales = [factor.reshape(-1, *(1,) * like.ndim) for factor in factors]
        stacks = tuple(stack * scale for stack, scale in zip(stacks, scales, strict=True))
    # A sum with zeros, unlike a broadcast, lies on devices as the tensor does.
    zeros = jnp.zeros_like(like)[None]
    return jnp.concatenate([s if s.shape[1:] == like.shape else s + zeros for s in stacks])


def _end_to_end(array: Array, shape: tuple[int, ...]) -> Array:
    """Returns a view of a stack of tensors with all their coordinates on its last axis.

    A scalar, which all tensors share, stays one.
    """
    count, *rest = array.shape
    if len(rest) < len(shape):
        return array[0]
    lead = rest[: len(rest) - len(shape)]
    array = jnp.broadcast_to(array, (count, *lead, *shape))
    return jnp.moveaxis(array, 0, len(lead)).reshape(*lead, -1)


def _join_views(*arrays: Array) -> Array:
    return jnp.concatenate(arrays, axis=-1) if arrays[0].ndim and len(arrays) > 1 else arrays[0]


def _join_trees(trees: list[State]) -> State:
    """Returns trees with the coordinates of their arrays end to end, behind one bank axis."""
    return jax.tree.map(lambda *arrays: join(arrays, 1), *trees)


def _split_tree(tree: State, shapes: list[tuple[int, ...]]) -> list[State]:
    """Undoes `_join_trees`."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [split(leaf, shapes) for leaf in leaves]
    rows = zip(*columns, strict=True) if columns else [()] * len(shapes)
    return [structure.unflatten(row) for row in rows]


def _cast(theta: Theta, tensor: Tensor) -> Theta:
    return jax.tree.map(lambda weight: weight.astype(tensor.dtype), theta)
