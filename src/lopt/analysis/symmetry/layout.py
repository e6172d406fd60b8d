"""Weights with their inputs first, as in `x @ w` and in Flax, seen with their outputs first.

Everything that proposes symmetries takes weights to be (outputs, inputs, ...), and biases to be
(outputs, ...). Where they are not, it is shown them with their axes moved, and what it proposes is
moved back.
"""

import dataclasses
import math
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
        matrices: the shapes (inputs, outputs) of weights that have an axis for heads besides.
        heads: the lengths of such axes.
        suffix: of the names of symmetries, where another layout is possible too.
    """

    weights: tuple[str, ...] = eqx.field(static=True)
    rows: tuple[str, ...] = eqx.field(static=True)
    matrices: tuple[tuple[str, tuple[int, int]], ...] = eqx.field(static=True)
    heads: tuple[int, ...] = eqx.field(static=True)
    suffix: str = eqx.field(static=True, default="")

    def outputs_first(self, params: Params) -> Params:
        """Returns params with these weights as (outputs, inputs, ...), and rows as vectors."""
        leaves = self._leaves(params)
        moved = {p: jnp.transpose(leaves[p], _order(leaves[p].ndim)) for p in self.weights}
        moved |= {path: leaves[path].reshape(-1) for path in self.rows}
        return with_leaves(params, moved, others=True)

    def inputs_first(self, seen: Params, like: Params) -> Params:
        """Returns what is seen as `outputs_first` shows it, laid out like params."""
        leaves, own = leaves_by_path(seen), leaves_by_path(like)
        moved = {
            path: jnp.transpose(leaves[path], _inverse(_order(leaves[path].ndim)))
            for path in self.weights
        }
        moved |= {path: leaves[path] for path in self.rows}
        moved = {path: leaf.reshape(own[path].shape) for path, leaf in moved.items()}
        return with_leaves(seen, moved, others=True)

    def own(self, symmetry: Found, leaves: dict[str, Tensor]) -> Found:
        """Returns the symmetry of params that one of `outputs_first(params)` is.

        Args:
            symmetry: of these weights with their outputs first.
            leaves: of the params themselves, by their paths.
        """
        if not self.weights and not self.rows:
            return symmetry
        name = symmetry.name + self.suffix
        if isinstance(symmetry, (Symmetry, DiscreteMap)):
            places = tuple(self._moved(place, leaves) for place in symmetry.places)
            return dataclasses.replace(symmetry, name=name, places=places)
        return Relaid(name, symmetry.kind, symmetry.units, symmetry, self)

    def _leaves(self, params: Params) -> dict[str, Tensor]:
        """Returns the arrays by their paths, those with axes for heads as matrices."""
        owner, leaves = "A symmetry of weights with their inputs first", leaves_by_path(params)
        for path in self.weights + self.rows:
            array_at(owner, leaves, path)
        return leaves | {path: leaves[path].reshape(shape) for path, shape in self.matrices}

    def _moved(self, place: Place, leaves: dict[str, Tensor]) -> Place:
        """Returns a place of the params that is one of them as they are seen."""
        own = leaves[place.path].shape
        if place.axis is not None and place.path in self.weights:
            axis, view = _back(place, dict(self.matrices).get(place.path, own))
            return dataclasses.replace(place, axis=axis, view=None if view == own else view)
        if place.axis is not None and place.path in self.rows:
            return dataclasses.replace(place, view=place.view or (math.prod(own),))
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
    like most of the others. If no bias tells, modules with an attribute ".weight" are taken to be
    Equinox's, with outputs first.
    """
    leaves = leaves_by_path(params)
    matrices, split, heads = _of_heads(leaves)
    biases = {p: bias for p in leaves if (bias := bias_of(p, leaves)) is not None}
    known = {*biases.values(), *split}
    weights = [path for path, leaf in leaves.items() if is_weight(leaf) and path not in known]
    rows = (*split, *(b for b in biases.values() if leaves[b].shape[0] != leaves[b].size))
    told = dict.fromkeys(matrices, True)
    for path, bias in biases.items():
        first, last = (leaves[path].shape[axis] == leaves[bias].size for axis in (0, -1))
        if first != last:
            told.setdefault(path, last)
    votes = list(told.values()) or [False for path in weights if path.endswith(".weight")]
    most = 2 * sum(votes) > len(votes)
    inputs_first = tuple(path for path in weights if told.get(path, most))
    layout = Layout(inputs_first, rows, tuple(matrices.items()), heads)
    if votes:
        return (layout,)
    return layout, Layout(tuple(weights), rows, layout.matrices, heads, ", inputs first")


def _of_heads(
    leaves: dict[str, Tensor],
) -> tuple[dict[str, tuple[int, int]], list[str], tuple[int, ...]]:
    """Returns the shapes of attention weights as matrices, their biases, and numbers of heads.

    Flax has an axis for heads in its queries, keys and values, (inputs, heads, size), their biases
    (heads, size), and what leads out, (heads, size, outputs).
    """
    matrices: dict[str, tuple[int, int]] = {}
    biases, numbers = [], set()
    for query, leaf in leaves.items():
        sides = [query.replace("query", word) for word in ("query", "key", "value")]
        out = query.replace("query", "out")
        there = all(path in leaves and leaves[path].ndim == 3 for path in (*sides, out))
        if query == out or not there or len({leaves[path].shape[1:] for path in sides}) > 1:
            continue
        _, heads, size = leaf.shape
        if leaves[out].shape[:2] != (heads, size):
            continue
        matrices |= {path: (leaves[path].shape[0], heads * size) for path in sides}
        matrices[out] = (heads * size, leaves[out].shape[2])
        numbers.add(heads)
        known = [bias for bias in map(beside, sides) if bias in leaves]
        biases += [bias for bias in known if leaves[bias].shape == (heads, size)]
    return matrices, biases, tuple(numbers)


def bias_of(weight: str, leaves: dict[str, Tensor]) -> str | None:
    """Returns the path of what may be the bias of what may be a weight, or None.

    It is an array beside the weight, named for it ("weight" and "bias", "w" and "b", "w1" and
    "b1"), of as many entries as one of the ends of the weight's shape, and with one axis that is
    longer than 1 at most.
    """
    array, path = leaves[weight], beside(weight)
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
    several = array.ndim == 2 or array.size > max(array.shape, default=0)
    return array.ndim > 1 and array.size > 0 and several


def beside(path: str) -> str | None:
    """Returns where the bias of a weight would be; None if it is not called as weights are."""
    found = re.fullmatch(r"(.*(?:\.|\['))([A-Za-z]+)(_?\d*(?:'\])?(?:\.value)?)", path, re.DOTALL)
    if found is None or found[2] not in _BIASES:
        return None
    return found[1] + _BIASES[found[2]] + found[3]


def _order(axes: int) -> tuple[int, ...]:
    """Returns the axes of (..., inputs, outputs) in the order (outputs, inputs, ...)."""
    return (axes - 1, axes - 2, *range(axes - 2))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Returns the order of axes that takes another one back."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _back(place: Place, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Returns axis and view of an array of a shape, for a place of it with its outputs first."""
    order = _order(len(shape))
    seen = tuple(shape[axis] for axis in order)
    view, counted = place.view or seen, place.axis or 0
    if len(view) < len(seen):  # (outputs, everything else)
        return 1 - counted, (view[1], view[0])
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
    return there.index(counted), tuple(view[part] for part in there)
