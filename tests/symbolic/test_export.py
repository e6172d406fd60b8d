"""What is printed, translated and generated means what the expression means."""

import importlib.util
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from random_trees import (
    FEATURES,
    assert_same,
    random_expression,
    sampled,
    samples,
    value,
    well_posed,
)

from lopt.symbolic.algebra import from_sympy, to_sympy
from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.source import to_numpy_source, to_torch_source
from lopt.symbolic.typeset import to_latex, to_text

G, M, V = Variable("gradient"), Variable("m", 1), Variable("v")
ADAM = make_expression(("divide", ("multiply", -0.001234, M), ("add", ("sqrt", V), 1e-8)))


def _module(source):
    module = types.ModuleType("generated")
    exec(compile(source, "generated", "exec"), module.__dict__)
    return module


# --- source ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_numpy_source_gives_the_same(seed):
    rule = random_expression(seed)
    update = _module(to_numpy_source(rule)).update
    for columns, good in sampled(rule):
        with np.errstate(all="ignore"):
            found = update(*(columns[one] for one in rule.variables))
        assert_same(found, value(rule, columns), good)


@pytest.mark.parametrize("seed", range(30))
def test_torch_source_gives_the_same(seed):
    torch = pytest.importorskip("torch")
    rule = random_expression(seed)
    update = _module(to_torch_source(rule)).update
    for columns, good in sampled(rule):
        found = update(*(torch.from_numpy(columns[one]) for one in rule.variables))
        assert_same(found.numpy(), value(rule, columns), good)


@pytest.mark.parametrize("name", OPERATORS)
def test_guards_are_the_same_in_both_sources(name):
    extreme = np.asarray([0.0, 1e-31, 1e-20, 1e-18, 1e-9, 1.0, 2.0, 70.0, 1e6, 1e12, 1e18])
    extreme = np.concatenate([extreme, -extreme])
    arguments = (G, M)[: OPERATORS[name].arity]
    rule = make_expression((name, *arguments))
    columns = {one: x.ravel() for one, x in zip((G, M), np.meshgrid(extreme, extreme), strict=True)}
    given = [columns[one] for one in rule.variables]
    expected = value(rule, columns)
    assert_same(_module(to_numpy_source(rule)).update(*given), expected, tolerance=1e-12)
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x).requires_grad_() for x in given]
    found = _module(to_torch_source(rule)).update(*tensors)
    assert_same(found.detach().numpy(), expected, tolerance=1e-12)
    narrow = [x.detach().float().requires_grad_() for x in tensors]
    found = _module(to_torch_source(rule)).update(*narrow)
    assert torch.isfinite(found).all()
    if not found.requires_grad:
        assert name == "greater"
        return
    for slope in torch.autograd.grad(found.sum(), narrow):
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("seed", range(20))
def test_sources_keep_32_bits(seed):
    rule = random_expression(seed)
    columns = samples(dtype=np.float32)
    with np.errstate(all="ignore"):
        given = [columns[one] for one in rule.variables]
        assert _module(to_numpy_source(rule)).update(*given).dtype == np.float32


def test_torch_source_keeps_32_bits():
    torch = pytest.importorskip("torch")
    update = _module(to_torch_source(ADAM)).update
    tensors = [torch.ones(3), torch.ones(3, requires_grad=True)]
    assert update(*tensors).dtype == torch.float32
    update(*tensors).sum().backward()
    assert torch.isfinite(tensors[1].grad).all()


def test_arbitrary_names_become_identifiers_and_nothing_else():
    wild = (
        '"""\nraise SystemExit',
        "lambda",
        "9 lives",
        "m-1",
        "m_1",
        "np",
        "divide",
        "@.x",
        "",
        "é",
    )
    variables = [Variable(name, lag) for name in wild for lag in (0, 3)]
    total = variables[0]
    for one in variables[1:]:
        total = ("add", total, ("divide", one, 2.0))
    rule = make_expression(total)
    columns = {one: np.full(2, 1.0 + i) for i, one in enumerate(rule.variables)}
    for source in (to_numpy_source(rule), to_torch_source(rule)):
        code = compile(source, "generated", "exec")
        (update,) = [c for c in code.co_consts if getattr(c, "co_name", "") == "update"]
        names = update.co_varnames[: update.co_argcount]
        assert len(set(names)) == len(variables)
        assert all(name.isidentifier() and name.isascii() for name in names)
    found = _module(to_numpy_source(rule)).update(*columns.values())
    np.testing.assert_allclose(found, value(rule, columns))


@pytest.mark.parametrize("first", ["value", "np", "constant", "float", "torch"])
def test_features_called_like_what_the_source_uses(first):
    one, last = Variable(first), Variable("z")
    rule = make_expression(("max", ("tanh", one), ("min", last, ("multiply", 0.5, math.inf))))
    columns = {one: np.linspace(-1, 1, 4), last: np.linspace(1, -2, 4)}
    given = [columns[name] for name in rule.variables]
    assert rule.variables[0] == one
    found = _module(to_numpy_source(rule)).update(*given)
    np.testing.assert_allclose(found, np.maximum(np.tanh(columns[one]), columns[last]))
    if importlib.util.find_spec("torch"):
        import torch

        found = _module(to_torch_source(rule)).update(*map(torch.from_numpy, given))
        np.testing.assert_allclose(found.numpy(), np.maximum(np.tanh(columns[one]), columns[last]))


def test_sources_without_sense_are_refused():
    with pytest.raises(ValueError, match="no feature"):
        to_numpy_source(make_expression(2.0))
    for name in ("two words", "class"):
        with pytest.raises(ValueError, match="no Python identifier"):
            to_torch_source(ADAM, name)
    with pytest.raises(ValueError, match="that of a helper"):
        to_numpy_source(ADAM, "root")
    assert "def adam(m_lag_1, v):" in to_numpy_source(ADAM, "adam")


# --- text and LaTeX -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "text", "latex"),
    [
        (("subtract", G, ("subtract", M, V)), "gradient - (m[t-1] - v)", None),
        (("subtract", G, ("multiply", -2.0, M)), "gradient + 2 * m[t-1]", r"g_{t} + 2 \, m_{t-1}"),
        (("add", G, -0.5), "gradient - 0.5", "g_{t} - 0.5"),
        (("multiply", G, -0.5), "-0.5 * gradient", r"-0.5 \, g_{t}"),
        (("negative", ("add", G, M)), "-(gradient + m[t-1])", r"-\left(g_{t} + m_{t-1}\right)"),
        (("divide", G, ("divide", M, V)), "gradient / (m[t-1] / v)", None),
        (("divide", ("add", G, M), V), "(gradient + m[t-1]) / v", r"\frac{g_{t} + m_{t-1}}{v_{t}}"),
        (("square", ("negative", G)), "gradient^2", "g_{t}^{2}"),
        (("cube", ("negative", G)), "-gradient^3", "-g_{t}^{3}"),
        (("square", ("square", G)), "(gradient^2)^2", r"\left(g_{t}^{2}\right)^{2}"),
        (("square", ("add", G, 1.0)), "(gradient + 1)^2", None),
        (("sqrt", G), "sqrt(|gradient|)", r"\sqrt{\left|g_{t}\right|}"),
        (("sqrt", ("square", G)), "sqrt(gradient^2)", r"\sqrt{g_{t}^{2}}"),
        (("log", G), "log(|gradient| + 1e-08)", None),
        (("pow", G, 1.5), "sign(gradient) * |gradient|^1.5", None),
        (("pow", ("abs", G), -1.5), "|gradient|^(-1.5)", r"\left|g_{t}\right|^{-1.5}"),
        (("quotient", G, M), "gradient / sqrt(1 + m[t-1]^2)", None),
        (("greater", G, M), "[gradient > m[t-1]]", None),
        (("max", G, -1.0), "max(gradient, -1)", r"\max\left(g_{t}, -1\right)"),
        (("relu", G), "relu(gradient)", r"\operatorname{ReLU}\left(g_{t}\right)"),
        (("multiply", 2.0, 3.0), "3 * 2", r"3 \cdot 2"),
        (("square", ("multiply", 1e-8, G)), None, r"\left(10^{-8} \, g_{t}\right)^{2}"),
        (("multiply", 1.5e-5, G), "1.5e-05 * gradient", r"1.5 \cdot 10^{-5} \, g_{t}"),
    ],
)
def test_printed_forms(tree, text, latex):
    rule = make_expression(tree)
    assert text is None or to_text(rule) == text
    assert latex is None or to_latex(rule) == latex


def test_no_constant_becomes_zero_in_print():
    # The published tables cut 0.00123 to four characters: 0.00.
    rule = make_expression(("add", ("multiply", 0.00123456, G), 1.23456e-7))
    assert to_text(rule, 3) == "0.00123 * gradient + 1.23e-07"
    assert to_latex(rule) == r"0.00123 \, g_{t} + 1.23 \cdot 10^{-7}"
    assert to_text(rule) == "0.00123456 * gradient + 1.23456e-07"
    with pytest.raises(ValueError, match="digits=0 must be from 1 to 17"):
        to_text(rule, 0)


@pytest.mark.parametrize(
    ("variable", "latex"),
    [
        (Variable("m", 1), "m_{t-1}"),
        (Variable("m_normalised", 2), r"\tilde{m}_{t-2}"),
        (Variable("m_corrected"), r"\hat{m}_{t}"),
        (Variable("g_normalised"), r"\tilde{g}_{t}"),
        (Variable("momentum_0.9"), "m_{0.9,t}"),
        (Variable("momentum_0.99", 3), "m_{0.99,t-3}"),
        (Variable("average_0.9_m_normalised", 1), r"\langle \tilde{m} \rangle_{0.9,t-1}"),
        (Variable("warmup_0.98"), r"\left(1 - 0.98^{t}\right)"),
        (Variable("warmup_1e-05"), r"\left(1 - 0.00001^{t}\right)"),
        (Variable("average_0.9_momentum_0.5"), r"\langle m_{0.5} \rangle_{0.9,t}"),
        (Variable("parameter"), r"\theta_{t}"),
        (Variable("root_v"), r"\hat{v}^{1/2}_{t}"),
        (Variable("alpha"), r"\alpha_{t}"),
        (Variable("log_magnitude"), r"\mathrm{log\_magnitude}_{t}"),
        (Variable("50%{}"), r"\mathrm{50\%\{\}}_{t}"),
    ],
)
def test_latex_of_features(variable, latex):
    assert to_latex(make_expression(variable)) == latex


def test_symbols_can_be_chosen():
    assert to_latex(make_expression(G), symbols={"gradient": r"\nabla"}) == r"\nabla_{t}"


@pytest.mark.parametrize("seed", range(40))
def test_text_reads_back_as_the_same_function(seed):
    rule = random_expression(seed)
    known = {name: OPERATORS[name].apply for name in ("relu", "erfc", "sign", "asinh")}
    functions = {name: lambda x, f=f: f(np, x) for name, f in known.items()}
    functions |= {name: getattr(np, name) for name in ("tanh", "log", "sqrt")}
    functions |= {"exp": lambda x: np.exp(np.clip(x, -69, 69))}
    functions |= {"sinh": lambda x: np.sinh(np.clip(x, -69, 69))}
    functions |= {"max": np.maximum, "min": np.minimum, "abs": np.abs}
    if "[" in to_text(rule).replace("[t-1]", "") or "|" in to_text(rule):
        pytest.skip("bars and brackets are not Python's")
    text = to_text(rule).replace("m[t-1]", "m_").replace("momentum_0.9", "mom").replace("^", "**")
    for columns, good in sampled(rule):
        names = dict(
            zip(("gradient", "m_", "mom"), (columns[one] for one in FEATURES), strict=True)
        )
        with np.errstate(all="ignore"):
            try:
                found = np.asarray(eval(text, functions | names), float)
            except ZeroDivisionError:
                return
        good &= np.isfinite(np.broadcast_to(found, good.shape))
        assert_same(found, value(rule, columns), good, message=text)


@pytest.mark.parametrize("seed", range(40))
def test_latex_is_balanced(seed):
    latex = to_latex(random_expression(seed))
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\left") == latex.count(r"\right")
    assert "--" not in latex
    assert "+ -" not in latex


# --- SymPy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_sympy_gives_the_same(seed):
    sympy = pytest.importorskip("sympy")
    rule = random_expression(seed, depth=4)
    form = to_sympy(rule)
    symbols = [sympy.Symbol(str(one), real=True) for one in rule.variables]
    if form.has(sympy.zoo, sympy.nan):
        pytest.skip("divides by what is zero everywhere, which is guarded here")
    function = sympy.lambdify(symbols, form, modules=["scipy", "numpy"])
    back = from_sympy(form, rule.variables)
    for columns, good in sampled(rule):
        with np.errstate(all="ignore"):
            found = np.asarray(function(*(columns[one] for one in rule.variables)), complex).real
        # SymPy has no number where ours guards.
        good &= np.isfinite(np.broadcast_to(found, good.shape))
        assert_same(found, value(rule, columns), good)
        assert_same(value(back, columns), value(rule, columns), good)


def test_sympy_keeps_64_bits():
    pytest.importorskip("sympy")
    for number in (0.1, 1 / 3, 1e-30, math.pi * 1e8):
        form = to_sympy(make_expression(("multiply", number, G)))
        assert from_sympy(form, (G,)).constants.tolist() == [number]


def test_sympy_semantics():
    sympy = pytest.importorskip("sympy")
    g = sympy.Symbol("gradient", real=True)
    assert to_sympy(make_expression(("sqrt", G))) == sympy.sqrt(sympy.Abs(g))
    assert to_sympy(make_expression(("pow", G, 1.5))) == sympy.sign(g) * sympy.Abs(g) ** 1.5
    assert to_sympy(make_expression(("add", G, ("divide", 1.0, 0.0)))) == g


def test_foreign_forms_are_refused():
    sympy = pytest.importorskip("sympy")
    x = sympy.Symbol("gradient", real=True)
    with pytest.raises(ValueError, match="no cos"):
        from_sympy(sympy.cos(x), (G,))
    with pytest.raises(ValueError, match="no Symbol as in y"):
        from_sympy(sympy.Symbol("y"), (G,))
    with pytest.raises(ValueError, match="print alike"):
        to_sympy(make_expression(("add", M, Variable("m[t-1]"))))


def test_missing_sympy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sympy", None)
    with pytest.raises(ImportError, match=r"install lopt\[symbolic\]"):
        to_sympy(ADAM)


def test_every_operator_is_exported():
    for name, operator in OPERATORS.items():
        rule = make_expression((name, *(G, M)[: operator.arity]))
        columns = samples(scale=0.7)
        given = [columns[one] for one in rule.variables]
        np.testing.assert_allclose(
            _module(to_numpy_source(rule)).update(*given), value(rule, columns)
        )
        assert to_text(rule)
        assert to_latex(rule)
        if importlib.util.find_spec("sympy"):
            back = from_sympy(to_sympy(rule), rule.variables)
            np.testing.assert_allclose(value(back, columns), value(rule, columns), rtol=1e-12)
        found = rule({one: jnp.asarray(x) for one, x in columns.items()})
        np.testing.assert_allclose(found, value(rule, columns), rtol=1e-12)
        assert well_posed(rule, columns).mean() > 0.9
