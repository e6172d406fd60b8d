"""The words that every signature of lopt uses.

`Params` are the weights of a network, `Theta` those of a learned optimizer. Both are plain
pytrees of floating-point arrays, which is why one loop can train either.
"""

from typing import Literal, TypeAlias

from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Key: TypeAlias = PRNGKeyArray
Scalar: TypeAlias = Float[Array, ""]
Params: TypeAlias = PyTree[Float[Array, "..."]]
Theta: TypeAlias = PyTree[Float[Array, "..."]]
Batch: TypeAlias = PyTree
State: TypeAlias = PyTree
Record: TypeAlias = PyTree
Split: TypeAlias = Literal["train", "valid_inner", "valid_outer", "test"]

SPLITS: tuple[Split, ...] = ("train", "valid_inner", "valid_outer", "test")
