"""Parameters as matrices: which axes of a tensor are read and which are written, as Muon asks.

The direction of a step does not depend on which of the two is which, but its size does.
"""

import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from lopt.core.types import Params

Matrices = Float[Array, "stack rows columns"]


class MatrixAxes(eqx.Module):
    """Which axes of each tensor make a matrix: dimension numbers for `optax.contrib.muon`, too.

    Those of higher rank than two are kernels of convolutions: one axis is the output, the last or
    the first, and all others are read. Vectors and scalars are no matrices, nor, by name, are
    embeddings, biases and the like of any rank.

    Attributes:
        layout: "in_out" as in Flax, Haiku, Keras and Optax; "out_in" as in Equinox and PyTorch.
        stacked: names below each of which tensors have one more axis in front, as for a scan.
        vectors: what is below a name with one of these words is no matrix, see `has_word`.
    """

    layout: str = eqx.field(static=True, default="in_out")
    stacked: tuple[str, ...] = eqx.field(static=True, default=())
    vectors: tuple[str, ...] = eqx.field(
        static=True, default=("embed", "position", "bias", "scale", "shift")
    )

    def __check_init__(self) -> None:
        if self.layout not in ("in_out", "out_in"):
            raise ValueError(f"MatrixAxes(layout={self.layout!r}) must be in_out or out_in.")

    def __call__(self, params: Params) -> Any:
        """Returns dimension numbers for each tensor, None for those that are no matrices."""

        def one(path: Any, leaf: Array) -> MuonDimensionNumbers | None:
            names = [jax.tree_util.keystr((key,), simple=True) for key in path]
            first = sum(name in self.stacked for name in names)
            if any(has_word(name, self.vectors) for name in names) or jnp.ndim(leaf) - first < 2:
                return None
            axes = tuple(range(first, jnp.ndim(leaf)))
            in_out = MuonDimensionNumbers(axes[:-1], axes[-1:])
            return in_out if self.layout == "in_out" else MuonDimensionNumbers(axes[1:], axes[:1])

        return jax.tree_util.tree_map_with_path(one, params)


def has_word(name: str, words: tuple[str, ...]) -> bool:
    """Whether a name has a word by itself, as `upscale` has no "scale"; or "embed" anywhere."""
    name = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    alone = [rf"(?<![a-z]){re.escape(word.lower())}(s|es|al)?(?![a-z])" for word in words]
    return any(re.search(one, name) for one in alone) or ("embed" in words and "embed" in name)


class View(eqx.Module):
    """How a tensor is seen as a stack of matrices, or as itself in a stack of one.

    Attributes:
        kind: "matrix", "kernel", "embedding" or "vector".
        order, shape: of its axes, before they are reshaped to `sizes`; () for no matrices.
        sizes: numbers of matrices, rows and columns; either of the last two are outputs.
        fan_in, fan_out: what is read and written.
    """

    kind: str = eqx.field(static=True)
    order: tuple[int, ...] = eqx.field(static=True, default=())
    shape: tuple[int, ...] = eqx.field(static=True, default=())
    sizes: tuple[int, ...] = eqx.field(static=True, default=())
    fan_in: int = eqx.field(static=True, default=1)
    fan_out: int = eqx.field(static=True, default=1)

    @classmethod
    def of(cls, leaf: Array, numbers: MuonDimensionNumbers | None) -> "View":
        """Returns the view of a tensor with these dimension numbers."""
        if numbers is None:
            return cls("embedding" if leaf.ndim > 1 else "vector", sizes=(1, *leaf.shape))
        read, written = (
            tuple(axis % leaf.ndim for axis in ((axes,) if isinstance(axes, int) else axes))
            for axes in numbers
        )
        batch = tuple(axis for axis in range(leaf.ndim) if axis not in read + written)
        first, last = (written, read) if min(written) < min(read) else (read, written)
        order = batch + first + last
        sizes = tuple(math.prod(leaf.shape[a] for a in axes) for axes in (batch, first, last))
        fans = (max(1, math.prod(leaf.shape[a] for a in axes)) for axes in (read, written))
        shape = tuple(leaf.shape[axis] for axis in order)
        return cls("kernel" if len(read) > 1 else "matrix", order, shape, sizes, *fans)

    def stack(self, array: Array) -> Array:
        """Returns the matrices of a tensor on the first axis."""
        return (array.transpose(self.order) if self.order else array).reshape(self.sizes)

    def unstack(self, array: Array) -> Array:
        """Undoes `stack`."""
        if not self.order:
            return array.reshape(self.sizes[1:])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return array.reshape(self.shape).transpose(back)


# Of Optax's Muon.
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def orthogonalised(
    matrices: Float[Array, "... rows columns"],
    coefficients: Float[Array, "3"] | tuple[float, float, float] = COEFFICIENTS,
) -> Float[Array, "... rows columns"]:
    """Returns matrices with singular values near one, by five steps of Newton and Schulz.

    It computes what `optax.contrib.muon` does. The norm is taken of the product that is needed
    anyway: XLA would compute the matrices twice, the second time slowly, for a sum of squares.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalised(matrices.mT, coefficients).mT
    product = matrices @ matrices.mT
    square = jnp.trace(product, axis1=-2, axis2=-1)[..., None, None]
    scale = jax.lax.rsqrt(square + 1e-16)
    matrices, product = scale * matrices, scale * scale * product
    first, third, fifth = coefficients
    for step in range(5):
        product = matrices @ matrices.mT if step else product
        matrices = first * matrices + (third * product + fifth * product @ product) @ matrices
    return matrices
