"""Where in the params a symmetry acts: which arrays, and which of their slices belong to a unit.

Arrays are named by their path as `jax.tree_util.keystr` prints it, so that one description fits
dicts, tuples and Equinox modules alike.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lopt.core.checks import is_real
from lopt.core.types import Params

Tensor = Float[Array, "..."]
Units = Float[Array, " unit"]
Keys = Key[Array, " batch"]


class Place(eqx.Module):
    """The slices of one array that the units of a symmetry own.

    Attributes:
        path: of the array, such as ".layers[0].weight" or "['w']".
        axis: the axis that counts units, or None if one unit owns the whole array.
        coefficient: of this array in the generator, such as +1 for what leads into a unit and
            -degree for what leads out of it.
        view: the shape to see the array in before `axis` is counted, by default its own. A dense
            layer behind m positions of n channels has a row of m n entries, seen as (m, n).
        first: the unit that owns the first slice.
        slices: how many units own a slice of this array; by default all from `first` on. A
            translation has a unit for each column of a weight, and one more for the bias.
    """

    path: str = eqx.field(static=True)
    axis: int | None = eqx.field(static=True, default=0)
    coefficient: float = eqx.field(static=True, default=1.0)
    view: tuple[int, ...] | None = eqx.field(static=True, default=None)
    first: int = eqx.field(static=True, default=0)
    slices: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not is_real(self.coefficient) or not 0 < abs(self.coefficient) < math.inf:
            raise ValueError(
                f"Place({self.path!r}, coefficient={self.coefficient!r}) must be a finite number "
                "and not zero; try 1.0 for what leads into a unit and -1.0 for what leads out."
            )

    def spread(self, amounts: Units, array: Tensor) -> Tensor:
        """Returns an array of the shape of `array`, each entry the amount of its owner."""
        amounts = amounts.astype(array.dtype)
        if self.axis is None:
            return jnp.broadcast_to(amounts[self.first], array.shape)
        view = self.view or array.shape
        count = view[self.axis]
        own = amounts[self.first : self.first + count]
        along_axis = [count if axis == self.axis else 1 for axis in range(len(view))]
        return jnp.broadcast_to(own.reshape(along_axis), view).reshape(array.shape)

    def gather(self, array: Tensor, units: int) -> Units:
        """Returns for each of `units` units the sum of the entries it owns: `spread` transposed."""
        if self.axis is None:
            sums = jnp.sum(array)[None]
        else:
            seen = array.reshape(self.view or array.shape)
            if self.axis == 0:
                # A product adds many numbers at a time, where a sum on a CPU adds one by one.
                rows = seen.reshape(len(seen), -1)
                ones = jnp.ones(rows.shape[1], rows.dtype)
                sums = jnp.matmul(rows, ones, precision=jax.lax.Precision.HIGHEST)
            else:
                sums = jnp.sum(seen, axis=tuple(a for a in range(seen.ndim) if a != self.axis))
        # Not `zeros.at[...].add`, a scatter, which takes as long as a layer of a small network.
        return jnp.pad(sums, (self.first, units - self.first - len(sums)))

    def check(self, owner: str, array: Tensor, units: int) -> None:
        """Refuses an array that has not the slices that this place speaks of."""
        if not 0 <= self.first < units:
            raise ValueError(
                f"{owner} has {units} units, but Place({self.path!r}, first={self.first}) begins "
                f"with none of them; try one from 0 to {units - 1}."
            )
        view = self.view or array.shape
        fits = math.prod(view) == array.size
        if self.axis is None:
            wanted = "can be seen so"
        else:
            slices = units - self.first if self.slices is None else self.slices
            wanted = f"has {slices} slices on axis {self.axis}"
            # Fewer would do for the sums, but then units would be left without what they own.
            fits = fits and 0 <= self.axis < len(view) and view[self.axis] == slices
            fits = fits and self.first + slices <= units
        if not fits:
            raise ValueError(
                f"{owner} needs an array at {self.path!r} which, seen as {view}, {wanted}; it "
                f"has shape {array.shape}. Try building the symmetry from these params."
            )


def leaves_by_path(params: Params) -> dict[str, Tensor]:
    """Returns the arrays of some params by their paths, in the order of the tree."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def array_at(owner: str, leaves: dict[str, Tensor], path: str) -> Tensor:
    """Returns one array.

    Raises:
        ValueError: if there is none at that path, with those that there are.
    """
    if path not in leaves:
        there = ", ".join(leaves) or "none at all"
        raise ValueError(
            f"{owner} needs an array at {path!r}; params have {there}. Try one of these paths, "
            "as jax.tree_util.keystr prints them."
        )
    return leaves[path]


def with_leaves(params: Params, new: dict[str, Tensor], others: bool) -> Params:
    """Returns params with some arrays replaced, and the others as they are, or zero."""

    def replace(path: Sequence, leaf: Tensor) -> Tensor:
        old = leaf if others else jnp.zeros_like(leaf)
        return new.get(jax.tree_util.keystr(tuple(path)), old)

    return jax.tree_util.tree_map_with_path(replace, params)
