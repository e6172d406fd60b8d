"""What else is symmetric about linear units: their layers are a product, and any basis will do.

Two layers x -> W2 (W1 x + b1) + b2 without a nonlinearity in between are one affine map. With these
and the translations every direction is named that leaves its softmax as it is.
"""

import functools

import jax
import jax.numpy as jnp

from lopt.analysis.symmetry.generators import FreeGenerator
from lopt.analysis.symmetry.places import Units, array_at, leaves_by_path, with_leaves
from lopt.core.types import Params


def mixing(params: Params, incoming: tuple[str, ...], outgoing: str) -> FreeGenerator:
    """Changes the basis of linear units: W1, b1 -> A W1, A b1 and W2 -> W2 A^-1 with A = exp(a).

    One unit for each entry of a, so that r^2 of r hidden units; rescaling is its diagonal. Gradient
    flow conserves the symmetric part of W1 W1' + b1 b1' - W2' W2.

    Args:
        params: of the network, for the shapes.
        incoming: paths of W1, and of b1 if there is one.
        outgoing: path of W2.
    """
    units = array_at("mixing", leaves_by_path(params), incoming[0]).shape[0] ** 2
    action = functools.partial(_mix, incoming, outgoing)
    return FreeGenerator(f"mixing of {incoming[0]} and {outgoing}", "mixing", units, action)


def bias_exchange(params: Params, hidden: str, outgoing: str, output: str) -> FreeGenerator:
    """Moves a bias through a linear layer: b1 -> b1 + a and b2 -> b2 - W2 a.

    Args:
        params: of the network, for the shapes.
        hidden: path of b1.
        outgoing: path of W2.
        output: path of b2.
    """
    units = array_at("bias_exchange", leaves_by_path(params), hidden).shape[0]
    action = functools.partial(_exchange, hidden, outgoing, output)
    return FreeGenerator(f"bias exchange of {hidden} and {output}", "bias exchange", units, action)


def early_translation(params: Params, incoming: str, outgoing: str) -> FreeGenerator:
    """Adds the same to all logits from the first of two linear layers: W1 -> W1 + W2^+ 1 a'.

    Exact where 1 is in the range of W2, as it is with at least as many units as classes. Together
    with `translation` it moves the logits by any affine function of the inputs.

    Args:
        params: of the network, for the shapes.
        incoming: path of W1.
        outgoing: path of W2.
    """
    units = array_at("early_translation", leaves_by_path(params), incoming).shape[1]
    action = functools.partial(_translate, incoming, outgoing)
    return FreeGenerator(f"early translation of {incoming}", "early translation", units, action)


def _mix(incoming: tuple[str, ...], outgoing: str, params: Params, amounts: Units) -> Params:
    leaves = leaves_by_path(params)
    width = leaves[incoming[0]].shape[0]
    exponent = amounts.reshape(width, width)
    forth, back = jax.scipy.linalg.expm(exponent), jax.scipy.linalg.expm(-exponent)
    new = {path: jnp.tensordot(forth, leaves[path], axes=1) for path in incoming}
    return with_leaves(params, new | {outgoing: leaves[outgoing] @ back}, others=True)


def _exchange(hidden: str, outgoing: str, output: str, params: Params, amounts: Units) -> Params:
    leaves = leaves_by_path(params)
    new = {
        hidden: leaves[hidden] + amounts,
        output: leaves[output] - leaves[outgoing] @ amounts,
    }
    return with_leaves(params, new, others=True)


def _translate(incoming: str, outgoing: str, params: Params, amounts: Units) -> Params:
    leaves = leaves_by_path(params)
    after = leaves[outgoing]
    towards = jnp.linalg.pinv(after) @ jnp.ones(len(after), after.dtype)
    new = {incoming: leaves[incoming] + jnp.outer(towards, amounts)}
    return with_leaves(params, new, others=True)
