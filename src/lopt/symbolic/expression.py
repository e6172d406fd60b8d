"""Expressions: a tree of guarded operators over named features, with constants as leaves.

The structure is static and the constants are one array, so an expression is a pytree that can be
differentiated, mapped and trained; nothing in it is ever a string to evaluate.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union

import equinox as eqx
import jax.numpy as jnp
import numpy
from jaxtyping import Array, Float

from lopt.symbolic.operators import OPERATORS, Values


@dataclasses.dataclass(frozen=True, order=True)
class Variable:
    """A feature of a coordinate, `lag` steps ago.

    Attributes:
        name: such as "gradient", the name that the features give it.
        lag: 0 is the present step.
    """

    name: str
    lag: int = 0

    def __str__(self) -> str:
        return f"{self.name}[t-{self.lag}]" if self.lag else self.name


@dataclasses.dataclass(frozen=True)
class Constant:
    """The constant number `index` of an expression."""

    index: int


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator, by name, applied to arguments."""

    operator: str
    arguments: tuple["Node", ...]

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise ValueError(
                f"There is no operator {self.operator!r}; known are {', '.join(OPERATORS)}."
            )
        arity = OPERATORS[self.operator].arity
        if len(self.arguments) != arity:
            raise ValueError(
                f"The operator {self.operator} takes {arity} arguments, not {len(self.arguments)}."
            )


Node = Union[Variable, Constant, Call]  # noqa: UP007


class Expression(eqx.Module):
    """A formula: the update of a coordinate from its features.

    Attributes:
        root: its tree.
        constants: one for each `Constant` of the tree, in the order of its indices. As read or
            made they are of NumPy, in 64 bits whatever JAX is set to.

    Example:
        >>> g = Variable("gradient")
        >>> rule = Expression(Call("multiply", (Constant(0), g)), jnp.asarray([-0.5]))
        >>> rule({g: jnp.asarray([1.0, 2.0])}).tolist()
        [-0.5, -1.0]
        >>> rule.complexity, rule.variables
        (3, (Variable(name='gradient', lag=0),))
    """

    root: Node = eqx.field(static=True)
    constants: Float[Array | numpy.ndarray, " constant"]

    def __check_init__(self) -> None:
        indices = {node.index for node in walk(self.root) if isinstance(node, Constant)}
        count = numpy.shape(self.constants)[0] if numpy.ndim(self.constants) else None
        # Transformations of pytrees put other things than arrays into constants.
        if count is not None and indices != set(range(count)):
            raise ValueError(
                f"Expression(constants) holds {count} numbers, but its tree uses "
                f"{sorted(indices)}; number constants from 0 and use each."
            )

    def __call__(self, columns: Mapping[Variable, Values]) -> Values:
        """Returns the value at features, given as JAX arrays that broadcast to one another.

        Raises:
            KeyError: if a variable is missing.
        """
        return evaluate(self.root, jnp.asarray(self.constants), columns, jnp)

    @property
    def variables(self) -> tuple[Variable, ...]:
        """The variables that it uses, sorted."""
        return tuple(sorted({node for node in walk(self.root) if isinstance(node, Variable)}))

    @property
    def complexity(self) -> int:
        """The number of its nodes."""
        return sum(1 for _ in walk(self.root))

    def _repr_latex_(self) -> str:  # what notebooks show
        from lopt.symbolic.typeset import to_latex  # which needs this class

        return f"${to_latex(self)}$"


def walk(node: Node) -> Iterator[Node]:
    """Yields all nodes of a tree, parents first, arguments in order."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, Call):
            waiting.extend(reversed(node.arguments))


def with_leaves(node: Node, change: Callable[[Node], Node]) -> Node:
    """Returns a tree in which every variable and constant is changed."""
    if isinstance(node, Call):
        return Call(node.operator, tuple(with_leaves(one, change) for one in node.arguments))
    return change(node)


def renumbered(root: Node, values: list[float]) -> Expression:
    """Returns an expression with only those constants that its tree uses, in order."""
    order: dict[int, int] = {}

    def visit(leaf: Node) -> Node:
        if isinstance(leaf, Constant):
            return Constant(order.setdefault(leaf.index, len(order)))
        return leaf

    renamed = with_leaves(root, visit)
    return Expression(renamed, numpy.asarray([values[index] for index in order], float))


def evaluate(
    node: Node, constants: Any, columns: Mapping[Variable, Values], np: Any = numpy
) -> Values:
    """Returns the value of a tree with the array module `np`, NumPy by default.

    Args:
        node: the tree.
        constants: an array, or a sequence of numbers.
        columns: arrays of the module, which broadcast to one another.
        np: `numpy` or `jax.numpy`.

    Raises:
        KeyError: if a variable is missing.
    """
    if isinstance(node, Constant):
        return constants[node.index]
    if isinstance(node, Variable):
        if node not in columns:
            known = ", ".join(map(str, sorted(columns))) or "none"
            raise KeyError(f"The expression needs the feature {node}; there are {known}.")
        return columns[node]
    values = []
    # A comprehension would double the depth of the stack.
    for argument in node.arguments:
        values.append(evaluate(argument, constants, columns, np))
    return OPERATORS[node.operator].apply(np, *values)


def make_expression(root: Any) -> Expression:
    """Builds an expression from a tree in which constants are plain numbers.

    Args:
        root: a `Variable`, a number, or a tuple (operator, argument, ...) of such.

    Example:
        >>> make_expression(("multiply", -0.5, Variable("gradient"))).constants.tolist()
        [-0.5]
    """
    numbers: list[float] = []

    def build(part: Any) -> Node:
        if isinstance(part, Variable):
            return part
        if isinstance(part, Sequence) and not isinstance(part, str):
            return Call(part[0], tuple(map(build, part[1:])))
        numbers.append(float(part))
        return Constant(len(numbers) - 1)

    node = build(root)
    return Expression(node, numpy.asarray(numbers, float))


def rename(expression: Expression, names: Mapping[str, str]) -> Expression:
    """Returns an expression of features with other names, their lags as they were.

    Example:
        >>> rename(make_expression(("tanh", Variable("g", 2))), {"g": "gradient"}).variables
        (Variable(name='gradient', lag=2),)
    """

    def change(leaf: Node) -> Node:
        if isinstance(leaf, Variable):
            return Variable(names.get(leaf.name, leaf.name), leaf.lag)
        return leaf

    return Expression(with_leaves(expression.root, change), expression.constants)
