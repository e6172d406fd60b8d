"""Terms: a number times a tree, which is how weighted expressions are put together without waste.

Searches weigh every variable, so that c1 (c2 x) / sqrt(c3 v) has one constant in three places.
Here factors move outwards through products, quotients, powers and sums, and what comes out has as
few constants as its shape allows: the fit is then well posed and complexity is counted fairly.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lopt.symbolic.expression import Expression, make_expression
from lopt.symbolic.operators import OPERATORS, TINY
from lopt.symbolic.search import predict
from lopt.symbolic.table import Table

# f(c x) = f(c) f(x)
_POWERS = ("abs", "sign", "sqrt", "square", "cube", "negative")


@dataclasses.dataclass(frozen=True)
class Term:
    """A number times a tree.

    Attributes:
        factor: the number.
        tree: as `make_expression` takes it; None for one.
    """

    factor: float
    tree: Any = None

    @property
    def is_number(self) -> bool:
        """Whether nothing in it varies."""
        return self.tree is None

    def expression(self) -> Expression | None:
        """Returns it as an expression; None if a constant in it is not finite."""
        expression = make_expression(_spread(self.factor, self.tree))
        return expression if np.isfinite(np.asarray(expression.constants)).all() else None


def combine(operator: str, *terms: Term) -> Term:
    """Returns an operator applied to terms, its factor pulled out.

    Example:
        >>> from lopt.symbolic.expression import Variable
        >>> m, v = Variable("momentum"), Variable("rms")
        >>> term = combine("divide", Term(3.0, m), combine("sqrt", Term(4.0, v)))
        >>> term.factor, term.tree[0], term.expression().complexity
        (1.5, 'divide', 6)
    """
    terms = tuple(Term(0.0) if term.factor == 0 else term for term in terms)
    with np.errstate(all="ignore"):
        if all(term.is_number for term in terms):
            numbers = (np.asarray(term.factor) for term in terms)
            return Term(float(OPERATORS[operator].apply(np, *numbers)))
        if operator in _BINARY:
            return _BINARY[operator](*terms)
        above, below = _fraction(terms[0].tree)
        if operator in _POWERS and below:
            top = combine(operator, Term(terms[0].factor * above.factor, above.tree))
            return _divide(top, combine(operator, below))
        if operator in _POWERS:
            factor = OPERATORS[operator].apply(np, np.asarray(terms[0].factor))
            tree = terms[0].tree if operator == "negative" else (operator, terms[0].tree)
            return Term(float(factor), tree)
    return _plain(operator, *terms)


def scaled(term: Term, table: Table, intercept: bool = True) -> Iterator[Expression]:
    """Yields a f, and a f + b if wanted, with the least squared error on a table.

    Searches that rank by R2 take factor and intercept for granted.
    """
    bare = term.expression()
    if bare is None or term.is_number:
        return
    values = predict(bare, table)
    if not np.isfinite(values).all():
        return
    slope = values @ table.output / max(float(values @ values), TINY)
    centred = values - values.mean()
    tilt = centred @ table.output / max(float(centred @ centred), TINY)
    offset = table.output.mean() - tilt * values.mean()
    for factor, constant in ((slope, 0.0), (tilt, offset))[: 1 + intercept]:
        weighted = combine("multiply", Term(float(factor)), term)
        expression = combine("add", weighted, Term(float(constant))).expression()
        if expression is not None:
            yield expression


def _plain(operator: str, *terms: Term) -> Term:
    return Term(1.0, (operator, *(_spread(term.factor, term.tree) for term in terms)))


def _add(one: Term, other: Term) -> Term:
    if other.factor == 0 or one.factor == 0:
        return other if one.factor == 0 else one
    # Equal summands become one.
    factors: dict[Any, float] = {}
    for factor, tree in (*_summands(one.factor, one.tree), *_summands(other.factor, other.tree)):
        factors[tree] = factors.get(tree, 0.0) + factor
    left = [(factor, tree) for tree, factor in factors.items() if factor != 0]
    if not left or (len(left) == 1 and left[0][1] is None):
        return Term(left[0][0] if left else 0.0)
    # What varies comes first, and gives its factor to all.
    left.sort(key=lambda summand: summand[1] is None)
    whole, tree = left[0]
    for factor, another in left[1:]:
        tree = ("add", tree, _spread(factor / whole, another))
    return Term(whole, tree)


def _summands(factor: float, tree: Any) -> list[tuple[float, Any]]:
    if isinstance(tree, float):
        return [(factor * tree, None)]
    if isinstance(tree, tuple) and tree[0] == "add":
        return [part for argument in tree[1:] for part in _summands(factor, argument)]
    if isinstance(tree, tuple) and tree[0] == "multiply" and isinstance(tree[1], float):
        return [(factor * tree[1], tree[2])]
    return [(factor, tree)]


def _multiply(one: Term, other: Term) -> Term:
    factor = one.factor * other.factor
    if one.is_number or other.is_number:
        return Term(factor, other.tree if one.is_number else one.tree)
    # One fraction, whose parts multiply.
    (above, below), (more, under) = _fraction(one.tree), _fraction(other.tree)
    if below or under:
        top, bottom = _multiply(above, more), _product(below, under)
        quotient = _divide(top, bottom)
        return Term(factor * quotient.factor, quotient.tree)
    if one.tree == other.tree:
        return Term(factor, ("square", one.tree))
    return Term(factor, ("multiply", one.tree, other.tree))


def _divide(one: Term, other: Term) -> Term:
    if other.factor == 0 or one.factor == 0:
        # As the operator has it.
        return Term(0.0)
    factor = one.factor / other.factor
    if other.is_number:
        return Term(factor, one.tree)
    (above, below), (under, more) = _fraction(one.tree), _fraction(other.tree)
    if below or more:
        quotient = _divide(_product(above, more), _product(below, under))
        return Term(factor * quotient.factor, quotient.tree)
    if one.tree == other.tree:
        return Term(factor)
    return Term(factor, ("divide", 1.0 if one.is_number else one.tree, other.tree))


def _fraction(tree: Any) -> tuple[Term, Term | None]:
    """Returns numerator and denominator; None is a denominator of one."""
    if isinstance(tree, tuple) and tree[0] == "divide":
        top = Term(tree[1]) if isinstance(tree[1], float) else Term(1.0, tree[1])
        return top, Term(1.0, tree[2])
    return Term(1.0, tree), None


def _product(one: Term | None, other: Term | None) -> Term:
    if one is None or other is None:
        return one or other or Term(1.0)
    return _multiply(one, other)


def _quotient(one: Term, other: Term) -> Term:
    below = _spread(other.factor, other.tree)
    return Term(one.factor, ("quotient", 1.0 if one.is_number else one.tree, below))


def _pow(base: Term, exponent: Term) -> Term:
    if base.is_number or not exponent.is_number:
        return _plain("pow", base, exponent)
    factor = math.copysign(float(np.power(abs(base.factor), exponent.factor)), base.factor)
    return Term(factor, ("pow", base.tree, exponent.factor))


_BINARY = {
    "add": _add,
    "subtract": lambda one, other: _add(one, Term(-other.factor, other.tree)),
    "multiply": _multiply,
    "divide": _divide,
    "quotient": _quotient,
    "pow": _pow,
}


def _spread(factor: float, tree: Any) -> Any:
    """Returns the tree of a product, its factor on the summands of a sum."""
    if tree is None:
        return factor
    if isinstance(tree, float):
        return factor * tree
    if factor == 1:
        return tree
    if isinstance(tree, tuple):
        operator, *arguments = tree
        if operator == "add":
            return (operator, *(_spread(factor, argument) for argument in arguments))
        if operator in ("multiply", "divide", "quotient") and isinstance(arguments[0], float):
            return (operator, factor * arguments[0], *arguments[1:])
    return ("multiply", factor, tree)
