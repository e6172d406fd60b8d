"""The symmetries that architectures have, built from the paths of the arrays they act on.

Translation before a softmax, scale before a normalisation and rescale around homogeneous units are
those of Kunin et al. 2021 (arXiv:2012.04728). A unit of degree d, phi(a z) = a^d phi(z) for a > 0,
pays for a factor a on its way in by a^-d on its way out: d is 1 for ReLU, leaky ReLU and linear
units, 2 for squared ReLU. None is believed: see `lopt.analysis.symmetry.check_symmetry`.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from lopt.analysis.symmetry.generators import Symmetry
from lopt.analysis.symmetry.places import Place, Tensor, array_at, leaves_by_path
from lopt.core.checks import is_real
from lopt.core.types import Params

Order = Literal["last", "first"]


def translation(
    params: Params, weight: str, bias: str | None = None, name: str | None = None
) -> Symmetry:
    """Adds the same to all outputs of a layer: the softmax, or a layer norm, behind it ignores it.

    One unit for each input of the layer, whose column moves as one, and one for the bias.

    Args:
        params: of the network, for the shapes.
        weight: path of the array of shape (outputs, inputs).
        bias: path of its bias, if there is one.
        name: by default made of the kind and the layer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.zeros((10, 20)), "b": jnp.zeros(10)}
        >>> translation(params, "['w']", "['b']").units
        21
    """
    owner = "translation"
    array = _matrix(owner, params, weight)
    # Of a convolution's kernel, every entry of an output channel has a unit of its own.
    inputs = array.size // array.shape[0]
    places = [Place(weight, axis=1, view=(array.shape[0], inputs), slices=inputs)]
    if bias is not None:
        array_at(owner, leaves_by_path(params), bias)
        places.append(Place(bias, axis=None, first=inputs))
    name = name or f"translation of {weight}"
    return Symmetry(name, "translation", len(places) - 1 + inputs, "shift", tuple(places))


def scale(
    params: Params,
    weight: str,
    bias: str | None = None,
    *,
    whole: bool = False,
    name: str | None = None,
) -> Symmetry:
    """Scales what leads into a normalisation, which divides it away.

    Args:
        params: of the network, for the shapes.
        weight: path of the array whose first axis counts the outputs.
        bias: path of its bias, if there is one.
        whole: scale all outputs at once, as before a layer norm, instead of each, as before a
            batch norm.
        name: by default made of the kind and the layer.
    """
    array = _matrix("scale", params, weight)
    units, axis = (1, None) if whole else (array.shape[0], 0)
    places = _incoming("scale", params, (weight, bias), axis, units)
    return Symmetry(name or f"scale of {weight}", "scale", units, "stretch", places)


def bias_shift(params: Params, bias: str, *, name: str | None = None) -> Symmetry:
    """Shifts a bias, entry by entry: a batch norm behind it subtracts it again.

    So does the softmax of attention with the bias of the keys.
    """
    kind = "bias shift"
    units = layer_width(kind, params, (bias,))
    places = _incoming(kind, params, (bias,), 0, units)
    return Symmetry(name or f"{kind} of {bias}", kind, units, "shift", places)


def rescale(
    params: Params,
    incoming: str | tuple[str, ...],
    outgoing: str | tuple[str, ...],
    *,
    degree: float = 1.0,
    order: Order = "last",
    kind: str = "rescale",
    name: str | None = None,
) -> Symmetry:
    """Scales what leads into homogeneous units, and what leads out of them the other way.

    Layers may be dense or convolutional, and a dense one may follow the flattened image of a
    convolutional one.

    Args:
        params: of the network, for the shapes.
        incoming: paths of the arrays whose first axis counts the units: weight and bias, or gain
            and shift of a normalisation.
        outgoing: path of the next layer's weight, whose second axis counts the units, or those of
            all layers that read them.
        degree: of the units, in between.
        order: whether the units come "last" or "first" in the flattened image, where there is one.
        kind: what tables call it.
        name: by default made of the kind and the layers.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"conv": jnp.zeros((8, 3, 5, 5)), "dense": jnp.zeros((10, 128))}
        >>> rescale(params, "['conv']", "['dense']").places[1].view  # 16 positions of 8 channels
        (10, 16, 8)
    """
    incoming = check_paths(kind, "incoming", params, incoming)
    units = layer_width(kind, params, incoming)
    outgoing = check_paths(kind, "outgoing", params, outgoing)
    if order not in get_args(Order):
        raise ValueError(f"{kind}(order={order!r}) must be 'last' or 'first'; try 'last'.")
    if not is_real(degree) or not 0 < abs(degree) < float("inf"):
        raise ValueError(
            f"{kind}(degree={degree!r}) must be a finite number and not zero, which would leave "
            "the way out as it is (see scale for that); try 1.0."
        )
    places = list(_incoming(kind, params, incoming, 0, units))
    for path in outgoing:
        array = _matrix(kind, params, path)
        entries = array.shape[1]
        if entries % units:
            raise ValueError(
                f"{kind}(incoming={incoming[0]!r}, outgoing={path!r}) must be the two sides of "
                f"one layer of units; the first has {units} outputs and the other {entries} "
                "inputs. Try the weight of the layer that follows."
            )
        if entries == units:
            places.append(Place(path, axis=1, coefficient=-degree))
        else:
            split = (entries // units, units) if order == "last" else (units, entries // units)
            view = (array.shape[0], *split, *array.shape[2:])
            axis = 2 if order == "last" else 1
            places.append(Place(path, axis=axis, coefficient=-degree, view=view))
    name = name or f"{kind} of {incoming[0]} and {', '.join(outgoing)}"
    return Symmetry(name, kind, units, "stretch", tuple(places))


def query_key_rescale(
    params: Params,
    query: str | tuple[str, ...],
    key: str | tuple[str, ...],
    *,
    name: str | None = None,
) -> Symmetry:
    """Scales each component of the queries, and that of the keys the other way: products stay.

    Args:
        params: of the network, for the shapes.
        query: paths of the projection's weight, and of its bias if there is one; the first axis
            counts the components, of all heads.
        key: the same of the keys.
        name: by default made of the kind and the layers.
    """
    kind = "query-key rescale"
    query = check_paths(kind, "query", params, query)
    key = check_paths(kind, "key", params, key)
    units = layer_width(kind, params, query)
    places = (
        *_incoming(kind, params, query, 0, units),
        *_incoming(kind, params, key, 0, units, -1.0),
    )
    return Symmetry(name or f"{kind} of {query[0]}", kind, units, "stretch", places)


def check_paths(
    owner: str, field: str, params: Params, given: str | tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the paths of some arrays, refusing none at all, one twice, and one that is not there.

    Raises:
        ValueError: naming it.
    """
    paths: Any = (given,) if isinstance(given, str) else given
    several = isinstance(paths, Sequence) and all(isinstance(path, str) for path in paths)
    paths = tuple(paths) if several else ()
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(
            f"{owner}({field}={given!r}) must name at least one array and none twice; try the "
            "paths of a weight and its bias."
        )
    for path in paths:
        array_at(owner, leaves_by_path(params), path)
    return paths


def layer_width(owner: str, params: Params, paths: tuple[str, ...]) -> int:
    """Returns how many units arrays have on their first axis.

    Raises:
        ValueError: if there are none, or not as many in all of them.
    """
    shapes = [array_at(owner, leaves_by_path(params), path).shape for path in paths]
    if len({shape[:1] for shape in shapes}) > 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            f"{owner} needs arrays whose first axes count the same units; those at "
            f"{', '.join(paths)} have shapes {shapes}. Try the weight of a layer, (outputs, "
            "inputs), and its bias, or Symmetry with Place(path, axis) for another layout."
        )
    return shapes[0][0]


def _incoming(
    owner: str,
    params: Params,
    paths: tuple[str | None, ...],
    axis: int | None,
    units: int,
    coefficient: float = 1.0,
) -> tuple[Place, ...]:
    """Returns places for arrays whose first axis counts units."""
    leaves = leaves_by_path(params)
    places = tuple(Place(path, axis, coefficient) for path in paths if path is not None)
    for place in places:
        place.check(owner, array_at(owner, leaves, place.path), units)
    return places


def _matrix(owner: str, params: Params, path: str) -> Tensor:
    array = array_at(owner, leaves_by_path(params), path)
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"{owner}({path!r}) needs a weight of shape (outputs, inputs, ...); it has shape "
            f"{array.shape}. Try the weight of the layer and not its bias."
        )
    return array
