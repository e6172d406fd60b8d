"""Maps of the params that leave the function of a network as it is: permutations and sign flips."""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt.analysis.symmetry.generators import check_units
from lopt.analysis.symmetry.places import Place, array_at, leaves_by_path, with_leaves
from lopt.core.checks import check_integer
from lopt.core.types import Params


class DiscreteMap(eqx.Module):
    """Permutes hidden units, or changes their sign.

    Signs may change on both sides of odd units (tanh, linear), of queries and keys, or in a layer
    and the gain of the batch norm behind it; on the way in alone of even units.

    Attributes:
        name: what tables and errors call it.
        motion: "permute" or "flip".
        units: their number.
        places: the arrays whose slices belong to the units, an array once for each of its axes
            that counts them; coefficients do not count.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"in": jnp.array([1.0, 2.0]), "out": jnp.array([[3.0, 4.0]])}
        >>> hidden = (Place("['in']", axis=0), Place("['out']", axis=1))
        >>> swapped = DiscreteMap("hidden", "permute", 2, hidden)(params, jnp.array([1, 0]))
        >>> print(swapped["in"], swapped["out"])
        [2. 1.] [[4. 3.]]
    """

    name: str = eqx.field(static=True)
    motion: Literal["permute", "flip"] = eqx.field(static=True)
    units: int = eqx.field(static=True)
    places: tuple[Place, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        if self.motion not in ("permute", "flip"):
            raise ValueError(
                f"DiscreteMap(motion={self.motion!r}) must be 'permute' or 'flip'; try 'flip'."
            )
        check_integer(f"DiscreteMap({self.name!r})", "units", self.units)
        if not self.places:
            raise ValueError(f"DiscreteMap({self.name!r}, places=()) must name at least one array.")

    def __call__(
        self, params: Params, amounts: Int[Array, " unit"] | Float[Array, " unit"]
    ) -> Params:
        """Returns the mapped params.

        Args:
            params: of the network.
            amounts: for a permutation, which unit takes the place of each; for a flip, the sign of
                each, 1 or -1.

        Raises:
            ValueError: if there is not one amount for each unit, if known amounts are no
                permutation or no signs, or if params have another structure.
        """
        owner = f"The map {self.name!r}"
        check_units(owner, self.units, amounts, "jnp.arange")
        if not isinstance(amounts, jax.core.Tracer):
            known = np.asarray(amounts)
            valid = set(np.unique(known)) <= {-1, 1}
            if self.motion == "permute":
                valid = np.array_equal(np.sort(known), np.arange(self.units))
            if not valid:
                what = "signs, 1 or -1" if self.motion == "flip" else "a permutation"
                raise ValueError(f"{owner} needs {what} of its {self.units} units, not {known}.")
        leaves = leaves_by_path(params)
        for place in self.places:
            array = array_at(owner, leaves, place.path)
            place.check(owner, array, self.units)
            if self.motion == "flip":
                leaves[place.path] = array * place.spread(amounts, array)
            else:
                seen = array.reshape(place.view or array.shape)
                moved = jnp.take(seen, amounts, axis=place.axis)
                leaves[place.path] = moved.reshape(array.shape)
        return with_leaves(params, leaves, others=True)


def unit_map(
    motion: Literal["permute", "flip"],
    places: Sequence[Place],
    units: int,
    order: str = "last",
    suffix: str = "",
) -> DiscreteMap:
    """Returns the map of the units at some places, named after the arrays.

    Args:
        motion: "permute" or "flip".
        places: the arrays whose slices belong to the units.
        units: their number.
        order: "first" if a flattened image has them first, for the name.
        suffix: of the name, for what else tells it from others.
    """
    does = "permutation" if motion == "permute" else "sign flips"
    name = f"{does} of {', '.join(dict.fromkeys(place.path for place in places))}"
    name += ", units first" * (order == "first") + suffix
    return DiscreteMap(name, motion, units, tuple(places))
