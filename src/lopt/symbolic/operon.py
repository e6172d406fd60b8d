"""The default search: genetic programming by Operon, structure first and constants after.

Burlacu, Kronberger, Kommenda 2020, "Operon C++: an efficient genetic programming framework for
symbolic regression". Its fronts trade R2 for length (NSGA-II). Most generations fit no constants,
as that starves the search; the last ones fit those of a twentieth of the offspring.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import numpy as np

from lopt.core.checks import check_integer
from lopt.symbolic.expression import Expression
from lopt.symbolic.operators import TINY
from lopt.symbolic.search import AbstractSearch, best_of_each_length
from lopt.symbolic.table import Table
from lopt.symbolic.terms import Term, combine, scaled

# What its options call them, and its nodes; asinh, sign, erfc, relu, cube and greater it lacks.
NAMES = {
    "add": ("add", "+"),
    "subtract": ("sub", "-"),
    "multiply": ("mul", "*"),
    "divide": ("div", "/"),
    "quotient": ("aq", "aq"),
    "pow": ("powabs", "powabs"),
    "max": ("fmax", "fmax"),
    "min": ("fmin", "fmin"),
    "abs": ("abs", "abs"),
    "square": ("square", "square"),
    "sqrt": ("sqrtabs", "sqrtabs"),
    "log": ("logabs", "logabs"),
    "exp": ("exp", "exp"),
    "tanh": ("tanh", "tanh"),
    "sinh": ("sinh", "sinh"),
}
# By the names of nodes: their types of minimum and maximum are exchanged in pyoperon 0.6.2.
_OURS = {node: name for name, (_, node) in NAMES.items()}


class OperonSearch(AbstractSearch):
    """Genetic programming by pyoperon. Needs the extra `symbolic`: pip install "lopt[symbolic]".

    Several short runs find more than a long one, which may settle on a wrong structure for good.

    Attributes:
        operators: allowed ones. Its "pow" is |x|^y.
        length: the most nodes, a variable with its weight being one.
        population: individuals.
        generations: with constants left to mutation.
        tuned_generations: after those, with constants of 5% of the offspring fitted by
            Levenberg-Marquardt.
        iterations: of each such fit.
        restarts: independent runs, the best of which are returned.
        per_length: how many expressions of each length to return from each run. The second best may
            only have worse constants than the best.
    """

    operators: tuple[str, ...] = eqx.field(
        static=True, default=("add", "subtract", "multiply", "divide", "sqrt", "square", "tanh")
    )
    length: int = eqx.field(static=True, default=30)
    population: int = eqx.field(static=True, default=1000)
    generations: int = eqx.field(static=True, default=60)
    tuned_generations: int = eqx.field(static=True, default=20)
    iterations: int = eqx.field(static=True, default=10)
    restarts: int = eqx.field(static=True, default=3)
    per_length: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        for name in self.operators:
            if name not in NAMES:
                raise ValueError(
                    f"OperonSearch(operators) cannot search with {name!r}; Operon has "
                    f"{', '.join(NAMES)}."
                )
        least = {"length": 3, "population": 10, "tuned_generations": 0}
        for name in ("generations", "iterations", "restarts", "per_length", *least):
            value = getattr(self, name)
            check_integer("OperonSearch", name, value, least.get(name, 1), hint=30)

    def require(self) -> None:
        """Refuses to begin without the library; see `AbstractSearch.require`."""
        _regressor()

    def search(self, table: Table, seed: int) -> list[Expression]:
        """Evolves populations and translates the best of each length.

        Those with an intercept are returned without it, too.
        """
        kind = _regressor()
        # Operon works in 32 bits and draws its constants from N(0, 1).
        inputs = table.values / table.scale
        output = table.output / max(np.sqrt(np.mean(np.square(table.output, dtype=float))), TINY)
        found: list[Expression] = []
        for one in np.random.SeedSequence(seed).generate_state(self.restarts):
            regressor = kind(random_state=int(one), **self._settings())
            regressor.fit(inputs, output)
            if self.tuned_generations:
                regressor.set_params(
                    warm_start=True,
                    generations=self.generations + self.tuned_generations,
                    local_search_probability=0.05,
                    optimizer_iterations=self.iterations,
                )
                regressor.fit(inputs, output)
            columns = dict(zip(regressor.variables_, range(len(table.columns)), strict=True))
            # Operon minimises the negative of R2.
            ranked = (
                (one.Genotype.Length, one.GetFitness(0), one.Genotype)
                for one in regressor.individuals_
            )
            for tree in best_of_each_length(ranked, self.per_length):
                found += scaled(translate(tree, columns, table), table)
        return found

    def _settings(self) -> dict[str, Any]:
        symbols = [NAMES[name][0] for name in self.operators]
        return {
            "allowed_symbols": ",".join((*symbols, "constant", "variable")),
            "objectives": ["r2", "length"],
            "max_length": self.length,
            "population_size": self.population,
            "generations": self.generations,
            # Only generations count.
            "max_evaluations": 2**62,
            "local_search_probability": 0.0,
            "optimizer_iterations": 0,
        }


def translate(tree: Any, columns: Mapping[int, int], table: Table) -> Term:
    """Returns a tree of Operon as a term.

    Nodes are in postfix order, the last argument first; every variable has a weight.

    Args:
        tree: of Operon, over columns that were divided by their scale.
        columns: their numbers, by Operon's hashes of variables.
        table: whose columns and scales they are.
    """
    scale = table.scale
    stack: list[Term] = []
    for node in tree.Nodes:
        if node.IsVariable:
            column = columns[node.HashValue]
            stack.append(Term(float(node.Value) / float(scale[column]), table.columns[column]))
        elif node.IsConstant:
            stack.append(Term(float(node.Value)))
        else:
            arguments = [stack.pop() for _ in range(node.Arity)]
            name = _OURS[node.Name]
            if name == "pow":
                arguments[0] = combine("abs", arguments[0])
            stack.append(combine(name, *arguments))
    return stack.pop()


def _regressor() -> Any:
    try:
        from pyoperon.sklearn import SymbolicRegressor
    except ImportError as error:
        raise ImportError(
            "OperonSearch needs pyoperon, of the extra symbolic; install it with: pip install "
            "'lopt[symbolic]'"
        ) from error
    return SymbolicRegressor
