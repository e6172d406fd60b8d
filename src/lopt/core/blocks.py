"""Elementwise work on large tensors in bounded memory.

A learned optimizer looks at every coordinate of a tensor through dozens of features. Held at
once, those of ten million weights take gigabytes; `map_blocks` computes them a slab at a time.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

# 28 float32 features of this many coordinates take 3.7 MB, about what caches hold: slabs of a
# quarter of a million coordinates are bounded in memory too, but take nearly twice as long.
BLOCK_SIZE = 2**15


def map_blocks(
    function: Callable[[PyTree], PyTree],
    arrays: PyTree,
    shape: tuple[int, ...],
    block_size: int = BLOCK_SIZE,
) -> PyTree:
    """Returns `function(arrays)`, computed over slabs of about `block_size` coordinates.

    Args:
        function: elementwise in the coordinates. Arrays that it returns with `shape` as their last
            axes come back whole; scalars that it returns are summed over slabs.
        arrays: a pytree of arrays whose last axes are `shape`, or 1 in its place, after any
            leading axes; or of scalars.
        shape: the shape of the tensor.
        block_size: coordinates per slab. A slab is never thinner than one index of the longest
            axis. A tensor that fits is not cut at all.
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
    results = jax.tree.map(lambda array: _join(array, axis), results)
    if length % rows:
        rest = slab(whole * rows, length % rows)
        results = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis) if a.ndim else a + b, results, rest
        )
    return results


def _join(array: Array, axis: int) -> Array:
    """Merges the leading axis of slabs into `axis` of what each slab returned."""
    if array.ndim == 1:
        return jnp.sum(array)
    array = jnp.moveaxis(array, 0, axis - 1)
    target = array.ndim + axis
    return array.reshape(*array.shape[: target - 1], -1, *array.shape[target + 1 :])
