"""A distilled equation as a rule: it takes the network's place in `lopt.Coordinatewise`.

Its constants are its theta, so every estimator can tune them, and `.optimizer(theta)` is an Optax
optimizer at about Adam's cost; of the features it keeps only the accumulators that it uses.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures, AbstractRule, Columns, Tensor
from lopt.core.tensors import BLOCK_SIZE
from lopt.core.types import Key, Theta
from lopt.symbolic.expression import Expression, Node, Variable, evaluate, walk

History = dict[str, Columns]


class SymbolicRule(AbstractRule):
    """The rule whose output is an expression of the features; theta is `{"constants": ...}`.

    Variables with a lag look back in time; before the first step everything was zero.

    Attributes:
        root: the expression's tree.
        initial: its constants, that theta starts with.
        inputs: the names of all features that the rule is given, in order.
    """

    root: Node = eqx.field(static=True)
    initial: tuple[float, ...] = eqx.field(static=True)
    inputs: tuple[str, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        used = {node.name for node in walk(self.root) if isinstance(node, Variable)}
        missing = sorted(used - set(self.inputs))
        if missing:
            raise ValueError(
                f"SymbolicRule(inputs) lacks {', '.join(missing)}, which its expression uses; "
                f"there are {', '.join(self.inputs)}. Use the features that it was distilled from."
            )
        if not used:
            raise ValueError("SymbolicRule(root) uses no feature: a constant is no update rule.")

    @property
    def required_features(self) -> tuple[str, ...]:
        """The names of the features that it is given."""
        return self.inputs

    @property
    def is_elementwise(self) -> bool:
        """True: it has no product of matrices."""
        return True

    def init(self, key: Key) -> Theta:
        """Returns the constants as distilled."""
        return {"constants": jnp.asarray(np.asarray(self.initial, float))}

    def begin(self, theta: Theta, shape: tuple[int, ...]) -> History:
        """Returns zeros: what the features with a lag were, latest first."""
        dtype = theta["constants"].dtype
        return {name: jnp.zeros((lag, *shape), dtype) for name, lag in self._lags().items()}

    def _lags(self) -> dict[str, int]:
        """Returns how far back each feature is looked at, for those that are."""
        lags: dict[str, int] = {}
        for node in walk(self.root):
            if isinstance(node, Variable) and node.lag:
                lags[node.name] = max(node.lag, lags.get(node.name, 0))
        return dict(sorted(lags.items()))

    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: History
    ) -> tuple[Columns, History]:
        """Returns the expression's value for each coordinate, and the next memory."""
        shape = columns.shape[1:]
        now = {name: columns[i] for i, name in enumerate(self.inputs[: len(columns)])}
        for name, value in zip(self.inputs[len(columns) :], shared, strict=True):
            now[name] = value.reshape((1,) * len(shape))
        values = {Variable(name): value for name, value in now.items()}
        for name, past in memory.items():
            values |= {Variable(name, 1 + lag): past[lag] for lag in range(len(past))}
        value = evaluate(self.root, _shaped(theta["constants"], len(shape)), values, jnp)
        new = {
            name: jnp.concatenate([jnp.broadcast_to(now[name], shape)[None], past[:-1]])
            for name, past in memory.items()
        }
        return jnp.broadcast_to(value, shape)[None], new


class Output(eqx.Module):
    """The update that is the rule's only output itself."""

    def __call__(self, outputs: Columns) -> Tensor:
        """Returns the output, which is added to the parameter."""
        (output,) = outputs
        return output


def symbolic_optimizer(
    expression: Expression,
    features: AbstractFeatures,
    scale: Any = None,
    *,
    normalise: bool = False,
    block_size: int = BLOCK_SIZE,
) -> Coordinatewise:
    """Returns the optimizer whose rule is an expression.

    Args:
        expression: of features, by name.
        features: what it was distilled from; reduced to what the expression uses, see
            `AbstractFeatures.select`. An equation of time alone keeps one column: what tells how
            many coordinates there are.
        scale: from the output to the update, that of the network in whose place it stands; by
            default the output is the update.
        normalise: as of the network in whose place it stands.
        block_size: see `lopt.Coordinatewise`.

    Raises:
        ValueError: if the expression uses a feature that is not among `features`, or none, or if
            all coordinates share all features.

    Example:
        >>> import jax, lopt
        >>> from lopt.symbolic import Variable, make_expression, symbolic_optimizer
        >>> rule = make_expression(("multiply", -0.01, Variable("m_normalised")))
        >>> features = lopt.learned.MomentFeatures(("m_normalised", "g_normalised"))
        >>> adam = symbolic_optimizer(rule, features)
        >>> sorted(adam.features.names())
        ['m_normalised']
    """
    used = {variable.name for variable in expression.variables}
    known = features.names()
    if missing := sorted(used - set(known)):
        raise ValueError(
            f"The expression uses {', '.join(missing)}, but the features are {', '.join(known)}; "
            "use the features that it was distilled from."
        )
    columns = features.column_names()
    if not columns:
        raise ValueError(
            f"All coordinates share the features {', '.join(known)}; name a feature of each "
            "coordinate as well, such as gradient."
        )
    if used:
        kept = used if used & set(columns) else {columns[0], *used}
        features = features.select(tuple(name for name in known if name in kept))
    constants = tuple(np.asarray(expression.constants, float).tolist())
    rule = SymbolicRule(expression.root, constants, features.names())
    return Coordinatewise(features, rule, scale or Output(), normalise, block_size)


def in_place_of(
    learned: Coordinatewise, theta: Theta, expression: Expression, scale: Any = None
) -> tuple[Coordinatewise, Theta]:
    """Returns a learned optimizer and its theta with an expression in place of the network.

    Features with weights of their own, such as learned decays, are kept whole, weights included;
    of joined features those that the expression does not use are dropped.

    Args:
        learned: what the expression was distilled from.
        theta: its weights.
        expression: of its features.
        scale: from the expression's value to the update; by default that of `learned`, whose rule
            must then have one output.

    Raises:
        ValueError: if the expression uses other features.
    """
    scale = learned.scale if scale is None else scale
    distilled = symbolic_optimizer(
        expression,
        learned.features,
        scale,
        normalise=learned.normalise,
        block_size=learned.block_size,
    )
    key = jax.random.key(0)
    # What is dropped has no weights, or leaves none behind: weights at most change their places.
    structure: Any = jax.tree.structure(jax.eval_shape(distilled.features.init, key))
    weights = jax.tree.leaves(theta["features"]) if structure.num_leaves else []
    features = jax.tree.unflatten(structure, weights)
    return distilled, {"features": features, "rule": distilled.rule.init(key)}


def _shaped(constants: Float[Array, " constant"], rank: int) -> Float[Array, "..."]:
    """Gives constants the rank of coordinates, so that nothing is promoted in rank."""
    return constants.reshape(-1, *(1,) * rank)
