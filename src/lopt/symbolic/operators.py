"""The operators of expressions, guarded: finite arguments give finite values and derivatives.

Each is written once, over an array module `np` that is NumPy or `jax.numpy`. Guards change values
only where the textbook function has none: division by what is smaller than 1e-30 gives zero, and
`exp`, `sinh`, `square`, `cube` and `pow` stay below about 1e30.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jaxtyping import Array, Float

Values = Float[Array, "..."]
TINY, EXPONENT, HUGE = 1e-30, 69.0, 1e10


@dataclasses.dataclass(frozen=True)
class Operator:
    """A function of one or two arguments.

    Attributes:
        name: as in files.
        arity: the number of arguments.
        apply: (np, *arguments) to values, for an array module.
        odd: whether f(-x) = -f(x), for an operator of one argument.
        even: whether f(-x) = f(x).
    """

    name: str
    arity: int
    apply: Callable[..., Values]
    odd: bool = False
    even: bool = False


def _away_from_zero(np: Any, x: Values) -> tuple[Values, Values]:
    """Returns where x is large enough to divide by, and x with ones elsewhere."""
    safe = np.abs(x) > TINY
    return safe, np.where(safe, x, np.ones_like(x))


def _divide(np: Any, x: Values, y: Values) -> Values:
    safe, y = _away_from_zero(np, y)
    return np.where(safe, x / y, np.zeros_like(x / y))


def _sqrt(np: Any, x: Values) -> Values:
    safe, x = _away_from_zero(np, x)
    return np.where(safe, np.sqrt(np.abs(x)), np.zeros_like(x))


def _log(np: Any, x: Values) -> Values:
    return np.log(np.abs(x) + 1e-8)


def _pow(np: Any, x: Values, y: Values) -> Values:
    safe, x = _away_from_zero(np, x)
    logs = np.clip(y * np.log(np.abs(x)), -EXPONENT, EXPONENT)
    return np.where(safe, np.sign(x) * np.exp(logs), np.zeros_like(logs))


def _square(np: Any, x: Values) -> Values:
    return np.clip(x, -HUGE, HUGE) ** 2


def _cube(np: Any, x: Values) -> Values:
    return np.clip(x, -HUGE, HUGE) ** 3


def _asinh(np: Any, x: Values) -> Values:
    # Stable on both sides, where the primitive of some array modules is not.
    x = np.clip(x, -HUGE, HUGE)
    return np.sign(x) * np.log1p(np.abs(x) + x * x / (1 + np.sqrt(x * x + 1)))


def _erfc(np: Any, x: Values) -> Values:
    if np is jax.numpy:
        return jax.scipy.special.erfc(x)
    from scipy.special import erfc

    return erfc(x)


_ALL = (
    Operator("add", 2, lambda np, x, y: x + y),
    Operator("subtract", 2, lambda np, x, y: x - y),
    Operator("multiply", 2, lambda np, x, y: x * y),
    Operator("divide", 2, _divide),
    # sign(x) |x|^y
    Operator("pow", 2, _pow),
    Operator("max", 2, lambda np, x, y: np.maximum(x, y)),
    Operator("min", 2, lambda np, x, y: np.minimum(x, y)),
    # One where x > y, else zero.
    Operator("greater", 2, lambda np, x, y: np.where(x > y, np.ones_like(x + y), 0 * (x + y))),
    # x / sqrt(1 + y^2)
    Operator("quotient", 2, lambda np, x, y: x / np.sqrt(1 + np.clip(y, -HUGE, HUGE) ** 2)),
    Operator("negative", 1, lambda np, x: -x, odd=True),
    Operator("abs", 1, lambda np, x: np.abs(x), even=True),
    Operator("sign", 1, lambda np, x: np.sign(x), odd=True),
    Operator("square", 1, _square, even=True),
    Operator("cube", 1, _cube, odd=True),
    # sqrt(|x|) and log(|x| + 1e-8)
    Operator("sqrt", 1, _sqrt, even=True),
    Operator("log", 1, _log, even=True),
    Operator("exp", 1, lambda np, x: np.exp(np.clip(x, -EXPONENT, EXPONENT))),
    Operator("tanh", 1, lambda np, x: np.tanh(x), odd=True),
    Operator("sinh", 1, lambda np, x: np.sinh(np.clip(x, -EXPONENT, EXPONENT)), odd=True),
    Operator("asinh", 1, _asinh, odd=True),
    Operator("relu", 1, lambda np, x: np.maximum(x, np.zeros_like(x))),
    Operator("erfc", 1, _erfc),
)
OPERATORS: Mapping[str, Operator] = MappingProxyType({one.name: one for one in _ALL})
