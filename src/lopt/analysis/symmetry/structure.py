"""Which symmetries a network might have, guessed from the shapes, names and activations in it.

Every guess is measured before it is believed, so that guessing may be generous: which layer follows
which is taken from shapes, where a normalisation belongs is left open, and degrees of units are
those of the activations found, or 1, 2 and 3.
"""

import dataclasses
import itertools
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
from lopt.analysis.symmetry.layout import bias_of, is_weight
from lopt.analysis.symmetry.places import Place, leaves_by_path
from lopt.core.types import Params

# How queries are called, and the keys, values and outputs beside them.
_ROLES = (
    ("query", "key", "value", "output"),
    ("query", "key", "value", "out"),
    ("_q", "_k", "_v", "_o"),
    ("q_", "k_", "v_", "o_"),
    ("wq", "wk", "wv", "wo"),
    ("'q'", "'k'", "'v'", "'o'"),
)


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
    """Returns the layers among some params, in the order of the tree."""
    leaves = leaves_by_path(params)
    biases = {path: bias_of(path, leaves) for path in leaves}
    taken, found = set(biases.values()), []
    for path, leaf in leaves.items():
        if is_weight(leaf) and path not in taken:
            bias = biases[path]
            fits = bias is not None and leaves[bias].shape[0] == leaf.shape[0]
            found.append(Layer(path, bias if fits else None, leaf.shape[0], leaf.shape[1]))
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


class Heads(eqx.Module):
    """The projections of an attention layer.

    Attributes:
        query, key: of as many components.
        value, output: what they weigh, and where it leads, if these are found too.
    """

    query: Layer
    key: Layer
    value: Layer | None
    output: Layer | None


def attentions_of(layers: tuple[Layer, ...]) -> tuple[Heads, ...]:
    """Returns the attention layers among some layers, known by the words in their paths."""
    by_path, found = {layer.weight: layer for layer in layers}, list[Heads]()
    for query in layers:
        partners = dict[str, Heads]()
        for words in _ROLES:
            renamed = [query.weight.replace(words[0], word) for word in words[1:]]
            key, value, output = (by_path.get(path) for path in renamed)
            if renamed[0] == query.weight or key is None or key.outputs != query.outputs:
                continue
            known = partners.get(key.weight)
            if known is None or (known.output is None and output is not None):
                partners[key.weight] = Heads(query, key, value, output)
        found.extend(partners.values())
    return tuple(found)


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
    attentions = attentions_of(layers)
    for heads in attentions:
        several = sum(other.query.weight == heads.query.weight for other in attentions) > 1
        name = f"query-key rescale of {heads.query.weight}"
        name += f" and {heads.key.weight}" * several
        yield query_key_rescale(params, heads.query.paths, heads.key.paths, name=name)
    sides = [(layer.weight, layer.paths, layer.outputs, "rescale") for layer in layers]
    leaves = leaves_by_path(params)
    for norm in norms_of(params, layers):
        sides.append(("", norm, leaves[norm[0]].size, "norm rescale"))
    groups = (*((layer,) for layer in layers), *_readers_of(layers, attentions))
    for weight, incoming, units, kind in sides:
        for group in groups:
            outgoing, inputs = tuple(layer.weight for layer in group), group[0].inputs
            flattened = inputs > units and not inputs % units and len(group) == 1
            if weight in outgoing or units == 1 or not (inputs == units or flattened):
                continue
            orders: tuple[Order, ...] = ("last", "first") if flattened else ("last",)
            for degree, order in itertools.product(degrees, orders):
                name = f"{kind} of {incoming[0]} and {', '.join(outgoing)}"
                name += "" if degree == 1 else f", degree {degree:g}"
                name += "" if order == "last" else ", units first"
                yield rescale(
                    params, incoming, outgoing, degree=degree, order=order, kind=kind, name=name
                )


def _readers_of(
    layers: tuple[Layer, ...], attentions: tuple[Heads, ...]
) -> Iterator[tuple[Layer, ...]]:
    """Yields layers that might read the same units: queries, keys and values, or all of a module.

    Those of a module are layers of as many inputs beside one another, such as the gate of a gated
    unit and what it gates, or a network's several outputs.
    """
    found: set[tuple[Layer, ...]] = set()
    for heads in attentions:
        several = (heads.query, heads.key, *((heads.value,) if heads.value else ()))
        if len({layer.inputs for layer in several}) == 1:
            found.add(several)
    modules: dict[tuple[str, int], list[Layer]] = {}
    for layer in layers:
        module = re.sub(r"(\.\w+|\[[^\]]*\])?(\.\w+|\[[^\]]*\])$", "", layer.weight)
        modules.setdefault((module, layer.inputs), []).append(layer)
    found |= {tuple(several) for several in modules.values() if len(several) > 1}
    yield from sorted(found, key=lambda several: [layer.weight for layer in several])


def discrete_candidates(params: Params, heads: tuple[int, ...]) -> Iterator[DiscreteMap]:
    """Yields the permutations and sign flips that a network of these params might allow.

    Args:
        params: of the network.
        heads: numbers of heads that attention layers might have.
    """
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
            alone = scale(params, layer.weight, layer.bias).places
            # Where the same array leads out of the units again, or what they make is pooled.
            yield unit_map("permute", alone, layer.outputs)
            for gain in ((), *((norm[0],) for norm in beside)):
                places = (*alone, *bias_shift(params, gain[0]).places) if gain else alone
                yield unit_map("flip", places, layer.outputs)
    attentions = attentions_of(layers)
    for attention in attentions:
        yield from _within_heads(params, attention, heads)
    yield from _streams(params, attentions)


def _within_heads(
    params: Params, attention: Heads, heads: tuple[int, ...]
) -> Iterator[DiscreteMap]:
    """Yields the maps of an attention layer's components and of its heads."""
    leaves = leaves_by_path(params)

    def seen(paths: tuple[str, ...], axis: int, number: int) -> tuple[Place, ...]:
        shapes = {path: leaves[path].shape for path in paths}
        views = {path: (number, n // number, *rest) for path, (n, *rest) in shapes.items()}
        return tuple(Place(path, axis, view=view) for path, view in views.items())

    query, key, value, out = attention.query, attention.key, attention.value, attention.output
    pair = (*query.paths, *key.paths)
    # Not what the same arrays might be to one another as layers.
    against = " against one another"
    sides = tuple(Place(path) for path in pair)
    yield unit_map("flip", sides, query.outputs, suffix=against)
    for number in heads:
        if query.outputs % number:
            continue
        size = query.outputs // number
        within = f", within {number} heads" * (number > 1)
        if size > 1:
            yield unit_map("permute", seen(pair, 1, number), size, suffix=against + within)
        if number == 1 or value is None or out is None or value.outputs % number:
            continue
        if out.inputs != value.outputs:
            continue
        size = value.outputs // number
        rest = leaves[out.weight].shape[2:]
        view = (out.outputs, number, size, *rest)
        if size > 1:
            places = (*seen(value.paths, 1, number), Place(out.weight, 2, view=view))
            yield unit_map("permute", places, size, suffix=within)
        places = (*seen((*pair, *value.paths), 0, number), Place(out.weight, 1, view=view))
        yield unit_map("permute", places, number, suffix=f", {number} heads")


def _streams(params: Params, attentions: tuple[Heads, ...]) -> Iterator[DiscreteMap]:
    """Yields the maps of a width that several layers share: residual streams, tied embeddings.

    Every axis of that length belongs to it, but for the components inside attention layers.
    """
    leaves, layers = leaves_by_path(params), layers_of(params)
    inner: set[tuple[str, int]] = set()
    for each in attentions:
        projections = (each.query, each.key, each.value)
        inner |= {(path, 0) for layer in projections if layer for path in layer.paths}
        inner |= {(each.output.weight, 1)} if each.output else set()
    weights = {layer.weight for layer in layers}
    widths = {layer.outputs for layer in layers} & {layer.inputs for layer in layers}
    for width in sorted(widths - {1}):
        places = tuple(
            Place(path, axis)
            for path, leaf in leaves.items()
            for axis in range(2 if path in weights else 1)
            if leaf.ndim > axis and leaf.shape[axis] == width and (path, axis) not in inner
        )
        # One layer behind another has been proposed before.
        if sum(place.path in weights for place in places) > 2:
            suffix = f" of width {width}"
            yield unit_map("permute", places, width, suffix=suffix)
            yield unit_map("flip", places, width, suffix=suffix)


def heads_of(task: Any) -> tuple[int, ...]:
    """Returns the numbers of heads that attention layers might have, 1 always among them.

    They are those in fields named for them, anywhere in a task or model.
    """
    found = {int(number) for name, number in _fields(task) if _counts_heads(name, number)}
    return tuple(sorted({1, *found}))


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


def _activations(task: Any) -> Iterator[Callable[[Any], Any]]:
    """Yields the callables in fields named for activations, anywhere in a task or model."""
    for name, value in _fields(task):
        if callable(value) and ("activation" in name or name == "fn"):
            yield value


def _counts_heads(name: str, value: Any) -> bool:
    return "heads" in name and type(value) is int and value > 0


def _fields(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all that is in a task or model, by the name of the field or key it is in."""
    yield name, node
    if callable(node) and ("activation" in name or name == "fn"):
        return
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from _fields(vars(node).get(field.name), field.name)
    elif isinstance(node, (tuple, list)):
        # A network that is kept as its leaves and its tree definition.
        if len(node) == 2 and isinstance(node[1], jax.tree_util.PyTreeDef):
            node = (node[1].unflatten(node[0]),)
        for item in node:
            yield from _fields(item, name)
    elif isinstance(node, dict):
        for key, item in node.items():
            yield from _fields(item, str(key))
