"""Expressions and SymPy's, in both directions.

SymPy's are the textbook functions without the guards: they agree with ours wherever no guard acts,
which includes 0/0 (zero here, no number there) and overflow. `sqrt(x)` becomes sqrt(|x|), `log(x)`
log(|x| + 1e-8) and `pow(x, y)` sign(x) |x|^y, as they are defined.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lopt.symbolic.expression import (
    Constant,
    Expression,
    Node,
    Variable,
    evaluate,
    make_expression,
    walk,
)

UNARY = ("tanh", "sinh", "asinh", "erfc", "exp", "sign")


def sympy_module(what: str) -> Any:
    """Returns SymPy.

    Raises:
        ImportError: naming the extra to install, if it is missing.
    """
    try:
        import sympy
    except ImportError as error:
        raise ImportError(
            f"{what} needs SymPy, which is not installed; install lopt[symbolic]."
        ) from error
    return sympy


def to_sympy(expression: Expression) -> Any:
    """Returns an expression as one of SymPy, with a real symbol for each feature.

    Symbols are named as features print, such as "m[t-1]". Constants keep their 64 bits; whole ones
    become integers, as SymPy treats those best. What has no feature is evaluated with its guards.

    Raises:
        ImportError: if SymPy is missing.
        ValueError: if two features print alike.

    Example:
        >>> to_sympy(make_expression(("divide", Variable("m"), ("sqrt", Variable("v")))))
        m/sqrt(Abs(v))
    """
    sympy = sympy_module("to_sympy")
    symbols = {one: sympy.Symbol(str(one), real=True) for one in expression.variables}
    if len(set(symbols.values())) < len(symbols):
        raise ValueError(f"Two features print alike: {', '.join(map(str, symbols))}; rename one.")
    return _to_sympy(expression.root, np.asarray(expression.constants, float), symbols, sympy)


def _to_sympy(node: Node, constants: Any, symbols: Mapping[Variable, Any], sympy: Any) -> Any:
    if isinstance(node, Variable):
        return symbols[node]
    if isinstance(node, Constant) or all(not isinstance(one, Variable) for one in walk(node)):
        with np.errstate(all="ignore"):
            value = float(evaluate(node, constants, {}))
        whole = value.is_integer() and abs(value) < 1e6
        return sympy.Integer(int(value)) if whole else sympy.Float(value)
    parts = [_to_sympy(argument, constants, symbols, sympy) for argument in node.arguments]
    x, y = parts[0], parts[-1]

    def size(x: Any) -> Any:
        # Left alone: whether a long argument is positive takes SymPy long to find out.
        return sympy.Abs(x, evaluate=x.is_Atom)

    match node.operator:
        case "add":
            return x + y
        case "subtract":
            return x - y
        case "multiply":
            return x * y
        case "divide":
            return x / y
        case "pow":
            return sympy.sign(x, evaluate=x.is_Atom) * size(x) ** y
        case "max" | "min":
            function = sympy.Max if node.operator == "max" else sympy.Min
            return function(x, y, evaluate=False)
        case "greater":
            return sympy.Heaviside(x - y, 0, evaluate=False)
        case "quotient":
            return x / sympy.sqrt(1 + y**2)
        case "negative":
            return -x
        case "abs":
            return size(x)
        case "square":
            return x**2
        case "cube":
            return x**3
        case "sqrt":
            return sympy.sqrt(size(x))
        case "log":
            return sympy.log(size(x) + sympy.Float(1e-8))
        case "relu":
            return sympy.Max(x, 0, evaluate=False)
        case name:
            return getattr(sympy, name)(x)


def from_sympy(form: Any, variables: tuple[Variable, ...]) -> Expression:
    """Returns an expression of SymPy as one of ours.

    Powers become squares, cubes, square roots, quotients or `pow`. Ours keep the sign of a negative
    base, and SymPy's are complex there: compare values if a base may be negative.

    Args:
        form: sums, products, powers and the functions that expressions have.
        variables: what its symbols stand for, by their printed names.

    Raises:
        ValueError: if it has a function, or a symbol, that expressions do not have.
    """
    return make_expression(_from_sympy(form, {str(one): one for one in variables}))


def _from_sympy(form: Any, variables: Mapping[str, Variable]) -> Any:
    sympy = sympy_module("from_sympy")

    def part(form: Any) -> Any:
        return _from_sympy(form, variables)

    def chain(operator: str, forms: Any) -> Any:
        first, *rest = map(part, forms)
        for one in rest:
            first = (operator, first, one)
        return first

    if form.is_Symbol and form.name in variables:
        return variables[form.name]
    number = form.evalf() if form.is_number else form
    if number.is_Number and math.isfinite(number):
        return float(number)
    name = form.func.__name__
    if form.is_Add:
        return chain("add", form.args)
    if form.is_Mul:
        below = [one for one in form.args if one.is_Pow and one.exp.could_extract_minus_sign()]
        above = [one for one in form.args if one not in below] or [sympy.Integer(1)]
        top = chain("multiply", above)
        return ("divide", top, chain("multiply", [1 / one for one in below])) if below else top
    if isinstance(form, sympy.exp):
        return ("exp", part(form.args[0]))
    if form.is_Pow:
        return _power(form, part)
    if name in UNARY:
        return (name, part(form.args[0]))
    if name == "Abs":
        return ("abs", part(form.args[0]))
    if name == "Max" and len(form.args) == 2 and 0 in form.args:
        (other,) = [one for one in form.args if one != 0]
        return ("relu", part(other))
    if name in ("Max", "Min"):
        return chain(name.lower(), form.args)
    if name == "log":
        inside = sympy.expand_mul(form.args[0] - sympy.Float(1e-8))
        if isinstance(inside, sympy.Abs):
            return ("log", part(inside.args[0]))
    if name == "Heaviside" and form.args[1] == 0:
        return ("greater", part(form.args[0]), 0.0)
    raise ValueError(f"Expressions have no {name} as in {str(form)[:80]}.")


def _power(form: Any, part: Any) -> Any:
    base, exponent = part(form.base), form.exp
    if exponent.could_extract_minus_sign():
        return ("divide", 1.0, part(1 / form))
    operator = {2.0: "square", 3.0: "cube", 0.5: "sqrt"}
    if exponent.is_number and float(exponent) in operator:
        if form.base.func.__name__ == "Abs":
            base = part(form.base.args[0]) if float(exponent) != 3 else base
        return (operator[float(exponent)], base)
    if exponent.is_Integer and int(exponent) % 2 == 0:
        base = ("abs", base)
    return ("pow", base, part(exponent))


def simplified(expression: Expression) -> Expression:
    """Returns the shortest of what SymPy makes of an expression. It may take very long.

    Raises:
        ValueError: if nothing that SymPy makes of it is an expression of ours.
    """
    sympy = sympy_module("simplified")
    form = to_sympy(expression)
    found = []
    for candidate in (form, sympy.factor_terms(form), sympy.simplify(form)):
        try:
            found.append(from_sympy(candidate, expression.variables))
        except ValueError:
            continue
    if not found:
        raise ValueError("SymPy's forms of the expression have other functions than ours.")
    return min(found, key=lambda one: one.complexity)
