"""Which symmetries a network might have, guessed from the shapes, names and activations in it.

Every guess is measured before it is believed, so that guessing may be generous: which layer follows
which is taken from shapes, where a normalisation belongs is left open, and degrees of units are
those of the activations found, or 1, 2 and 3.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lopt.analysis.symmetry.builders import (
    Order,
    bias_shift,
    query_key_rescale,
    rescale,
    scale,
    translation,
)
from lopt.analysis.symmetry.discrete import DiscreteMap, unit_map
from lopt.analysis.symmetry.generators import Symmetry
from lopt.analysis.symmetry.places import Tensor, leaves_by_path
from lopt.core.types import Params

# How the arrays of a layer are called: the last word of the path of a weight, and of its bias. Both
# may end in the same number.
_BIASES = {"weight": "bias", "w": "b", "W": "b", "kernel": "bias"}
# How queries are called, and the keys beside them.
_KEYS = (("query", "key"), ("_q", "_k"), ("q_", "k_"), ("wq", "wk"), ("'q'", "'k'"))


class Layer(eqx.Module):
    """A weight of shape (outputs, inputs, ...) and its bias.

    Attributes:
        weight, bias: their paths.
        outputs, inputs: the lengths of the weight's first two axes.
    """

    weight: str
    bias: str | None
    outputs: int
    inputs: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def layers_of(params: Params) -> tuple[Layer, ...]:
    """Returns the layers among some params, in the order of the tree.

    Matrices are layers, and larger arrays with more than one axis that is longer than 1: others are
    gains of the shape of a convolution's output. A bias is an array beside the weight, named for it
    ("weight" and "bias", "w" and "b", "w1" and "b1"), with as many entries as the weight has
    outputs.
    """
    leaves = leaves_by_path(params)
    found = []
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or (leaf.ndim > 2 and leaf.size == max(leaf.shape)):
            continue
        bias = _bias_of(path, leaf, leaves)
        found.append(Layer(path, bias, leaf.shape[0], leaf.shape[1]))
    return tuple(found)


def norms_of(params: Params, layers: tuple[Layer, ...]) -> tuple[tuple[str, ...], ...]:
    """Returns the gains and shifts of normalisations: (gain, shift), or (gain,), of each.

    They are the vectors that are no layer's bias. Those at the same place of lists of the same
    lengths, or beside one another in a module, belong together.
    """
    leaves = leaves_by_path(params)
    taken = {layer.bias for layer in layers}
    vectors = [p for p, leaf in leaves.items() if leaf.ndim == 1 and p not in taken]
    stems: dict[str, list[str]] = {}
    for path in vectors:
        stems.setdefault(re.sub(r"\[\d+\]", "[]", path), []).append(path)
    groups: dict[tuple[int, ...], list[list[str]]] = {}
    for paths in stems.values():
        groups.setdefault(tuple(leaves[path].size for path in paths), []).append(paths)
    return tuple(member for group in groups.values() for member in zip(*group, strict=True))


def continuous_candidates(params: Params, degrees: tuple[float, ...]) -> Iterator[Symmetry]:
    """Yields the continuous symmetries that a network of these params might have.

    Args:
        params: of the network.
        degrees: that its units might have.
    """
    layers = layers_of(params)
    for layer in layers:
        yield translation(params, layer.weight, layer.bias)
        yield scale(params, layer.weight, layer.bias)
        yield scale(
            params, layer.weight, layer.bias, whole=True, name=f"scale of all {layer.weight}"
        )
        if layer.bias is not None:
            yield bias_shift(params, layer.bias)
    for layer in layers:
        # A set, as a path may be made that of its keys in several ways.
        keys = {layer.weight.replace(old, new) for old, new in _KEYS} - {layer.weight}
        partners = [o for o in layers if o.weight in keys and o.outputs == layer.outputs]
        for other in partners:
            name = f"query-key rescale of {layer.weight}"
            name += f" and {other.weight}" * (len(partners) > 1)
            yield query_key_rescale(params, layer.paths, other.paths, name=name)
    sides = [(layer.weight, layer.paths, layer.outputs, "rescale") for layer in layers]
    leaves = leaves_by_path(params)
    for norm in norms_of(params, layers):
        sides.append(("", norm, leaves[norm[0]].size, "norm rescale"))
    for weight, incoming, units, kind in sides:
        for after in layers:
            if after.weight == weight or after.inputs % units or units == 1:
                continue
            orders: tuple[Order, ...] = ("last",) if after.inputs == units else ("last", "first")
            for degree in degrees:
                for order in orders:
                    name = f"{kind} of {incoming[0]} and {after.weight}"
                    name += "" if degree == 1 else f", degree {degree:g}"
                    name += "" if order == "last" else ", units first"
                    yield rescale(
                        params,
                        incoming,
                        after.weight,
                        degree=degree,
                        order=order,
                        kind=kind,
                        name=name,
                    )


def discrete_candidates(params: Params) -> Iterator[DiscreteMap]:
    """Yields the permutations and sign flips that a network of these params might allow."""
    layers, leaves = layers_of(params), leaves_by_path(params)
    norms = [(norm, leaves[norm[0]].size) for norm in norms_of(params, layers)]
    for layer in layers:
        beside = [norm for norm, size in norms if size == layer.outputs]
        for after in layers:
            if after.weight == layer.weight or after.inputs % layer.outputs or layer.outputs == 1:
                continue
            orders: tuple[Order, ...] = (
                ("last",) if after.inputs == layer.outputs else ("last", "first")
            )
            for order in orders:
                for norm in ((), *beside):
                    incoming = (*layer.paths, *norm)
                    whole = rescale(params, incoming, after.weight, order=order)
                    yield unit_map("permute", whole.places, whole.units, order)
                whole = rescale(params, layer.paths, after.weight, order=order)
                yield unit_map("flip", whole.places, whole.units, order)
        if layer.outputs > 1:
            for gain in ((), *((norm[0],) for norm in beside)):
                places = scale(params, layer.weight, layer.bias).places
                if gain:
                    places = (*places, *bias_shift(params, gain[0]).places)
                yield unit_map("flip", places, layer.outputs)


def degrees_of(task: Any) -> tuple[float, ...]:
    """Returns the degrees that the units of a task might have, 1 always among them.

    They are those of the activations in its fields; 1, 2 and 3 if there are none to be found.
    """
    found = list(_activations(task))
    if not found:
        return (1.0, 2.0, 3.0)
    measured = {homogeneous_degree(activation) for activation in found}
    return tuple(sorted({1.0, *(degree for degree in measured if degree)}))


def homogeneous_degree(activation: Callable[[Any], Any]) -> float | None:
    """Returns d such that activation(a z) = a^d activation(z) for all a > 0, or None.

    Example:
        >>> import jax
        >>> homogeneous_degree(jax.nn.leaky_relu), homogeneous_degree(lambda z: jax.nn.relu(z) ** 2)
        (1.0, 2.0)
        >>> homogeneous_degree(jax.nn.sigmoid) is None
        True
    """
    points = jnp.array([-30.0, -2.0, -0.7, 0.3, 1.1, 30.0])
    try:
        base, twice, half = (np.asarray(activation(a * points)) for a in (1.0, 2.0, 0.5))
    except (TypeError, ValueError):  # no function of one array
        return None
    alive = np.abs(base) > 0
    if not alive.any() or not (np.sign(base) == np.sign(twice)).all():
        return None
    degrees = np.log2(np.concatenate([twice[alive] / base[alive], base[alive] / half[alive]]))
    degree = round(float(np.mean(degrees)), 3)
    return degree if np.all(np.abs(degrees - degree) < 1e-3) else None


def _activations(node: Any, name: str = "") -> Iterator[Callable[[Any], Any]]:
    """Yields the callables in fields named for activations, anywhere in a task or model."""
    if callable(node) and ("activation" in name or name == "fn"):
        yield node
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from _activations(vars(node).get(field.name), field.name)
    elif isinstance(node, (tuple, list)):
        # A network that is kept as its leaves and its tree definition.
        if len(node) == 2 and isinstance(node[1], jax.tree_util.PyTreeDef):
            node = (node[1].unflatten(node[0]),)
        for item in node:
            yield from _activations(item, name)
    elif isinstance(node, dict):
        for key, item in node.items():
            yield from _activations(item, str(key))


def _bias_of(path: str, weight: Tensor, leaves: dict[str, Tensor]) -> str | None:
    found = re.fullmatch(r"(.*(?:\.|\['))([A-Za-z]+)(_?\d*(?:'\])?)", path, re.DOTALL)
    if found is None or found[2] not in _BIASES:
        return None
    beside = found[1] + _BIASES[found[2]] + found[3]
    fits = beside in leaves and leaves[beside].size == weight.shape[0]
    return beside if fits else None
