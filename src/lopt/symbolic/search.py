"""What a search for equations is, and what it returns: a front of loss against complexity.

A backend proposes expressions for a table and does nothing else. Losses, fronts, exact constants
and the choice among candidates are the same for all backends and are made elsewhere.
"""

import abc
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float

from lopt.core.checks import is_real
from lopt.symbolic.expression import Call, Expression, Node, Variable, evaluate, walk
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.table import Table

SPLITS = ("train", "validation", "test")


class AbstractSearch(eqx.Module):
    """A backend of symbolic regression; its fields are its options.

    `search` returns any number of expressions of the table's columns, in any order and of any
    length. Their constants should be good enough to tell good structures from bad ones; they are
    fitted exactly afterwards. Equal tables and seeds give equal expressions.
    """

    def require(self) -> None:
        """Refuses to begin where it could not search.

        Raises:
            ImportError: if the backend's library is not installed, naming the extra.
        """

    @abc.abstractmethod
    def search(self, table: Table, seed: int) -> list[Expression]:
        """Proposes expressions for the output of a table.

        Args:
            table: the rows to fit, all of them; sub-sampling was done before.
            seed: from 0 to 2**32 - 1.

        Raises:
            ImportError: if the backend's library is not installed, naming the extra.
        """


@dataclasses.dataclass(frozen=True)
class Complexity:
    """The unit that expressions are measured in: a weight for each node.

    Attributes:
        weights: of an operator's name, of "variable" and of "constant"; one if not given.
        weighted: whether a variable with a factor counts as the variable alone, as in Operon and
            other systems of the field; otherwise it is three nodes.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> rule = make_expression(("tanh", ("multiply", 2.0, Variable("gradient"))))
        >>> Complexity()(rule), Complexity({"tanh": 3.0, "constant": 0.0})(rule)
        (4.0, 5.0)
        >>> Complexity(weighted=True)(rule)
        2.0
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weighted: bool = False

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in OPERATORS and name not in ("variable", "constant"):
                raise ValueError(
                    f"Complexity(weights) has a weight for {name!r}; known are variable, "
                    f"constant, {', '.join(OPERATORS)}."
                )
            if not is_real(weight) or not 0 <= weight < math.inf:
                raise ValueError(
                    f"Complexity(weights={{{name!r}: {weight!r}}}) must be finite and not "
                    "negative; try 1.0."
                )

    def __call__(self, expression: Expression) -> float:
        """Returns the sum of the weights of all nodes."""
        nodes = list(walk(expression.root))
        total = sum(self.weights.get(_kind(node), 1) for node in nodes)
        factor = self.weights.get("multiply", 1) + self.weights.get("constant", 1)
        return float(total - factor * (self.weighted and sum(map(_has_factor, nodes))))


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """An expression and how good it is.

    Attributes:
        expression: it.
        complexity: in nodes, or in whatever unit was asked for.
        losses: mean squared errors by the names of splits; "train" at least.
    """

    expression: Expression
    complexity: float
    losses: Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
    """Candidates by complexity, each better on "train" than all that are shorter.

    Attributes:
        candidates: the shortest first.
    """

    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError(
                "Front(candidates=()) is empty: no search proposed an expression that is finite on "
                "all rows; allow a larger complexity or other operators."
            )
        for shorter, longer in zip(self.candidates, self.candidates[1:], strict=False):
            better = longer.losses["train"] < shorter.losses["train"]
            if longer.complexity <= shorter.complexity or not better:
                raise ValueError(
                    f"Front(candidates): that of complexity {longer.complexity:g} does not improve "
                    f"on that of {shorter.complexity:g} before it; build it by make_front."
                )

    def __len__(self) -> int:
        return len(self.candidates)


def predict(expression: Expression, table: Table) -> Float[np.ndarray, " row"]:
    """Returns the values of an expression on the rows of a table, in 64 bits.

    They may be infinite or no numbers. Constants are taken as they are.

    Raises:
        KeyError: if a variable is not a column.
    """
    columns: Any = {name: np.asarray(column, float) for name, column in table.mapping().items()}
    with np.errstate(all="ignore"):
        values = evaluate(expression.root, np.asarray(expression.constants, float), columns)
    return np.broadcast_to(np.asarray(values, float), (len(table),))


def mean_squared_error(expression: Expression, table: Table) -> float:
    """Returns the mean squared error of an expression on a table; infinite if it has no value."""
    with np.errstate(all="ignore"):
        error = float(np.mean((predict(expression, table) - table.output) ** 2))
    return error if math.isfinite(error) else math.inf


def judge(
    expressions: Iterable[Expression],
    tables: Mapping[str, Table],
    complexity: Complexity | None = None,
) -> list[Candidate]:
    """Measures expressions on tables, named as splits are: "train", "validation", "test"."""
    complexity = Complexity() if complexity is None else complexity
    return [
        Candidate(
            expression,
            complexity(expression),
            {name: mean_squared_error(expression, table) for name, table in tables.items()},
        )
        for expression in expressions
    ]


def make_front(candidates: Iterable[Candidate]) -> Front:
    """Returns the candidates that are better on "train" than all that are not longer.

    Those that are not finite on a split are left out.

    Raises:
        ValueError: if none is left.
    """
    finite = (one for one in candidates if all(map(math.isfinite, one.losses.values())))
    chosen: list[Candidate] = []
    for one in sorted(finite, key=lambda one: (one.complexity, one.losses["train"])):
        if not chosen or one.losses["train"] < chosen[-1].losses["train"]:
            chosen.append(one)
    return Front(tuple(chosen))


def best_of_each_length(ranked: Iterable[tuple[int, float, Any]], per_length: int) -> Iterator[Any]:
    """Yields of (length, loss, formula) the formulas of each length with the least loss."""
    formulas: dict[int, dict[float, Any]] = {}
    for length, loss, formula in ranked:
        # Equal losses to the last bit are the same formula, written in another order.
        formulas.setdefault(length, {}).setdefault(loss, formula)
    for _, of_length in sorted(formulas.items()):
        for loss in sorted(of_length)[:per_length]:
            yield of_length[loss]


def _has_factor(node: Node) -> bool:
    """Returns whether a node is a variable times a constant."""
    if not isinstance(node, Call) or node.operator != "multiply":
        return False
    return {_kind(one) for one in node.arguments} == {"variable", "constant"}


def _kind(node: Node) -> str:
    if isinstance(node, Call):
        return node.operator
    return "variable" if isinstance(node, Variable) else "constant"
