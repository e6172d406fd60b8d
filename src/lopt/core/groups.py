"""Tensors that a learned optimizer works on together.

A network has dozens of small tensors, and a program that repeats the same few operations for each
of them takes long to compile. Laid end to end they need those operations once.
"""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array


def join(arrays: Sequence[Array], like: Sequence[Array] | None = None) -> Array:
    """Returns the arrays of several tensors end to end, or that of a single one as it is.

    Args:
        arrays: one array for each tensor, whose last axes broadcast to the tensor's shape, behind
            any leading axes, of which all have the same.
        like: the tensors, or anything of their shapes; by default the arrays themselves.
    """
    if len(arrays) == 1:
        return arrays[0]
    return jnp.concatenate(
        [_flatten(a, t.shape) for a, t in zip(arrays, like or arrays, strict=True)], axis=-1
    )


def split(array: Array, tensors: Sequence[Array]) -> list[Array]:
    """Undoes `join`: returns what each of the tensors has of `array`, behind its leading axes."""
    if len(tensors) == 1:
        return [array]
    ends = itertools.accumulate(tensor.size for tensor in tensors)
    parts = jnp.split(array, list(ends)[:-1], axis=-1)
    leading = array.shape[:-1]
    return [p.reshape(*leading, *t.shape) for p, t in zip(parts, tensors, strict=True)]


def _flatten(array: Array, shape: tuple[int, ...]) -> Array:
    leading = array.shape[: array.ndim - len(shape)]
    return jnp.broadcast_to(array, leading + shape).reshape(*leading, math.prod(shape))
