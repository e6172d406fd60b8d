"""Tensors that a learned optimizer works on together.

A program that repeats its operations for each of dozens of tensors takes long to compile. Tensors
of one shape are stacked and share a program; rules see them end to end. Large ones are worked on in
slabs, so that the dozens of features of their coordinates never exist at once.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lopt.core.devices import is_sharded
from lopt.core.types import Params, State

# 28 float32 features of this many coordinates take 3.7 MB, about what caches hold: slabs of a
# quarter of a million coordinates are bounded in memory too, but take nearly twice as long.
BLOCK_SIZE = 2**15
# What slabs are multiplied by, where a program is to be run by others than XLA.
SLABS: ContextVar[float] = ContextVar("SLABS", default=1.0)


def as_tensor(leaf: Array) -> Array:
    """Gives a half-precision array the precision of accumulators."""
    array = jnp.asarray(leaf)
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


def gradients(grads: Params, params: Params | None) -> list[Any]:
    """Returns the gradient of each leaf of params, None where it, or a tree around it, is None.

    Refuses gradients of other params, and names the first path that differs.
    """
    if params is None:
        raise ValueError("update(params=None): updates depend on params; pass them.")
    leaves = dict(jax.tree_util.tree_leaves_with_path(params))
    found = dict(jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda leaf: leaf is None))
    slopes = {path: slope for path, slope in found.items() if slope is not None}
    frozen = found.keys() - slopes.keys()
    for path in [*leaves, *slopes]:
        ours, theirs = (
            f"{jnp.shape(t[path])}" if path in t else "not there" for t in (leaves, slopes)
        )
        above = [path[:i] for i in range(len(path) + 1)] if path in leaves else []
        if ours != theirs and frozen.isdisjoint(above):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"update(grads) has another structure than params: grads{where} is {theirs}, "
                f"params{where} is {ours}; differentiate with respect to the same pytree."
            )
    return [slopes.get(path) for path in leaves]


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
    ends = tuple(itertools.pairwise([0, *itertools.accumulate(counts)]))
    return [stack] if len(ends) == 1 else _rows(stack, ends)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rows(stack: PyTree, ends: tuple[tuple[int, int], ...]) -> list[PyTree]:
    """Returns stack[i:j]. Every slice would be compiled, but parts of one shape share a gather."""

    def part(array: Array, i: int, j: int) -> Array:
        if is_sharded(array):
            return array[i:j]
        # The compiler would make a slice of a gather of one row.
        rows = array.reshape(-1, array.shape[-1] if math.prod(array.shape[1:-1]) > 1 else 1)
        indices = np.arange(len(rows), dtype=np.int32).reshape(len(array), -1)[i:j].reshape(-1, 1)
        how = jax.lax.GatherDimensionNumbers((1,), (0,), (0,)), (1, rows.shape[1])
        return jax.lax.gather(rows, indices, *how, mode="clip").reshape(-1, *array.shape[1:])

    return [jax.tree.map(eqx.Partial(part, i=i, j=j), stack) for i, j in ends]


@_rows.defjvp
def _(ends: tuple[tuple[int, int], ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    # Slices have a short transpose.
    slices = [jax.tree.map(lambda a, s=slice(i, j): a[s], *tangents) for i, j in ends]
    return _rows(*primals, ends), slices


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

    The function treats what lies along the axis alike and apart, and returns what is like `kept`
    last. Cut are arrays and results whose `axis`, counted from the end, has this `length`, into
    slabs of so many `rows`; the last may have less. Derivatives are those of everything at once.
    """
    # Traced once for all of the same shapes; but what is traced is remembered whatever `SLABS` is.
    call = functools.partial(eqx.filter_jit(function) if SLABS.get() == 1 else function)
    if rows >= length:
        return call(arrays, kept)

    def varies(array: Array) -> bool:
        return array.ndim >= -axis and array.shape[axis] == length

    def slab(carry: Any, first: Array, rows: int = rows) -> tuple[Any, None]:
        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, first, rows, axis) if varies(a) else a

        def put(a: Array, part: Array) -> Array:
            put = jax.lax.dynamic_update_slice_in_dim
            part = jnp.where(first >= 0, part, jnp.zeros((), a.dtype))
            return put(a, part, first, axis) if varies(a) else a + part

        # A branch, always taken: fused with what puts it in place, a slab is not vectorised. That
        # is fused with a selection: alone, it would be compiled for each tensor.
        slabs = jax.tree.map(cut, (arrays, carry[1]))
        done = jax.lax.cond(first >= 0, call, lambda *a: (zeros(*a), a[1]), *slabs)
        return jax.tree.map(put, carry, done), None

    def zeros(*given: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(call, *given)[0])

    firsts, rest = jnp.arange(length // rows, dtype=jnp.int32) * rows, length % rows
    carry, _ = jax.lax.scan(slab, (zeros(arrays, kept), kept), firsts)
    return slab(carry, jnp.asarray(length - rest, jnp.int32), rest)[0] if rest else carry


@in_slabs.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    return eqx.filter_jvp(lambda f, arrays, kept: f(arrays, kept), primals[:3], tangents[:3])


def slabs_of(shape: tuple[int, ...], block_size: int) -> tuple[int, int, int]:
    """Returns an axis, its length, and how much of it makes a slab of about `block_size`.

    The first axis that is long enough, so that slabs are contiguous; equally long slabs if they
    can be, as their program is compiled once.
    """
    if not shape or math.isinf(SLABS.get()):
        length = shape[-1] if shape else 1
        return -1, length, length
    size = max(1, math.prod(shape))
    coordinates = block_size * SLABS.get()
    enough = 4 * math.ceil(size / coordinates)
    axis = max(range(len(shape)), key=lambda axis: min(shape[axis], enough))
    length = shape[axis]
    most = min(length, max(1, int(coordinates * length / size)))
    near = [*range(most, most // 2, -1), *range(most + 1, min(length, 2 * most) + 1)]
    return axis - len(shape), length, next((rows for rows in near if not length % rows), most)
