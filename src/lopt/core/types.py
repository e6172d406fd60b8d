"""The words that every signature of lopt uses.

`Params` are the weights of a network, `Theta` those of a learned optimizer. Both are plain
pytrees of floating-point arrays, which is why one loop can train either.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal, TypeAlias

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

Key: TypeAlias = PRNGKeyArray
Scalar: TypeAlias = Float[Array, ""]
Params: TypeAlias = PyTree[Float[Array, "..."]]
Theta: TypeAlias = PyTree[Float[Array, "..."]]
Batch: TypeAlias = PyTree
State: TypeAlias = PyTree
Record: TypeAlias = PyTree
NumSteps: TypeAlias = int | Int[Array, ""] | None
Split: TypeAlias = Literal["train", "valid_inner", "valid_outer", "test"]

SPLITS: tuple[Split, ...] = ("train", "valid_inner", "valid_outer", "test")


def as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a plain function as a pytree without arrays, and any other callable as it is."""
    plain = type(function) in (FunctionType, MethodType, partial)
    return jax.tree_util.Partial(function) if plain else function
