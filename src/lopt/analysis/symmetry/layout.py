"""Weights with their inputs first, as in `x @ w` and in Flax, seen with their outputs first.

Everything that proposes symmetries takes weights to be (outputs, inputs, ...), and biases to be
(outputs, ...). Where they are not, it is shown them with their axes moved, and what it proposes is
moved back.
"""

import dataclasses
import re
from collections.abc import Sequence
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

Found = TypeVar("Found", Symmetry | DiscreteMap, AbstractGenerator)


class Layout(eqx.Module):
    """Which weights have their inputs first, (..., inputs, outputs), and which biases are rows.

    Attributes:
        weights, rows: their paths.
        suffix: of the names of symmetries, where another layout is possible too.
    """

    weights: tuple[str, ...] = eqx.field(static=True)
    rows: tuple[str, ...] = eqx.field(static=True)
    suffix: str = eqx.field(static=True, default="")

    def outputs_first(self, params: Params) -> Params:
        """Returns params with these weights as (outputs, inputs, ...), and rows as vectors."""
        leaves = self._leaves(params)
        moved = {path: jnp.transpose(leaves[path], _order(leaves[path])) for path in self.weights}
        moved |= {path: leaves[path].reshape(-1) for path in self.rows}
        return with_leaves(params, moved, others=True)

    def inputs_first(self, seen: Params, like: Params) -> Params:
        """Returns what is seen as `outputs_first` shows it, laid out like params."""
        leaves, own = self._leaves(seen), leaves_by_path(like)
        moved = {
            path: jnp.transpose(leaves[path], _inverse(_order(leaves[path])))
            for path in self.weights
        }
        moved |= {path: leaves[path].reshape(own[path].shape) for path in self.rows}
        return with_leaves(seen, moved, others=True)

    def own(self, symmetry: Found, params: Params) -> Found:
        """Returns the symmetry of params that one of `outputs_first(params)` is."""
        name = symmetry.name + self.suffix
        if isinstance(symmetry, (Symmetry, DiscreteMap)):
            places = tuple(self._moved(place, params) for place in symmetry.places)
            return dataclasses.replace(symmetry, name=name, places=places)
        if not self.weights and not self.rows:
            return symmetry
        return Relaid(name, symmetry.kind, symmetry.units, symmetry, self)

    def _leaves(self, params: Params) -> dict[str, Tensor]:
        owner, leaves = "A symmetry of weights with their inputs first", leaves_by_path(params)
        return leaves | {path: array_at(owner, leaves, path) for path in self.weights + self.rows}

    def _moved(self, place: Place, params: Params) -> Place:
        """Returns a place of the params that is one of them as they are seen."""
        if place.axis is not None and place.path in self.weights:
            return _moved(place, leaves_by_path(params)[place.path])
        if place.axis is not None and place.path in self.rows:
            return dataclasses.replace(place, view=(leaves_by_path(params)[place.path].size,))
        return place


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
        return self.layout.inputs_first(self.symmetry.combine(seen, amounts), params)

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
        return self.layout.inputs_first(self.symmetry.act(seen, amounts), params)

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


def layouts_of(params: Params) -> tuple[Layout, ...]:
    """Returns the layout of the weights among some params, or both that are possible.

    A bias has as many entries as its weight has outputs. A weight that has none, or is square, is
    like most of the others. If no bias tells, names do ("weight" as in Equinox and PyTorch, or
    "kernel" as in Flax).
    """
    leaves = leaves_by_path(params)
    biases = {p: bias for p in leaves if (bias := bias_of(p, leaves)) is not None}
    weights = [p for p, leaf in leaves.items() if is_weight(leaf) and p not in biases.values()]
    rows = tuple(b for b in biases.values() if leaves[b].shape[0] != leaves[b].size)
    told = {}
    for path, bias in biases.items():
        first, last = (leaves[path].shape[axis] == leaves[bias].size for axis in (0, -1))
        if first != last:
            told[path] = last
    names = [weight_name(path)[0] for path in weights]
    votes = list(told.values())
    votes = votes or [name == "kernel" for name in names if name in ("kernel", "weight")]
    most = 2 * sum(votes) > len(votes)
    layout = Layout(tuple(path for path in weights if told.get(path, most)), rows)
    if votes:
        return (layout,)
    return layout, Layout(tuple(weights), rows, ", inputs first")


def bias_of(weight: str, leaves: dict[str, Tensor]) -> str | None:
    """Returns the path of what may be the bias of what may be a weight, or None.

    It is an array beside the weight, named for it ("weight" and "bias", "w" and "b", "w1" and
    "b1"), of as many entries as one of the ends of the weight's shape, and with one axis that is
    longer than 1 at most.
    """
    array, (_, path) = leaves[weight], weight_name(weight)
    if path not in leaves or not is_weight(array):
        return None
    bias = leaves[path]
    fits = bias.ndim and bias.size == max(bias.shape) and bias.shape != array.shape
    return path if fits and bias.size in (array.shape[0], array.shape[-1]) else None


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
    order = _order(array)
    seen = tuple(array.shape[axis] for axis in order)
    view, axis = place.view or seen, place.axis or 0
    if len(view) < len(seen):  # (outputs, everything else)
        return dataclasses.replace(place, view=(view[1], view[0]), axis=1 - axis)
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
    return dataclasses.replace(place, axis=there.index(axis), view=whole)
