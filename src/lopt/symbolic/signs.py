"""What the form of an expression says about signs: which trees are never negative, which are odd.

A rule is odd if u(-g) = -u(g): it has no preferred direction, as gradient descent has none.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from lopt.symbolic.expression import Constant, Expression, Node, Variable
from lopt.symbolic.operators import OPERATORS

Parity = Literal["odd", "even", "zero"] | None


def is_odd(expression: Expression, odd: Collection[str], even: Collection[str] = ()) -> bool:
    """Returns whether the form of an expression shows that it changes sign with its features.

    False may be wrong: max(x, 0) - max(-x, 0) is odd, but its form does not show it.

    Args:
        expression: what to look at.
        odd: names of features that change sign with the gradient, such as momenta.
        even: names of those that do not, such as second moments and the time.

    Raises:
        ValueError: if it uses a feature that is neither, or one is both.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> adam = ("divide", Variable("m"), ("sqrt", Variable("v")))
        >>> is_odd(make_expression(adam), odd=["m"], even=["v"])
        True
        >>> is_odd(make_expression(("add", 0.1, adam)), odd=["m"], even=["v"])
        False
    """
    if both := sorted(set(odd) & set(even)):
        raise ValueError(f"is_odd: {', '.join(both)} cannot be both odd and even.")
    used = {variable.name for variable in expression.variables}
    if unknown := sorted(used - set(odd) - set(even)):
        raise ValueError(f"is_odd: name {', '.join(unknown)} among the odd or the even features.")
    constants = np.asarray(expression.constants, float).tolist()
    return _parity(expression.root, constants, odd) in ("odd", "zero")


def _parity(node: Node, constants: Sequence[float], odd: Collection[str]) -> Parity:
    if isinstance(node, Constant):
        return "zero" if constants[node.index] == 0 else "even"
    if isinstance(node, Variable):
        return "odd" if node.name in odd else "even"
    parities = [_parity(argument, constants, odd) for argument in node.arguments]
    first, last = parities[0], parities[-1]
    known = None not in parities
    match node.operator:
        case "add" | "subtract":
            if "zero" in parities:
                return first if last == "zero" else last
            return first if first == last else None
        case "multiply" | "divide":
            if "zero" in parities:
                return "zero"
            return ("even" if first == last else "odd") if known else None
        case "quotient":
            # Its denominator is even in y.
            return first if known or first == "zero" else None
        case "pow":
            return first if last in ("even", "zero") or first == "zero" else None
    if all(parity in ("even", "zero") for parity in parities):
        return "even"
    operator = OPERATORS[node.operator]
    if operator.odd:
        return first
    return "even" if operator.even and known else None


def never_negative(node: Node, constants: Sequence[float]) -> bool:
    """Returns whether the form of a tree alone says that its value is not negative."""
    if isinstance(node, Constant):
        return constants[node.index] >= 0
    if isinstance(node, Variable):
        return False
    signs = [never_negative(argument, constants) for argument in node.arguments]
    match node.operator:
        case "abs" | "square" | "sqrt" | "exp" | "relu" | "erfc" | "greater":
            return True
        case "add" | "multiply" | "divide" | "min":
            return all(signs)
        case "max":
            return any(signs)
        case "pow" | "quotient" | "sign" | "cube" | "tanh" | "sinh" | "asinh":
            return signs[0]
        case _:
            return False
