"""The operators of expressions, guarded: finite arguments give finite values and derivatives.

Each is written once, over an array module `np` that is NumPy or `jax.numpy`. Guards act only where
the textbook function, or its derivative, has no value that 32 bits hold: what would be divided by
less than 1e-18 is zero, quotients stay within 1e18, `square` and `cube` take arguments within 1e10,
and `exp`, `sinh` and `pow` stay below e^69, about 1e30. Only sums and products of numbers beyond
1e19 overflow, as everywhere.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

# Arrays of the module, or numbers.
Values = Any
TINY, EXPONENT, HUGE = 1e-30, 69.0, 1e10
# The derivative x / y^2 of a quotient stays below 1e36 if |y| and |y / x| are above this.
DIVISOR = 1e-18
# e^82 is 4e35: above that a derivative of `pow` counts as one of a division by nothing.
STEEP = 82.0


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


def _where(np: Any, chosen: Values, x: Values, otherwise: float) -> Values:
    return np.where(chosen, x, np.full_like(x, otherwise))


# Where a guard acts, the arguments are replaced before the function is taken: a derivative that is
# infinite makes no number of the zero that `where` multiplies it by afterwards.
def _divide(np: Any, x: Values, y: Values) -> Values:
    small, large = np.abs(y) <= DIVISOR, np.abs(x) * DIVISOR >= np.abs(y)
    plain = ~(small | large)
    quotient = _where(np, plain, x, 1.0) / _where(np, plain, y, 1.0)
    limit = np.sign(x) * np.sign(y) / DIVISOR
    return np.where(plain, quotient, _where(np, ~small, limit, 0.0))


def _sqrt(np: Any, x: Values) -> Values:
    safe = np.abs(x) > TINY
    root = np.sqrt(np.abs(_where(np, safe, x, 1.0)))
    return _where(np, safe, root, 0.0)


def _log(np: Any, x: Values) -> Values:
    return np.log(np.abs(x) + 1e-8)


def _pow(np: Any, x: Values, y: Values) -> Values:
    safe, y = np.abs(x) > TINY, np.clip(y, -HUGE, HUGE)
    logs = np.log(np.abs(_where(np, safe, x, 1.0)))
    exponents = y * logs
    plain = safe & (np.abs(exponents) < EXPONENT) & (exponents - logs < STEEP)
    logs = np.log(np.abs(np.where(plain, x, np.ones_like(exponents))))
    powers = np.exp(np.where(plain, y, np.zeros_like(exponents)) * logs)
    # Beyond the guards: as dividing by nothing near zero, the largest value far from it.
    grows = safe & (exponents >= EXPONENT) & (np.abs(x) > 1)
    limit = _where(np, grows, np.full_like(exponents, math.exp(EXPONENT)), 0.0)
    return np.sign(x) * np.where(plain, powers, limit)


def _square(np: Any, x: Values) -> Values:
    return np.clip(x, -HUGE, HUGE) ** 2


def _cube(np: Any, x: Values) -> Values:
    return np.clip(x, -HUGE, HUGE) ** 3


def _greater(np: Any, x: Values, y: Values) -> Values:
    shaped = np.clip(x, -1, 1) + np.clip(y, -1, 1)
    return np.where(x > y, np.ones_like(shaped), np.zeros_like(shaped))


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
    Operator("greater", 2, _greater),
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
    Operator("asinh", 1, lambda np, x: np.arcsinh(x), odd=True),
    Operator("relu", 1, lambda np, x: np.maximum(x, np.zeros_like(x))),
    Operator("erfc", 1, _erfc),
)
OPERATORS: Mapping[str, Operator] = MappingProxyType({one.name: one for one in _ALL})
