"""Tensors that a learned optimizer works on together.

A program that repeats its operations for each of dozens of tensors takes long to compile. Tensors
of one shape are stacked and share a program; rules see them end to end. Large ones are worked on in
slabs, so that the dozens of features of their coordinates never exist at once.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
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


@eqx.filter_custom_jvp
def in_slabs(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    arrays: PyTree,
    kept: PyTree,
    axis: int,
    length: int,
    rows: int,
) -> tuple[PyTree, PyTree]:
    """Returns `function(arrays, kept)`, computed over slabs of an axis, kept replaced in place.

    Derivatives are those of the function of everything at once.

    Args:
        function: treats what lies along the axis alike and apart; returns what is like `kept` last.
        arrays: those whose `axis` has this `length` are cut.
        kept: is cut like them, and results are.
        axis: where it is, from the end for arrays of different ranks.
        length: how long it is.
        rows: how much of it is in a slab; the last may have less.
    """
    if rows >= length:
        return function(arrays, kept)

    def varies(array: Array) -> bool:
        return array.ndim >= -axis and array.shape[axis] == length

    def slab(carry: Any, first: Array, rows: int) -> Any:
        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, first, rows, axis) if varies(a) else a

        def put(a: Array, part: Array) -> Array:
            put = jax.lax.dynamic_update_slice_in_dim
            return put(a, part, first, axis) if varies(a) else a + part

        # A branch, always taken: fused with what puts it in place, a slab is not vectorised.
        slabs = jax.tree.map(cut, (arrays, carry[1]))
        done = jax.lax.cond(first >= 0, lambda *a: function(*a), lambda *a: zeros(*a), *slabs)
        return jax.tree.map(put, carry, done)

    def zeros(arrays: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
        like = jax.eval_shape(function, arrays, kept)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    firsts, rest = jnp.arange(length // rows, dtype=jnp.int32) * rows, length % rows
    carry = zeros(arrays, kept)[0], kept
    carry, _ = jax.lax.scan(lambda carry, first: (slab(carry, first, rows), None), carry, firsts)
    return slab(carry, jnp.asarray(length - rest, jnp.int32), rest) if rest else carry


@in_slabs.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    return eqx.filter_jvp(lambda f, arrays, kept: f(arrays, kept), primals[:3], tangents[:3])


def slabs_of(shape: tuple[int, ...], block_size: int) -> tuple[int, int, int]:
    """Returns an axis, its length, and how much of it makes a slab of about `block_size`.

    The first axis that is long enough, so that slabs are contiguous; equally long slabs if they
    can be, as their program is compiled once.
    """
    if not shape:
        return -1, 1, 1
    size = max(1, math.prod(shape))
    enough = 4 * math.ceil(size / block_size)
    axis = max(range(len(shape)), key=lambda axis: min(shape[axis], enough))
    length = shape[axis]
    most = min(length, max(1, block_size * length // size))
    near = [*range(most, most // 2, -1), *range(most + 1, min(length, 2 * most) + 1)]
    return axis - len(shape), length, next((rows for rows in near if not length % rows), most)
