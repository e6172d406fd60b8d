"""Symbolic regression by PySR, which runs in Julia: an option for those who have it.

Cranmer 2023, "Interpretable machine learning for science with PySR and SymbolicRegression.jl"
(arXiv:2305.01582). The library of the published system, Zheng et al. 2022 (arXiv:2203.06578), there
in a version whose interface is gone.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from lopt.core.checks import check_integer
from lopt.symbolic.algebra import from_sympy, sympy_module, to_sympy
from lopt.symbolic.expression import Call, Expression, Variable, with_leaves
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.search import AbstractSearch
from lopt.symbolic.table import Table

# PySR's own operators that mean the same.
_NATIVE = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "abs": "abs",
    "sign": "sign",
    "square": "square",
    "cube": "cube",
    "exp": "exp",
    "tanh": "tanh",
    "sinh": "sinh",
    "asinh": "asinh",
    "erfc": "erfc",
}
# The others, in Julia, of arguments of any precision.
_JULIA = {
    "sqrt": "lopt_sqrt(x) = sqrt(abs(x))",
    "log": "lopt_log(x) = log(abs(x) + oftype(x, 1e-8))",
    "pow": "lopt_pow(x, y) = sign(x) * abs(x)^y",
    "max": "lopt_max(x, y) = max(x, y)",
    "min": "lopt_min(x, y) = min(x, y)",
    "greater": "lopt_greater(x, y) = x > y ? one(x) : zero(x)",
    "quotient": "lopt_quotient(x, y) = x / sqrt(one(y) + y * y)",
    "relu": "lopt_relu(x) = max(x, zero(x))",
    "negative": "lopt_negative(x) = -x",
}


class PysrSearch(AbstractSearch):
    """Symbolic regression by PySR. Needs the extra `pysr` and Julia: pip install "lopt[pysr]".

    PySR fetches Julia when it is first imported, if there is none and the network allows it. The
    search runs in one thread, so that seeds decide.

    Attributes:
        operators: allowed ones.
        length: the most nodes.
        populations: that evolve side by side.
        population: expressions in each.
        iterations: after each of which they exchange expressions and constants are fitted.
    """

    operators: tuple[str, ...] = eqx.field(
        static=True, default=("add", "subtract", "multiply", "divide", "sqrt", "square", "tanh")
    )
    length: int = eqx.field(static=True, default=30)
    populations: int = eqx.field(static=True, default=15)
    population: int = eqx.field(static=True, default=33)
    iterations: int = eqx.field(static=True, default=40)

    def __check_init__(self) -> None:
        for name in self.operators:
            if name not in OPERATORS:
                raise ValueError(
                    f"PysrSearch(operators) has {name!r}; known are {', '.join(OPERATORS)}."
                )
        if not self.operators:
            raise ValueError("PysrSearch(operators=()) is empty; try ('add', 'multiply').")
        # The least that it accepts.
        least = {"length": 7, "population": 15, "populations": 1, "iterations": 1}
        for name, fewest in least.items():
            check_integer("PysrSearch", name, getattr(self, name), fewest, hint=40)

    def require(self) -> None:
        """Refuses to begin without the library; see `AbstractSearch.require`."""
        _regressor()

    def search(self, table: Table, seed: int) -> list[Expression]:
        """Evolves expressions and translates its hall of fame, one of each complexity."""
        regressor = _regressor()(
            **operator_options(self.operators),
            niterations=self.iterations,
            populations=self.populations,
            population_size=self.population,
            maxsize=self.length,
            parallelism="serial",
            deterministic=True,
            random_state=seed,
            # Constants come back as text.
            print_precision=17,
            progress=False,
            verbosity=0,
            temp_equation_file=True,
        )
        names = [f"x{i}" for i in range(len(table.columns))]
        unit = float(np.sqrt(np.mean(np.square(table.output, dtype=float)))) or 1.0
        regressor.fit(table.values / table.scale, table.output / unit, variable_names=names)
        forms = list(regressor.equations_["sympy_format"])
        return [translate(form, table, unit) for form in forms]


def translate(form: Any, table: Table, unit: float = 1.0) -> Expression:
    """Returns an equation of PySR, as a tree of SymPy, as an expression.

    Args:
        form: over symbols x0, x1 and so on: the columns, divided by their scale.
        table: whose columns and scales they are.
        unit: what outputs were divided by.

    Raises:
        ValueError: if it has a function that expressions do not have, or an unknown symbol.
    """
    sympy = sympy_module("PysrSearch")
    # Not their own names: those might be functions of SymPy.
    stand_in = {f"x{i}": Variable(f"x{i}") for i in range(len(table.columns))}
    scaled = {
        symbol: sympy.Float(1 / float(scale)) * sympy.Symbol(symbol.name, real=True)
        for symbol in form.free_symbols
        for i, scale in enumerate(table.scale)
        if symbol.name == f"x{i}"
    }
    form = sympy.Float(unit) * form.xreplace(scaled)
    expression = from_sympy(form, tuple(stand_in.values()))
    columns: Any = {one: table.columns[i] for i, one in enumerate(stand_in.values())}
    root = with_leaves(expression.root, lambda leaf: columns.get(leaf, leaf))
    return Expression(root, expression.constants)


def operator_options(operators: tuple[str, ...]) -> dict[str, Any]:
    """Returns operators as PySR's options: by arity, with Julia code and meaning where it needs.

    Raises:
        ImportError: if SymPy is missing.
    """
    written = {name: _NATIVE.get(name) or _JULIA[name] for name in operators}
    own = [name for name in operators if name not in _NATIVE]
    return {
        "binary_operators": [written[name] for name in operators if OPERATORS[name].arity == 2],
        "unary_operators": [written[name] for name in operators if OPERATORS[name].arity == 1],
        "extra_sympy_mappings": {f"lopt_{name}": _meaning(name) for name in own},
    }


def _meaning(name: str) -> Any:
    """Returns an operator as a function of SymPy's expressions."""
    sympy = sympy_module("PysrSearch")
    arguments = tuple(Variable(f"argument{i}") for i in range(OPERATORS[name].arity))
    form = to_sympy(Expression(Call(name, arguments), jnp.zeros(0)))
    symbols = [sympy.Symbol(str(one), real=True) for one in arguments]

    def unary(x: Any) -> Any:
        return form.xreplace({symbols[0]: x})

    def binary(x: Any, y: Any) -> Any:
        return form.xreplace({symbols[0]: x, symbols[1]: y})

    return unary if len(symbols) == 1 else binary


def _regressor() -> Any:
    try:
        from pysr import PySRRegressor
    except ImportError as error:
        raise ImportError(
            "PysrSearch needs PySR, of the extra pysr, and Julia, which PySR fetches when it is "
            "first imported; install it with: pip install 'lopt[pysr]'"
        ) from error
    return PySRRegressor
