"""What a learned rule does as a function of each of its inputs.

Response curves vary one feature and hold the others where they were found, or where they are put;
their mean over many recorded inputs is the partial dependence (Friedman 2001, section 8.2), the
curves themselves are individual conditional expectations (Goldstein et al. 2015, arXiv:1309.6392).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.analysis.dynamics.inputs import (
    InputRows,
    check_inputs,
    feature_place,
    input_sizes,
)
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.types import Scalar, Theta


@eqx.filter_jit
def response_curves(
    learned: Coordinatewise,
    theta: Theta,
    inputs: InputRows,
    feature: str,
    values: Float[Array, " point"],
) -> Float[Array, "row point"]:
    """Returns the update as a function of one feature, for each row of inputs.

    Args:
        learned: the optimizer.
        theta: its weights.
        inputs: where the other features are held, from `recorded_inputs` or `given_inputs`.
        feature: the name of the one that varies.
        values: which it takes.

    Raises:
        ValueError: if it has no such feature, `inputs` are not its own, or `values` no row.

    Example:
        >>> import jax, jax.numpy as jnp, lopt
        >>> from lopt.analysis.dynamics import given_inputs, response_curves
        >>> learned, values = lopt.small_mlp(), jnp.linspace(-2, 2, 5)
        >>> theta = learned.init(jax.random.key(0))
        >>> inputs = given_inputs(learned, theta, {"momentum_0.9": 1.0})
        >>> response_curves(learned, theta, inputs, "gradient", values).shape
        (1, 5)
    """
    check_inputs("response_curves", learned, theta, inputs)
    place = feature_place("response_curves", learned, feature)
    if jnp.ndim(values) != 1:
        raise ValueError(
            f"response_curves(values) must be a row of numbers; it has shape {jnp.shape(values)}. "
            "Try jnp.linspace(-2, 2, 51)."
        )

    def at(row: InputRows, value: Scalar) -> Scalar:
        features = jnp.concatenate([row.columns, row.shared]).at[place].set(value)
        return _answer(learned, theta, features, row.memory)

    over_values = jax.vmap(at, in_axes=(None, 0))
    points = jnp.asarray(values, inputs.columns.dtype)
    return jax.vmap(over_values, in_axes=(0, None))(inputs, points)


def partial_dependence(
    learned: Coordinatewise,
    theta: Theta,
    inputs: InputRows,
    feature: str,
    values: Float[Array, " point"],
) -> Float[Array, " point"]:
    """Returns the mean of `response_curves` over the rows of inputs."""
    return jnp.mean(response_curves(learned, theta, inputs, feature, values), axis=0)


@eqx.filter_jit
def sensitivities(
    learned: Coordinatewise, theta: Theta, inputs: InputRows
) -> Float[Array, "row feature"]:
    """Returns the derivative of the update in each feature, at each row of inputs.

    Features are in the order of `learned.features.names()`.
    """
    check_inputs("sensitivities", learned, theta, inputs)

    def at(row: InputRows) -> Float[Array, " feature"]:
        features = jnp.concatenate([row.columns, row.shared])
        return jax.grad(lambda features: _answer(learned, theta, features, row.memory))(features)

    return jax.vmap(at)(inputs)


def _answer(
    learned: Coordinatewise,
    theta: Theta,
    features: Float[Array, " feature"],
    entries: Float[Array, " entry"],
) -> Scalar:
    """Returns the update of one coordinate."""
    columns, _, _ = input_sizes(learned, theta)
    weights = jax.tree.map(lambda leaf: leaf.astype(features.dtype), theta["rule"])
    leaves, structure = jax.tree.flatten(
        jax.eval_shape(lambda weights: learned.rule.begin(weights, (1,)), weights)
    )
    memory, begin = [], 0
    for leaf in leaves:
        part = entries[begin : begin + leaf.size]
        memory.append(part.reshape(leaf.shape).astype(leaf.dtype))
        begin += leaf.size
    outputs, _ = learned.rule.apply(
        weights, features[:columns, None], features[columns:], jax.tree.unflatten(structure, memory)
    )
    return learned.scale(outputs)[0]
