"""Optional backends: translations mean what the backend meant, and missing ones say so."""

import builtins
import sys
import types

import numpy as np
import pytest

from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.pysr_search import PysrSearch, operator_options
from lopt.symbolic.pysr_search import translate as translate_form
from lopt.symbolic.search import predict
from lopt.symbolic.table import Table

F, G = Variable("f"), Variable("g", 3)


@pytest.fixture
def table() -> Table:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(200, 2)) * [1e-3, 5.0]
    ids = np.zeros(200, int)
    output = 0.01 * np.tanh(values[:, 0] * 1e3 - 0.2 * values[:, 1])
    return Table((F, G), values, output, ids, ids, ids, ids, ids)


def test_a_missing_package_names_its_extra(monkeypatch, table):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "pysr":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"lopt\[pysr\]"):
        PysrSearch().search(table, 0)


def test_pysr_says_that_it_needs_julia(monkeypatch, table):
    monkeypatch.setitem(sys.modules, "pysr", None)
    with pytest.raises(ImportError, match="Julia"):
        PysrSearch().search(table, 0)
    assert "Julia" in PysrSearch.__doc__


@pytest.mark.parametrize(
    "wrong",
    [{"operators": ("cosine",)}, {"operators": ()}, {"length": 0}, {"population": 3}],
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(ValueError, match=rf"PysrSearch\({next(iter(wrong))}"):
        PysrSearch(**wrong)


def read(text: str, operators: tuple[str, ...] = tuple(OPERATORS)):
    """Reads an equation as PySR does: by SymPy, with plain symbols and our meanings on top."""
    import sympy

    # As PySR's own table has them.
    native = {"square": lambda x: x**2, "cube": lambda x: x**3, "abs": sympy.Abs}
    symbols = {f"x{i}": sympy.Symbol(f"x{i}") for i in range(2)}
    meanings = operator_options(operators)["extra_sympy_mappings"]
    return sympy.sympify(text, locals={**native, **symbols, **meanings})


@pytest.mark.parametrize("name", OPERATORS)
def test_every_pysr_operator_means_what_ours_means(table, name):
    pytest.importorskip("sympy")
    symbols = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
    own = f"lopt_{name}" in operator_options((name,))["extra_sympy_mappings"]
    f, g = "(x0 - 0.31)", "(1.7*x1 + 0.2)"
    if name in symbols:
        text = f"{f} {symbols[name]} {g}"
    else:
        arguments = f if OPERATORS[name].arity == 1 else f"{f}, {g}"
        text = f"{f'lopt_{name}' if own else name}({arguments})"
    expression = translate_form(read(text), table, unit=0.5)
    x, y = (table.values / table.scale).T
    arguments = (x - 0.31, 1.7 * y + 0.2)[: OPERATORS[name].arity]
    wanted = 0.5 * OPERATORS[name].apply(np, *arguments)
    assert np.allclose(predict(expression, table), wanted, rtol=1e-9, atol=1e-12)


def test_pysr_operators_are_split_by_arity():
    options = operator_options(("add", "tanh", "sqrt", "max"))
    assert options["binary_operators"] == ["+", "lopt_max(x, y) = max(x, y)"]
    assert options["unary_operators"] == ["tanh", "lopt_sqrt(x) = sqrt(abs(x))"]
    assert set(options["extra_sympy_mappings"]) == {"lopt_sqrt", "lopt_max"}


def test_pysr_trees_with_what_expressions_lack_are_refused(table):
    sympy = pytest.importorskip("sympy")
    x = sympy.Symbol("x0")
    with pytest.raises(ValueError, match="gamma"):
        translate_form(sympy.gamma(x), table)
    with pytest.raises(ValueError, match="weight"):
        translate_form(x + sympy.Symbol("weight"), table)


def test_pysr_is_asked_for_what_the_fields_say_and_its_hall_of_fame_comes_back(monkeypatch, table):
    pytest.importorskip("sympy")
    asked = {}

    class Regressor:
        def __init__(self, **options):
            asked.update(options)

        def fit(self, inputs, output, variable_names):
            # Its inputs and outputs are of size one.
            assert np.allclose(np.mean(inputs**2, axis=0), 1)
            assert np.isclose(np.mean(output**2), 1)
            assert variable_names == ["x0", "x1"]
            self.equations_ = {"sympy_format": [read("0.5*x0"), read("lopt_sqrt(x1)*tanh(x0 - 1)")]}

    monkeypatch.setitem(sys.modules, "pysr", types.SimpleNamespace(PySRRegressor=Regressor))
    first, second = PysrSearch(iterations=7).search(table, 5)
    assert (asked["niterations"], asked["random_state"], asked["deterministic"]) == (7, 5, True)
    unit = np.sqrt(np.mean(table.output**2))
    x, y = (table.values / table.scale).T
    assert np.allclose(predict(first, table), unit * 0.5 * x)
    assert np.allclose(predict(second, table), unit * np.sqrt(np.abs(y)) * np.tanh(x - 1))
    assert second.variables == (F, G)
    assert first.complexity == make_expression(("multiply", 1.0, F)).complexity
