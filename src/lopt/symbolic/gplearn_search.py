"""Genetic programming by gplearn, in Python alone: slow, one objective, no fit of constants.

It searches by correlation, so that scale and intercept need not be found; they are least squares
afterwards. Where pyoperon runs, `OperonSearch` is some forty times faster.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import numpy as np

from lopt.core.checks import check_integer
from lopt.symbolic.expression import Expression
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.search import AbstractSearch, best_of_each_length
from lopt.symbolic.table import Table
from lopt.symbolic.terms import Term, combine, scaled


class GplearnSearch(AbstractSearch):
    """Genetic programming by gplearn. Needs the extra `gplearn`: pip install "lopt[gplearn]".

    Its programs are made of this library's operators, guards and all.

    Attributes:
        operators: allowed ones.
        length: of the longest programs that are returned, in gplearn's nodes.
        population: programs.
        generations: of them.
        per_length: how many programs of each length to return.
        intercept: whether to return each with an intercept, too; no, for odd functions.
    """

    operators: tuple[str, ...] = eqx.field(
        static=True, default=("add", "subtract", "multiply", "divide", "sqrt", "square", "tanh")
    )
    length: int = eqx.field(static=True, default=30)
    population: int = eqx.field(static=True, default=500)
    generations: int = eqx.field(static=True, default=20)
    per_length: int = eqx.field(static=True, default=2)
    intercept: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        for name in self.operators:
            if name not in OPERATORS:
                raise ValueError(
                    f"GplearnSearch(operators) has {name!r}; known are {', '.join(OPERATORS)}."
                )
        if not self.operators:
            raise ValueError("GplearnSearch(operators=()) is empty; try ('add', 'multiply').")
        # Its tournaments have twenty.
        least = {"length": 1, "population": 20, "generations": 1, "per_length": 1}
        for name, fewest in least.items():
            check_integer("GplearnSearch", name, getattr(self, name), fewest, hint=20)

    def require(self) -> None:
        """Refuses to begin without the library; see `AbstractSearch.require`."""
        _gplearn()

    def search(self, table: Table, seed: int) -> list[Expression]:
        """Evolves a population and translates the best programs of each length in it."""
        regressor_class, make_function = _gplearn()
        regressor = regressor_class(
            population_size=self.population,
            generations=self.generations,
            function_set=[_function(name, make_function) for name in self.operators],
            metric="pearson",
            stopping_criteria=1.0,
            random_state=seed,
        )
        with np.errstate(all="ignore"):
            regressor.fit(table.values / table.scale, table.output)
        found: list[Expression] = []
        ranked = (
            (one.length_, -one.raw_fitness_, one.program)
            for one in regressor._programs[-1]
            if one.length_ <= self.length
        )
        for program in best_of_each_length(ranked, self.per_length):
            found += scaled(translate(program, table), table, self.intercept)
        return found


def translate(program: Sequence[Any], table: Table) -> Term:
    """Returns a program of gplearn as a term.

    Programs are in prefix order; a whole number is a column, another number a constant, and a
    function has the name of its operator.

    Args:
        program: over columns that were divided by their scale.
        table: whose columns and scales they are.

    Raises:
        ValueError: if the program is cut off, goes on after its end, or has an unknown operator.
    """
    nodes = iter(program)
    term = _next(nodes, table)
    if next(nodes, None) is not None:
        raise ValueError("translate: the program goes on after its end.")
    return term


def _next(nodes: Iterator[Any], table: Table) -> Term:
    node = next(nodes, None)
    if node is None:
        raise ValueError("translate: the program ends before all operators have arguments.")
    if isinstance(node, int | np.integer):
        return Term(1 / float(table.scale[node]), table.columns[node])
    if isinstance(node, float | np.floating):
        return Term(float(node))
    if node.name not in OPERATORS:
        raise ValueError(
            f"translate: there is no operator {node.name!r}; known are {', '.join(OPERATORS)}."
        )
    arguments = [_next(nodes, table) for _ in range(OPERATORS[node.name].arity)]
    return combine(node.name, *arguments)


def _function(name: str, make_function: Any) -> Any:
    apply, arity = OPERATORS[name].apply, OPERATORS[name].arity
    # It counts the arguments in the function's code.
    function = (lambda x: apply(np, x)) if arity == 1 else (lambda x, y: apply(np, x, y))
    return make_function(function=function, name=name, arity=arity, wrap=False)


def _gplearn() -> tuple[Any, Any]:
    try:
        from gplearn.functions import make_function
        from gplearn.genetic import SymbolicRegressor
    except ImportError as error:
        raise ImportError(
            "GplearnSearch needs gplearn, of the extra gplearn; install it with: pip install "
            "'lopt[gplearn]'"
        ) from error
    return SymbolicRegressor, make_function
