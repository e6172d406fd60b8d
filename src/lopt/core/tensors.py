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
    if len(arrays) == 1:
        return arrays[0]
    flat = [array.reshape(*array.shape[:leading], -1) for array in arrays]
    return jnp.concatenate(flat, axis=-1)


def split(array: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Undoes `join`: returns arrays of these shapes, behind the leading axes of `array`."""
    if len(shapes) == 1:
        return [array]
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    parts = jnp.split(array, list(ends)[:-1], axis=-1)
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
def map_slabs(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    arrays: PyTree,
    kept: PyTree,
    shape: tuple[int, ...],
    block_size: int = BLOCK_SIZE,
) -> tuple[PyTree, PyTree]:
    """Returns `function(arrays, kept)`, computed over slabs of about `block_size` coordinates.

    What is kept is replaced in place. Derivatives are those of the function of everything at once.

    Args:
        function: elementwise in coordinates; returns arrays of `shape`, and what is like `kept`.
        arrays, kept: with tensors on the first axis, and behind others the axes of a tensor, or 1
            in place of one.
        shape: of a stack of tensors. Of small ones several are in a slab, others are cut along
            their longest axis.
        block_size: coordinates per slab; what fits is not cut.
    """
    count, *rest = shape
    size = math.prod(rest)
    if count * size <= block_size:
        return function(arrays, kept)
    axis = max(range(len(rest)), key=rest.__getitem__) - len(rest)
    several, length = _part(count, block_size // size), rest[axis]
    rows = length if size <= block_size else _part(length, block_size * length // size)

    def run(carry: Any, tensor: range, row: range, extent: tuple[int, int]) -> Any:
        firsts = jnp.asarray([(i, j) for i in tensor for j in row], jnp.int32).reshape(-1, 2)

        def place(array: Array, first: Array) -> tuple[list[Any], list[int]]:
            starts, sizes = [jnp.zeros((), jnp.int32)] * array.ndim, list(array.shape)
            starts[0], sizes[0] = first[0], extent[0]
            if array.ndim > len(rest) and array.shape[axis] == length:
                starts[axis], sizes[axis] = first[1], extent[1]
            return starts, sizes

        def body(carry: Any, first: Array) -> tuple[Any, None]:
            cut = lambda array: jax.lax.dynamic_slice(array, *place(array, first))  # noqa: E731
            slabs = function(*jax.tree.map(cut, (arrays, carry[1])))
            put = lambda a, slab: jax.lax.dynamic_update_slice(a, slab, place(a, first)[0])  # noqa: E731
            return jax.tree.map(put, carry, slabs), None

        return jax.lax.scan(body, carry, firsts)[0]

    like = jax.eval_shape(function, arrays, kept)[0]
    carry = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like), kept
    more, further = count % several, length % rows
    carry = run(
        carry, range(0, count - more, several), range(0, length - further, rows), (several, rows)
    )
    if more:
        carry = run(carry, range(count - more, count, more), range(1), (more, rows))
    if further:
        carry = run(carry, range(count), range(length - further, length, further), (1, further))
    return carry


@map_slabs.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    return eqx.filter_jvp(
        lambda function, arrays, kept, *_: function(arrays, kept), primals, tangents
    )


def _part(length: int, most: int) -> int:
    """Returns how long parts of at most `most` are: equally long ones, unless those were short."""
    most = max(1, min(length, most))
    return next((n for n in range(most, most // 2, -1) if not length % n), most)
