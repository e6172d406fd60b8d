"""Weights with their inputs first, as in `x @ w` and in Flax, seen with their outputs first.

Everything that proposes symmetries takes weights to be (outputs, inputs, ...). Where they are not,
it is shown them with their axes moved, and what it proposes is moved back.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp

from lopt.analysis.symmetry.discrete import DiscreteMap
from lopt.analysis.symmetry.generators import AbstractGenerator, Symmetry
from lopt.analysis.symmetry.places import (
    Place,
    Tensor,
    Units,
    array_at,
    leaves_by_path,
    with_leaves,
)
from lopt.core.types import Params, Scalar

# How the arrays of a layer are called: the last word of the path of a weight, and of its bias. Both
# may end in the same number.
_BIASES = {"weight": "bias", "w": "b", "W": "b", "kernel": "bias"}

Found = TypeVar("Found", AbstractGenerator, DiscreteMap)


class Layout(eqx.Module):
    """Which weights have their inputs first: (..., inputs, outputs).

    Attributes:
        paths: of these weights.
    """

    paths: tuple[str, ...] = eqx.field(static=True)

    def outputs_first(self, params: Params) -> Params:
        """Returns params with these weights as (outputs, inputs, ...)."""
        return self._transposed(params, _order)

    def inputs_first(self, params: Params) -> Params:
        """Returns what `outputs_first` was given."""
        return self._transposed(params, lambda array: _inverse(_order(array)))

    def own(self, symmetry: Found, params: Params) -> Found:
        """Returns the symmetry of params that one of `outputs_first(params)` is."""
        if not self.paths:
            return symmetry
        if isinstance(symmetry, (Symmetry, DiscreteMap)):
            leaves = leaves_by_path(params)
            places = [
                _moved(place, leaves[place.path]) if place.path in self.paths else place
                for place in symmetry.places
            ]
            return dataclasses.replace(symmetry, places=tuple(places))
        return Relaid(symmetry.name, symmetry.kind, symmetry.units, symmetry, self)

    def _transposed(self, params: Params, order: Callable[[Tensor], Sequence[int]]) -> Params:
        leaves, moved = leaves_by_path(params), {}
        for path in self.paths:
            array = array_at("A symmetry of weights with their inputs first", leaves, path)
            moved[path] = jnp.transpose(array, order(array))
        return with_leaves(params, moved, others=True)


class Relaid(AbstractGenerator):
    """A symmetry of weights with their outputs first, where some have their inputs first.

    Attributes:
        name, kind, units: of the symmetry.
        symmetry: the symmetry.
        layout: which have them.
    """

    name: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    units: int = eqx.field(static=True)
    symmetry: AbstractGenerator
    layout: Layout

    def combine(self, params: Params, amounts: Units) -> Params:
        """Returns sum_i amounts_i xi_i(params)."""
        seen = self.layout.outputs_first(params)
        return self.layout.inputs_first(self.symmetry.combine(seen, amounts))

    def along(self, params: Params, direction: Params) -> Units:
        """Returns <direction, xi_i(params)> for each unit i."""
        seen, towards = map(self.layout.outputs_first, (params, direction))
        return self.symmetry.along(seen, towards)

    def lengths(self, params: Params) -> Units:
        """Returns |xi_i(params)| for each unit i."""
        return self.symmetry.lengths(self.layout.outputs_first(params))

    def act(self, params: Params, amounts: Units) -> Params:
        """Returns the moved params."""
        seen = self.layout.outputs_first(params)
        return self.layout.inputs_first(self.symmetry.act(seen, amounts))

    def conserved(self, params: Params) -> Units:
        """Returns what gradient flow conserves."""
        return self.symmetry.conserved(self.layout.outputs_first(params))

    @property
    def knows_conserved(self) -> bool:
        """Whether the symmetry does."""
        return self.symmetry.knows_conserved

    def share(self, params: Params, along: Units) -> Scalar:
        """Returns the squared length of what of a direction lies along the tangents."""
        return self.symmetry.share(self.layout.outputs_first(params), along)


def layout_of(params: Params) -> Layout:
    """Returns the layout of the weights among some params.

    A bias has as many entries as its weight has outputs. A weight that has none, or is square, is
    like most of the others. If no bias tells, names do ("weight" as in Equinox and PyTorch, or
    "kernel" as in Flax); if these do not, the shapes of weights that follow on one another.
    """
    leaves = leaves_by_path(params)
    biases = {weight_name(path)[1] for path in leaves}  # which may have axes of length 1
    shapes = {p: leaf.shape for p, leaf in leaves.items() if is_weight(leaf) and p not in biases}
    told = {}
    for path, shape in shapes.items():
        _, bias = weight_name(path)
        entries = leaves[bias].size if bias in leaves else 0
        if (shape[0] == entries) != (shape[-1] == entries):
            told[path] = shape[-1] == entries
    votes = list(told.values())
    if not votes:
        names = [weight_name(path)[0] for path in shapes]
        votes = [name == "kernel" for name in names if name in ("kernel", "weight")]
    if not votes:
        for before, after in itertools.pairwise(shapes.values()):
            # A layer may follow on the flattened image of another.
            outputs_first, inputs_first = not after[1] % before[0], not after[-2] % before[-1]
            if outputs_first != inputs_first:
                votes.append(inputs_first)
    most = 2 * sum(votes) > len(votes)
    return Layout(tuple(path for path in shapes if told.get(path, most)))


def is_weight(array: Tensor) -> bool:
    """Returns whether an array may be that of a layer: a matrix, or a kernel.

    Larger arrays with at most one axis that is longer than 1 are gains of the shape of a
    convolution's output.
    """
    return array.ndim == 2 or (array.ndim > 2 and array.size > max(array.shape))


def weight_name(path: str) -> tuple[str | None, str | None]:
    """Returns how a weight is called and where its bias would be; None if it is not called so."""
    found = re.fullmatch(r"(.*(?:\.|\['))([A-Za-z]+)(_?\d*(?:'\])?)", path, re.DOTALL)
    if found is None or found[2] not in _BIASES:
        return None, None
    return found[2], found[1] + _BIASES[found[2]] + found[3]


def _order(array: Tensor) -> tuple[int, ...]:
    """Returns the axes of (..., inputs, outputs) in the order (outputs, inputs, ...)."""
    return (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Returns the order of axes that takes another one back."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _moved(place: Place, array: Tensor) -> Place:
    """Returns a place of the array that is one of it with its outputs first."""
    if place.axis is None:
        return place
    order = _order(array)
    seen = tuple(array.shape[axis] for axis in order)
    view = place.view or seen
    if len(view) < len(seen):  # (outputs, everything else)
        return dataclasses.replace(place, view=(view[1], view[0]), axis=1 - place.axis)
    split = len(seen)
    if len(view) > len(seen):  # one axis of the array is two of the view
        split = next(
            axis
            for axis in range(len(seen))
            if (*seen[:axis], *seen[axis + 1 :]) == (*view[:axis], *view[axis + 2 :])
        )

    def parts(axis: int) -> tuple[int, ...]:
        if axis == split:
            return (axis, axis + 1)
        return (axis + (axis > split),)

    there = [part for axis in _inverse(order) for part in parts(axis)]
    view = tuple(view[part] for part in there)
    whole = None if view == array.shape else view
    return dataclasses.replace(place, axis=there.index(place.axis), view=whole)
