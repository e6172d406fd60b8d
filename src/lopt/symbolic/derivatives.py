"""Derivatives of expressions by their constants, in NumPy and by hand.

Fitting constants asks for thousands of Jacobians of short expressions that are all different.
Compiling each costs more than all its evaluations, and a reverse pass over the tree is a few array
operations per node. The partial derivatives are those of `operators`, guards included; a test
compares them with JAX's.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.symbolic.expression import Call, Constant, Node, Variable
from lopt.symbolic.operators import DIVISOR, EXPONENT, HUGE, OPERATORS, STEEP, TINY

# Arrays, or numbers where only constants are below.
Values = Any
Columns = Mapping[Variable, Float[np.ndarray, " row"]]


def jacobian(
    node: Node, constants: Float[np.ndarray, " constant"], columns: Columns, rows: int
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, "constant row"]]:
    """Returns the values of a tree and their derivatives by each constant.

    Args:
        node: the root.
        constants: by index.
        columns: in 64 bits.
        rows: how many there are, for trees without a variable.
    """
    slopes = np.zeros((len(constants), rows))
    with np.errstate(all="ignore"):
        values = _forward(node, constants, columns)
        _backward(node, values, np.ones(rows), slopes)
    return np.broadcast_to(values[0], (rows,)), slopes


def _forward(node: Node, constants: Values, columns: Columns) -> Any:
    """Returns a node's value, and as much of its arguments; None if no constant is below it."""
    if isinstance(node, Constant):
        return constants[node.index], ()
    if isinstance(node, Variable):
        return columns[node], None
    parts = [_forward(argument, constants, columns) for argument in node.arguments]
    value = OPERATORS[node.operator].apply(np, *(part[0] for part in parts))
    return value, parts if any(part[1] is not None for part in parts) else None


def _backward(node: Node, values: Any, sensitivity: Values, slopes: Values) -> None:
    """Adds a node's share to the slopes, given the derivative of the root by it."""
    value, parts = values
    if isinstance(node, Constant):
        slopes[node.index] += sensitivity
    elif isinstance(node, Call) and parts is not None:
        arguments = [part[0] for part in parts]
        for place, argument in enumerate(node.arguments):
            if parts[place][1] is not None:
                partial = PARTIALS[node.operator][place](value, *arguments)
                _backward(argument, parts[place], sensitivity * partial, slopes)


def _inside(x: Values, bound: float) -> Values:
    return np.where(np.abs(x) < bound, 1.0, 0.0)


def _divided(value: Values, x: Values, y: Values) -> Values:
    """Returns x / y where no guard of the quotient `value` acts, else zero."""
    plain = (np.abs(y) > DIVISOR) & (np.abs(value) < 1 / DIVISOR)
    return np.where(plain, x / np.where(plain, y, 1.0), 0.0)


def _wins(x: Values, y: Values) -> Values:
    """Returns one where x > y, and a half where they are equal, as JAX has it."""
    return np.where(x > y, 1.0, np.where(x == y, 0.5, 0.0))


def _power(value: Values, x: Values, y: Values) -> tuple[Values, Values]:
    """Returns log |x| and the power `value`, both zero where a guard acts."""
    safe = np.abs(x) > TINY
    logarithm = np.log(np.where(safe, np.abs(x), 1.0))
    exponent = _clipped(y) * logarithm
    plain = safe & (np.abs(exponent) < EXPONENT) & (exponent - logarithm < STEEP)
    return np.where(plain, logarithm, 0.0), np.where(plain, value, 0.0)


def _pow_by_base(value: Values, x: Values, y: Values) -> Values:
    _, power = _power(value, x, y)
    return power * _clipped(y) / np.where(np.abs(x) > TINY, x, 1.0)


def _pow_by_exponent(value: Values, x: Values, y: Values) -> Values:
    logarithm, power = _power(value, x, y)
    return power * logarithm * _inside(y, HUGE)


def _clipped(y: Values) -> Values:
    return np.clip(y, -HUGE, HUGE)


# Of a value f and its arguments: the derivative by each of them.
PARTIALS: Mapping[str, tuple[Callable[..., Any], ...]] = MappingProxyType(
    {
        "add": (lambda f, x, y: 1.0, lambda f, x, y: 1.0),
        "subtract": (lambda f, x, y: 1.0, lambda f, x, y: -1.0),
        "multiply": (lambda f, x, y: y, lambda f, x, y: x),
        "divide": (lambda f, x, y: _divided(f, 1.0, y), lambda f, x, y: _divided(f, -f, y)),
        "pow": (_pow_by_base, _pow_by_exponent),
        "max": (lambda f, x, y: _wins(x, y), lambda f, x, y: _wins(y, x)),
        "min": (lambda f, x, y: _wins(y, x), lambda f, x, y: _wins(x, y)),
        "greater": (lambda f, x, y: 0.0, lambda f, x, y: 0.0),
        "quotient": (
            lambda f, x, y: 1 / np.sqrt(1 + _clipped(y) ** 2),
            lambda f, x, y: -f * y / (1 + _clipped(y) ** 2) * _inside(y, HUGE),
        ),
        "negative": (lambda f, x: -1.0,),
        "abs": (lambda f, x: np.sign(x),),
        "sign": (lambda f, x: 0.0,),
        "square": (lambda f, x: 2 * x * _inside(x, HUGE),),
        "cube": (lambda f, x: 3 * x**2 * _inside(x, HUGE),),
        "sqrt": (lambda f, x: 0.5 * np.sign(x) / np.where(f > 0, f, np.inf),),
        "log": (lambda f, x: np.sign(x) / (np.abs(x) + 1e-8),),
        "exp": (lambda f, x: f * _inside(x, EXPONENT),),
        "tanh": (lambda f, x: 1 - f * f,),
        "sinh": (lambda f, x: np.cosh(np.clip(x, -EXPONENT, EXPONENT)) * _inside(x, EXPONENT),),
        "asinh": (lambda f, x: 1 / np.hypot(1, x),),
        "relu": (lambda f, x: _wins(x, np.zeros_like(x)),),
        "erfc": (lambda f, x: -2 / np.sqrt(np.pi) * np.exp(-(np.clip(x, -30, 30) ** 2)),),
    }
)
