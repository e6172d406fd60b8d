"""The symmetries that architectures have, built from the paths of the arrays they act on.

Translation before a softmax, scale before a normalisation and rescale around homogeneous units are
those of Kunin et al. 2021 (arXiv:2012.04728). A unit of degree d, phi(a z) = a^d phi(z) for a > 0,
pays for a factor a on its way in by a^-d on its way out: d is 1 for ReLU, leaky ReLU and linear
units, 2 for squared ReLU. None is believed: see `lopt.analysis.symmetry.check_symmetry`.
"""

from typing import Literal

from lopt.analysis.symmetry.generators import Symmetry
from lopt.analysis.symmetry.places import Place, Tensor, array_at, leaves_by_path
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
    array = array_at("bias_shift", leaves_by_path(params), bias)
    places = _incoming("bias_shift", params, (bias,), 0, array.shape[0])
    kind = "bias shift"
    return Symmetry(name or f"{kind} of {bias}", kind, array.shape[0], "shift", places)


def rescale(
    params: Params,
    incoming: str | tuple[str, ...],
    outgoing: str,
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
        outgoing: path of the next layer's weight, whose second axis counts the units.
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
    incoming = (incoming,) if isinstance(incoming, str) else incoming
    leaves = leaves_by_path(params)
    units = array_at(kind, leaves, incoming[0]).shape[0]
    array = _matrix(kind, params, outgoing)
    entries = array.shape[1]
    if entries % units:
        raise ValueError(
            f"{kind}(incoming={incoming[0]!r}, outgoing={outgoing!r}) must be the two sides of one "
            f"layer of units; the first has {units} outputs and the other {entries} inputs. Try "
            "the weight of the layer that follows."
        )
    if not degree:
        raise ValueError(f"{kind}(degree=0) leaves the way out as it is; try scale.")
    places = _incoming(kind, params, incoming, 0, units)
    if entries == units:
        out = Place(outgoing, axis=1, coefficient=-degree)
    else:
        split = (entries // units, units) if order == "last" else (units, entries // units)
        view = (array.shape[0], *split, *array.shape[2:])
        out = Place(outgoing, axis=2 if order == "last" else 1, coefficient=-degree, view=view)
    name = name or f"{kind} of {incoming[0]} and {outgoing}"
    return Symmetry(name, kind, units, "stretch", (*places, out))


def query_key_rescale(
    params: Params,
    query: tuple[str, ...],
    key: tuple[str, ...],
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
    units = array_at(kind, leaves_by_path(params), query[0]).shape[0]
    places = (
        *_incoming(kind, params, query, 0, units),
        *_incoming(kind, params, key, 0, units, -1.0),
    )
    return Symmetry(name or f"{kind} of {query[0]}", kind, units, "stretch", places)


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
    if array.ndim < 2:
        raise ValueError(
            f"{owner}({path!r}) needs a weight of shape (outputs, inputs, ...); it has shape "
            f"{array.shape}. Try the weight of the layer and not its bias."
        )
    return array
