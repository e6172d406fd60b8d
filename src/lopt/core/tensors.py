"""Tensors that a learned optimizer works on together.

A program that repeats its operations for each of dozens of tensors takes long to compile. Tensors
of one shape are stacked and share a program; rules see them end to end. Large ones are worked on in
slabs, so that the dozens of features of their coordinates never exist at once.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lopt.core.types import State

# 28 float32 features of this many coordinates take 3.7 MB, about what caches hold: slabs of a
# quarter of a million coordinates are bounded in memory too, but take nearly twice as long.
BLOCK_SIZE = 2**15


def as_tensor(leaf: Array) -> Array:
    """Gives a half-precision array the precision of accumulators; refuses integers."""
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"A learned optimizer was given an array of dtype {array.dtype}; params must be "
            "floating-point, try equinox.partition(model, equinox.is_inexact_array)[0]."
        )
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def join(arrays: Sequence[Array], leading: int = 0) -> Array:
    """Returns arrays end to end, behind `leading` axes that they have in common."""
    flat = [array.reshape(*array.shape[:leading], -1) for array in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)


def split(array: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Undoes `join`: returns arrays of these shapes, behind the leading axes of `array`."""
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    parts = [array] if len(shapes) == 1 else jnp.split(array, list(ends)[:-1], axis=-1)
    return [p.reshape(*array.shape[:-1], *shape) for p, shape in zip(parts, shapes, strict=True)]


def mirror(states: Sequence[State], like: State, structure: Any) -> State:
    """Returns states of all leaves of params, each like `like`, as one whose arrays are trees."""
    inner: Any = jax.tree.structure(like)
    columns = zip(*map(jax.tree.leaves, states), strict=True) if states else [()] * inner.num_leaves
    return inner.unflatten([structure.unflatten(column) for column in columns])


def unmirror(state: State, structure: Any) -> list[State]:
    """Undoes `mirror`, refusing a state of other params."""
    inner: Any
    trees, inner = jax.tree.flatten(state, is_leaf=lambda x: jax.tree.structure(x) == structure)
    try:
        columns = [structure.flatten_up_to(tree) for tree in trees]
    except ValueError as error:
        raise ValueError(
            "The state of a learned optimizer is not a state of these params; begin with "
            f"optimizer.init(params). {error}"
        ) from error
    rows = zip(*columns, strict=True) if columns else [()] * structure.num_leaves
    return [inner.unflatten(row) for row in rows]


class Stacking(NamedTuple):
    """How the arrays of a leaf of params are laid out, and how as a stack of tensors.

    A leaf is a stack of the tensors on its stacked `axes`, or of one; a scalar is worked on as a
    vector of one.
    """

    axes: tuple[int, ...]
    scalar: bool

    def stack(self, array: Array, banks: int = 0) -> Array:
        """Returns an array of the leaf, behind `banks` axes, with all tensors on a first axis."""
        array = array[..., None] if self.scalar else array
        if not self.axes:
            return jnp.expand_dims(array, 0)
        moved = jnp.moveaxis(array, 0, len(self.axes)) if banks else array
        return moved.reshape(math.prod(self.axes), *moved.shape[len(self.axes) :])

    def unstack(self, array: Array, banks: int = 0) -> Array:
        """Undoes `stack`."""
        if self.axes:
            array = array.reshape(*self.axes, *array.shape[1:])
            array = jnp.moveaxis(array, len(self.axes), 0) if banks else array
        else:
            array = jnp.squeeze(array, 0)
        return jnp.squeeze(array, -1) if self.scalar else array


def concatenate(stacks: Sequence[PyTree]) -> PyTree:
    """Returns stacks of tensors of one shape as one stack."""
    return jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *stacks)


def divide(stack: PyTree, counts: Sequence[int]) -> list[PyTree]:
    """Undoes `concatenate`: returns stacks of so many tensors each."""
    if len(counts) == 1:
        return [stack]
    ends = itertools.pairwise([0, *itertools.accumulate(counts)])
    return [jax.tree.map(lambda a, i=i, j=j: a[i:j], stack) for i, j in ends]


def end_to_end(array: Array, shape: tuple[int, ...]) -> Array:
    """Returns an array of a stack of tensors with all their coordinates on its last axis."""
    count, *rest = array.shape
    lead = rest[: len(rest) - len(shape)]
    array = jnp.broadcast_to(array, (count, *lead, *shape))
    return jnp.moveaxis(array, 0, len(lead)).reshape(*lead, -1)


def from_end_to_end(array: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `end_to_end`, if that repeated nothing."""
    lead = array.shape[:-1]
    return jnp.moveaxis(array.reshape(*lead, -1, *shape), len(lead), 0)


def map_stack(
    function: Callable[..., PyTree], arrays: tuple[PyTree, ...], one_by_one: bool = False
) -> PyTree:
    """Returns what a function makes of each tensor of stacks, stacked in front.

    With `one_by_one` they are worked on one after another, in the memory of one.
    """
    if jax.tree.leaves(arrays)[0].shape[0] == 1:
        alone = jax.tree.map(lambda array: jnp.squeeze(array, 0), arrays)
        return jax.tree.map(lambda array: jnp.expand_dims(array, 0), function(*alone))
    if one_by_one:
        return jax.lax.map(lambda each: function(*each), arrays)
    return jax.vmap(function)(*arrays)


def map_blocks(
    function: Callable[[PyTree], PyTree],
    arrays: PyTree,
    shape: tuple[int, ...],
    block_size: int = BLOCK_SIZE,
) -> PyTree:
    """Returns `function(arrays)`, computed over slabs of about `block_size` coordinates.

    Args:
        function: elementwise in coordinates. Scalars that it returns are summed over slabs.
        arrays: with `shape` as their last axes, or 1 in place of one; or scalars.
        shape: that of the tensor, which is cut along its longest axis.
        block_size: coordinates per slab; a tensor that fits is not cut.
    """
    size = math.prod(shape)
    if size <= block_size:
        return function(arrays)
    axis = max(range(len(shape)), key=shape.__getitem__) - len(shape)
    length = shape[axis]
    slabs = min(length, math.ceil(size / block_size))
    rows = math.ceil(length / slabs)

    def varies(array: Array) -> bool:
        return array.ndim >= len(shape) and array.shape[axis] == length

    def slab(first: Array | int, rows: int) -> PyTree:
        def cut(array: Array) -> Array:
            if not varies(array):
                return array
            return jax.lax.dynamic_slice_in_dim(array, first, rows, array.ndim + axis)

        return function(jax.tree.map(cut, arrays))

    whole = length // rows
    firsts = jnp.arange(whole, dtype=jnp.int32) * rows
    results = jax.lax.map(lambda first: slab(first, rows), firsts)
    results = jax.tree.map(lambda array: _merge(array, axis), results)
    if length % rows:
        rest = slab(whole * rows, length % rows)
        results = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis) if a.ndim else a + b, results, rest
        )
    return results


def _merge(array: Array, axis: int) -> Array:
    """Merges the leading axis of slabs into `axis` of what each slab returned."""
    if array.ndim == 1:
        return jnp.sum(array)
    array = jnp.moveaxis(array, 0, axis - 1)
    target = array.ndim + axis
    return array.reshape(*array.shape[: target - 1], -1, *array.shape[target + 1 :])
