"""What else is symmetric about linear units: their layers are a product, and any basis will do.

Two layers x -> W2 (W1 x + b1) + b2 without a nonlinearity in between are one affine map. With what
is here, translations, and `lopt.analysis.symmetry.blind`, every direction is named that leaves its
softmax as it is. The queries and keys of attention are linear units too, and so are its values;
each head has a basis of its own.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.analysis.symmetry.builders import Order, check_paths, layer_width, rescale
from lopt.analysis.symmetry.generators import AbstractGenerator, FreeGenerator, check_amounts
from lopt.analysis.symmetry.places import (
    Place,
    Tensor,
    Units,
    array_at,
    leaves_by_path,
    with_leaves,
)
from lopt.core.checks import check_integer
from lopt.core.types import Params, Scalar


class Mixing(AbstractGenerator):
    """Changes the basis of linear units, by A = exp(a) on their way in and its inverse on that out.

    A unit of this symmetry is an entry of a: there are r^2 for r linear units, or r^2 for each of
    several heads. Rescaling is its diagonal. Gradient flow conserves sum P P' on the way in minus
    that on the way out, with P an array seen as (unit, others): all of these entries. See
    `mixing` and `query_key_mixing`, which build it.

    Attributes:
        name, kind, units: see `AbstractGenerator`.
        heads: into how many blocks of equal size the linear units fall.
        incoming: paths of arrays whose first axis counts units, which A multiplies.
        outgoing: places of those that the inverse does: their paths, and the axes that count
            units once they are seen as their views; coefficients do not count.
    """

    name: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    units: int = eqx.field(static=True)
    heads: int = eqx.field(static=True)
    incoming: tuple[str, ...] = eqx.field(static=True)
    outgoing: tuple[Place, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        owner = f"Mixing({self.name!r})"
        check_integer(owner, "heads", self.heads, hint=1)
        check_integer(owner, "units", self.units)
        if self.units != self.heads * self.size**2 or not self.incoming or not self.outgoing:
            raise ValueError(
                f"{owner} must have heads * size**2 units, and arrays on both sides; it has units="
                f"{self.units}, heads={self.heads}, incoming={self.incoming}, outgoing="
                f"{self.outgoing}. Try mixing or query_key_mixing, which build it."
            )

    @property
    def size(self) -> int:
        """The number of linear units of each head."""
        return math.isqrt(self.units // self.heads)

    def combine(self, params: Params, amounts: Units) -> Params:
        """Returns a P on the way in and -a' P on the way out."""
        before, after = self._blocks(amounts), -self._blocks(amounts).mT
        return with_leaves(params, self._multiplied(params, before, after), others=False)

    def act(self, params: Params, amounts: Units) -> Params:
        """Returns the params in the basis A = exp(a)."""
        exponent = self._blocks(amounts)
        there, back = (jax.vmap(jax.scipy.linalg.expm)(each) for each in (exponent, -exponent.mT))
        return with_leaves(params, self._multiplied(params, there, back), others=True)

    def along(self, params: Params, direction: Params) -> Units:
        """Returns <direction, xi_i(params)> for each entry of a."""
        own, towards = self._seen(params), self._seen(direction)
        before, after = self._sides({path: towards[path] @ own[path].mT for path in own})
        return (before - after.mT).reshape(-1)

    def lengths(self, params: Params) -> Units:
        """Returns |xi_i(params)| for each entry of a."""
        squares = {path: jnp.sum(seen**2, axis=-1) for path, seen in self._seen(params).items()}
        before, after = self._sides(squares)
        return jnp.sqrt(before[:, None, :] + after[:, :, None]).reshape(-1)

    def share(self, params: Params, along: Units) -> Scalar:
        """Returns the squared length of what of a direction lies along the tangents.

        The nearest tangent a solves B a + a A = M, with A = sum P P' on the way in, B that on the
        way out and M what lies along each: an equation of Sylvester's, in the bases of A and B.
        """
        before, after = self._sides({p: seen @ seen.mT for p, seen in self._seen(params).items()})
        (rights, right), (lefts, left) = jnp.linalg.eigh(before), jnp.linalg.eigh(after)
        turned = left.mT @ self._blocks(along) @ right
        both = jnp.maximum(lefts[:, :, None] + rights[:, None, :], 0)
        some = both > jnp.finfo(both.dtype).eps * both.shape[-1] * jnp.max(both)
        return jnp.sum(jnp.where(some, turned**2 / jnp.where(some, both, 1), 0))

    def conserved(self, params: Params) -> Units:
        """Returns sum P P' on the way in minus that on the way out, entry by entry."""
        products = {path: seen @ seen.mT for path, seen in self._seen(params).items()}
        before, after = self._sides(products)
        return (before - after).reshape(-1)

    @property
    def knows_conserved(self) -> bool:
        """It always is."""
        return True

    def _blocks(self, amounts: Units) -> Float[Array, "head row column"]:
        check_amounts(self, amounts)
        return amounts.reshape(self.heads, self.size, self.size)

    def _places(self) -> tuple[Place, ...]:
        return (*map(Place, self.incoming), *self.outgoing)

    def _seen(self, params: Params) -> dict[str, Float[Array, "head unit other"]]:
        """Returns the arrays as matrices of units and all else, for each head."""
        owner, leaves, seen = f"The symmetry {self.name!r}", leaves_by_path(params), {}
        for place in self._places():
            array = array_at(owner, leaves, place.path)
            place.check(owner, array, self.heads * self.size)
            array = jnp.moveaxis(array.reshape(place.view or array.shape), place.axis or 0, 0)
            seen[place.path] = array.reshape(self.heads, self.size, -1)
        return seen

    def _multiplied(self, params: Params, before: Array, after: Array) -> dict[str, Tensor]:
        leaves, new, seen = leaves_by_path(params), {}, self._seen(params)
        for place in self._places():
            array = leaves[place.path]
            shape = list(place.view or array.shape)
            units = shape.pop(place.axis or 0)
            matrix = (before if place.path in self.incoming else after).astype(array.dtype)
            product = (matrix @ seen[place.path]).reshape(units, *shape)
            new[place.path] = jnp.moveaxis(product, 0, place.axis or 0).reshape(array.shape)
        return new

    def _sides(self, summands: dict[str, Array]) -> tuple[Array, Array]:
        """Returns the sum over the arrays on the way in, and over those on the way out."""
        before = [summands[path] for path in self.incoming]
        after = [summands[place.path] for place in self.outgoing]
        return sum(before[1:], before[0]), sum(after[1:], after[0])


def mixing(
    params: Params,
    incoming: str | tuple[str, ...],
    outgoing: str,
    *,
    order: Order = "last",
    heads: int = 1,
    name: str | None = None,
) -> Mixing:
    """Changes the basis of linear units: W1, b1 -> A W1, A b1 and W2 -> W2 A^-1.

    Args:
        params: of the network, for the shapes.
        incoming: paths of W1, and of b1 if there is one; the first axis counts the units.
        outgoing: path of W2, dense or convolutional, whose second axis counts them; or a dense one
            behind the flattened image of a convolution.
        order: whether the units come "last" or "first" in the flattened image, where there is one.
        heads: of attention, if the units are its values: only those of one head mix.
        name: by default made of the kind and the layers.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w1": jnp.zeros((4, 3)), "w2": jnp.zeros((2, 4))}
        >>> mixing(params, "['w1']", "['w2']").units
        16
    """
    incoming = check_paths("mixing", "incoming", params, incoming)
    out = rescale(params, incoming, outgoing, order=order, kind="mixing").places[-1]
    return _mixing("mixing", params, incoming, (out,), heads, name)


def query_key_mixing(
    params: Params,
    query: str | tuple[str, ...],
    key: str | tuple[str, ...],
    *,
    heads: int = 1,
    name: str | None = None,
) -> Mixing:
    """Changes the basis of queries, and that of keys by the inverse transposed: products stay.

    Args:
        params: of the network, for the shapes.
        query: paths of the projection's weight, and of its bias if there is one; the first axis
            counts the components, of all heads.
        key: the same of the keys.
        heads: only components of one head mix.
        name: by default made of the kind and the layers.
    """
    kind = "query-key mixing"
    query = check_paths(kind, "query", params, query)
    key = check_paths(kind, "key", params, key)
    return _mixing(kind, params, query, tuple(map(Place, key)), heads, name)


def bias_exchange(
    params: Params, hidden: str, outgoing: str, output: str, *, name: str | None = None
) -> FreeGenerator:
    """Moves a bias through a linear layer: b1 -> b1 + a and b2 -> b2 - W2 a.

    Args:
        params: of the network, for the shapes.
        hidden: path of b1.
        outgoing: path of W2, of shape (outputs, units).
        output: path of b2.
        name: by default made of the kind and the biases.
    """
    kind, leaves = "bias exchange", leaves_by_path(params)
    shapes = [array_at(kind, leaves, path).shape for path in (hidden, outgoing, output)]
    if len(shapes[0]) != 1 or shapes[1] != (*shapes[2], *shapes[0]):
        raise ValueError(
            f"{kind}(hidden={hidden!r}, outgoing={outgoing!r}, output={output!r}) must be a bias, "
            f"the weight behind it and its bias; they have shapes {shapes}. Try arrays of shapes "
            "(units,), (outputs, units) and (outputs,)."
        )
    name = name or f"{kind} of {hidden} and {output}"
    return FreeGenerator(name, kind, shapes[0][0], _Exchange(hidden, outgoing, output))


def _mixing(
    kind: str,
    params: Params,
    incoming: tuple[str, ...],
    outgoing: tuple[Place, ...],
    heads: int,
    name: str | None,
) -> Mixing:
    check_integer(kind, "heads", heads, hint=1)
    paths = [*incoming, *(place.path for place in outgoing)]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"{kind} of {paths} must name no array twice; try the layers before and behind units."
        )
    width = layer_width(kind, params, incoming)
    if width % heads:
        raise ValueError(
            f"{kind}(heads={heads}) must divide the {width} units at params{incoming[0]}; try the "
            "number of heads of the attention layer."
        )
    if name is None:
        name = f"{kind} of {incoming[0]} and {outgoing[0].path}" + f", {heads} heads" * (heads > 1)
    mixed = Mixing(name, kind, width**2 // heads, heads, incoming, outgoing)
    mixed.lengths(params)  # refuses what does not fit
    return mixed


class _Exchange(eqx.Module):
    """The action of `bias_exchange`; equal ones are compiled once."""

    hidden: str = eqx.field(static=True)
    outgoing: str = eqx.field(static=True)
    output: str = eqx.field(static=True)

    def __call__(self, params: Params, amounts: Units) -> Params:
        leaves = leaves_by_path(params)
        paths = (self.hidden, self.outgoing, self.output)
        hidden, outgoing, output = (array_at("bias exchange", leaves, path) for path in paths)
        if outgoing.shape != (*output.shape, *hidden.shape) or hidden.shape != amounts.shape:
            raise ValueError(
                f"The bias exchange of {self.hidden} and {self.output} needs arrays of shapes "
                f"({amounts.size},), (outputs, {amounts.size}) and (outputs,); they have "
                f"{[each.shape for each in (hidden, outgoing, output)]}. Try building the symmetry "
                "from these params."
            )
        new = {self.hidden: hidden + amounts, self.output: output - outgoing @ amounts}
        return with_leaves(params, new, others=True)
