"""Cheap exact rewriting: rules of arithmetic that make a tree smaller and keep its values.

Sums and products are collected into normal forms, in which constants merge, equal terms and factors
combine, and scales and signs move out of the operators that let them through. What is built from
them counts only if it has fewer nodes, or as many with fewer constants; so no rule can undo another
and the work ends. Values agree up to rounding wherever no guard of an operator acts.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lopt.symbolic.expression import Call, Constant, Expression, Node, evaluate, renumbered, walk
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.signs import never_negative

# coefficient * product of the first / product of the second
_Product = tuple[float, list[Node], list[Node]]
# Nearer to zero than this a factor of a divisor decides whether its guard acts.
SMALLEST_FACTOR = 1e-6


def rewrite(expression: Expression) -> Expression:
    """Returns an expression with the same values and at most as many nodes.

    Example:
        >>> from lopt.symbolic.expression import Variable, make_expression
        >>> from lopt.symbolic.typeset import to_text
        >>> g = Variable("gradient")
        >>> long = ("add", ("multiply", 2.0, ("multiply", 3.0, g)), ("negative", ("negative", g)))
        >>> to_text(rewrite(make_expression(long)))
        '7 * gradient'
    """
    given = np.asarray(expression.constants, float).tolist()
    uses = collections.Counter(n.index for n in walk(expression.root) if isinstance(n, Constant))
    shared = {given[index]: index for index, count in uses.items() if count > 1}
    pool = _Pool(list(given), shared)
    return renumbered(pool.rewritten(expression.root), pool.values)


def _cost(node: Node) -> tuple[int, int]:
    nodes = list(walk(node))
    return len(nodes), sum(isinstance(one, Constant) for one in nodes)


def _chain(operator: str, nodes: list[Node]) -> Node:
    return functools.reduce(lambda left, right: Call(operator, (left, right)), nodes)


@dataclasses.dataclass(frozen=True)
class _Pool:
    """Rewrites trees whose constants are numbers in a growing list.

    Attributes:
        values: of the constants so far.
        shared: those that several places of the tree use, by value. They stay one constant.
    """

    values: list[float]
    shared: dict[float, int]

    def number(self, value: float) -> Constant:
        if value in self.shared:
            return Constant(self.shared[value])
        self.values.append(value)
        return Constant(len(self.values) - 1)

    def value(self, node: Node) -> float | None:
        return self.values[node.index] if isinstance(node, Constant) else None

    def key(self, node: Node) -> Any:
        """What is equal for trees with equal values of their constants."""
        if isinstance(node, Call):
            return node.operator, *map(self.key, node.arguments)
        return self.value(node) if isinstance(node, Constant) else node

    def rewritten(self, node: Node) -> Node:
        if not isinstance(node, Call):
            return node
        node = Call(node.operator, tuple(map(self.rewritten, node.arguments)))
        best = min((node, *self.candidates(node)), key=_cost)
        return node if best is node else self.rewritten(best)

    def candidates(self, node: Call) -> Iterator[Node]:
        if all(isinstance(argument, Constant) for argument in node.arguments):
            with np.errstate(all="ignore"):
                value = float(evaluate(node, self.values, {}))
            if math.isfinite(value):
                yield self.number(value)
            return
        yield from self.identities(node)
        product = self.product(node)
        if math.isfinite(product[0]):
            yield self.built(product)
        if node.operator in ("add", "subtract", "negative", "multiply"):
            yield from self.sums(node)

    def identities(self, node: Call) -> Iterator[Node]:
        """Trees that equal a node by the rules for its operator and those of its arguments."""
        first, last = node.arguments[0], node.arguments[-1]
        inner = first.operator if isinstance(first, Call) else None
        below = first.arguments[0] if isinstance(first, Call) else first
        exponent = self.value(last)
        positive = never_negative(first, self.values)
        match node.operator:
            case "abs" | "relu" if positive:
                yield first
            case "sqrt" if inner == "square":
                yield Call("abs", (below,))
            case "square" if inner == "sqrt":
                yield Call("abs", (below,))
            case "sqrt" | "square" | "log" if inner == "abs":
                yield Call(node.operator, (below,))
            case "sign" if inner in ("sign", "tanh", "asinh"):
                yield Call("sign", (below,))
            case "max" | "min" if self.key(first) == self.key(last):
                yield first
            case "greater" if self.key(first) == self.key(last):
                yield self.number(0.0)
            case "quotient" if exponent == 0:
                yield first
            case "quotient" if isinstance(last, Call) and last.operator == "abs":
                yield Call("quotient", (first, last.arguments[0]))
            case "pow" if exponent == 1:
                yield first
            case "pow" if exponent in (0, 3):
                yield Call("sign" if exponent == 0 else "cube", (first,))
            case "pow" if positive and exponent in (0.5, 2):
                yield Call("square" if exponent == 2 else "sqrt", (first,))

    def product(self, node: Node) -> _Product:
        """A tree as a coefficient times factors over factors."""
        if isinstance(node, Constant):
            return self.values[node.index], [], []
        if not isinstance(node, Call):
            return 1.0, [node], []
        parts = [self.product(argument) for argument in node.arguments]
        (scale, above, below), (other, more, under) = parts[0], parts[-1]
        match node.operator:
            case "negative":
                return -scale, above, below
            case "multiply":
                return scale * other, above + more, below + under
            case "divide" if other == 0:
                return 0.0, [], []
            case "divide" if abs(other) > SMALLEST_FACTOR:
                return scale / other, above + under, below + more
        through, kept = self.scaled(node.operator, scale, self.value(node.arguments[-1]))
        if through == 1 and kept == scale:
            return 1.0, [node], []
        rest = (self.built((kept, above, below)), *node.arguments[1:])
        return through, [Call(node.operator, rest)], []

    def scaled(self, operator: str, scale: float, exponent: float | None) -> tuple[float, float]:
        """How much of its first argument's coefficient passes an operator, and what it keeps."""
        if scale == 0 or not math.isfinite(scale):
            return 1.0, scale
        sign = math.copysign(1.0, scale)
        match operator:
            case "abs" | "relu":
                return abs(scale), 1.0 if operator == "abs" else sign
            case "quotient":
                return scale, 1.0
            case "sign":
                return sign, 1.0
            case "square" | "cube" | "sqrt" if 1e-3 < abs(scale) < 1e3:
                powers = {"square": scale**2, "cube": scale**3, "sqrt": math.sqrt(abs(scale))}
                return powers[operator], 1.0
            case "pow" if exponent is not None and abs(exponent * math.log(abs(scale))) < 7:
                return sign * abs(scale) ** exponent, 1.0
            case "pow":
                return sign, abs(scale)
        if OPERATORS[operator].odd:
            return sign, abs(scale)
        return 1.0, abs(scale) if OPERATORS[operator].even else scale

    def built(self, product: _Product) -> Node:
        """The tree of a product."""
        scale, above, below = product
        if scale == 0:
            return self.number(0.0)
        factors, divisors = self.powers(above), self.powers(below)
        if not factors or scale not in (1, -1):
            factors = [self.number(scale), *factors]
            scale = 1.0
        tree = _chain("multiply", factors)
        if divisors:
            tree = Call("divide", (tree, _chain("multiply", divisors)))
        return tree if scale == 1 else Call("negative", (tree,))

    def powers(self, factors: list[Node]) -> list[Node]:
        """Factors, of which equal ones are combined to squares and cubes."""
        sizes = {"square": 2, "cube": 3}
        groups: dict[Any, tuple[Node, int]] = {}
        for factor in factors:
            count = 1
            if isinstance(factor, Call) and factor.operator in sizes:
                count, factor = sizes[factor.operator], factor.arguments[0]
            key = self.key(factor)
            groups[key] = (factor, count + (groups[key][1] if key in groups else 0))
        combined: list[Node] = []
        for base, count in groups.values():
            cubes, squares = divmod(count, 3)
            if squares == 1 and cubes:
                cubes, squares = cubes - 1, 2
            combined += [Call("cube", (base,))] * cubes
            combined += [Call("square", (base,))] * (squares // 2 if squares != 1 else 0)
            combined += [base] * (squares == 1)
        return combined

    def terms(self, node: Node, scale: float) -> list[tuple[float, Node | None]]:
        """A tree as a sum of coefficients times terms; None is the term of a constant."""
        if isinstance(node, Constant):
            return [(scale * self.values[node.index], None)]
        if isinstance(node, Call) and node.operator in ("add", "subtract"):
            sign = 1 if node.operator == "add" else -1
            left, right = node.arguments
            return self.terms(left, scale) + self.terms(right, sign * scale)
        factor, above, below = self.product(node)
        if not above and not below:
            return [(scale * factor, None)]
        rest = self.built((1.0, above, below))
        if isinstance(rest, Call) and rest.operator in ("add", "subtract"):
            return self.terms(rest, scale * factor)
        return [(scale * factor, rest)]

    def sums(self, node: Node) -> Iterator[Node]:
        """Trees of the sum that a node is, with and without a common factor."""
        found: dict[Any, tuple[float, Node | None]] = {}
        for scale, term in self.terms(node, 1.0):
            key = None if term is None else self.key(term)
            before = found[key][0] if key in found else 0.0
            found[key] = (before + scale, term)
        terms = [(scale, term) for scale, term in found.values() if scale != 0]
        if not all(math.isfinite(scale) for scale, _ in terms):
            return
        yield self.summed(terms)
        sizes = {abs(scale) for scale, term in terms if term is not None}
        if len(sizes) == 1 and len(terms) > 1:
            common = next(scale for scale, term in terms if term is not None)
            inner = self.summed([(scale / common, term) for scale, term in terms])
            yield self.built((common, [inner], []))

    def summed(self, terms: list[tuple[float, Node | None]]) -> Node:
        if not terms:
            return self.number(0.0)
        # What is only subtracted comes last; first stands the constant, or what is not.
        minus = [term for scale, term in terms if scale == -1 and term is not None]
        rest = [(scale, term) for scale, term in terms if scale != -1 or term is None]
        plus = [self.scaled_term(scale, term) for scale, term in rest]
        if plus:
            return functools.reduce(
                lambda left, right: Call("subtract", (left, right)), minus, _chain("add", plus)
            )
        return Call("negative", (_chain("add", minus),))

    def scaled_term(self, scale: float, term: Node | None) -> Node:
        if term is None:
            return self.number(scale)
        factor, above, below = self.product(term)
        return self.built((scale * factor, above, below))
