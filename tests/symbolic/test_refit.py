"""Constants are found again to the last digits, and derivatives are JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.symbolic.derivatives import PARTIALS, jacobian
from lopt.symbolic.expression import Expression, Variable, evaluate, make_expression
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.refit import refit
from lopt.symbolic.search import mean_squared_error
from lopt.symbolic.table import Table

G, M = Variable("gradient"), Variable("momentum")


def make_table(output, rows=500, scales=(1.0, 1.0), seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, 2)) * scales
    ids = np.zeros(rows, int)
    return Table((G, M), values, output(*values.T), ids, ids, ids, ids, np.arange(rows))


def with_constants(expression, constants):
    return Expression(expression.root, jnp.asarray(constants))


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_derivatives_are_those_of_jax(name):
    assert len(PARTIALS[name]) == OPERATORS[name].arity
    parts = [("multiply", 0.7, G), ("multiply", -1.2, M)][: OPERATORS[name].arity]
    expression = make_expression(("multiply", 1.5, (name, *parts)))
    generator = np.random.default_rng(0)
    # Usual ones, and some at which guards act.
    some = np.concatenate([scale * generator.normal(size=20) for scale in (1e-2, 1.0, 30.0)])
    special = np.asarray([0.0, 1e-31, -1e-31, 1e-9, -40.0, 100.0, 1e12, -1e12])
    one, other = (grid.reshape(-1) for grid in np.meshgrid(special, special))
    columns = {G: np.concatenate([some, one]), M: np.concatenate([some[::-1], other])}
    constants = np.asarray(expression.constants, float)
    values, slopes = jacobian(expression.root, constants, columns, len(columns[G]))
    on_device = {name: jnp.asarray(column) for name, column in columns.items()}
    by_jax = jax.jit(jax.jacfwd(lambda c: evaluate(expression.root, c, on_device, jnp)))
    expected = np.asarray(by_jax(jnp.asarray(constants))).T
    np.testing.assert_allclose(values, evaluate(expression.root, constants, columns))
    size = np.maximum(np.abs(expected), np.abs(values))
    assert np.all(np.abs(slopes - expected) <= 1e-7 * size + 1e-9)


def test_constants_are_exact_from_a_rough_start():
    law = make_expression(("multiply", 0.1, ("tanh", ("add", ("multiply", -1.3, M), G))))
    table = make_table(lambda g, m: 0.1 * np.tanh(-1.3 * m + g))
    fitted = refit(with_constants(law, [0.3, -0.8]), table)
    np.testing.assert_allclose(np.asarray(fitted.constants), [0.1, -1.3], rtol=1e-10)


def test_scales_of_columns_do_not_matter():
    table = make_table(lambda g, m: -2e3 * g + 5e-9 * m, scales=(1e-6, 1e5))
    rough = make_expression(("add", ("multiply", 1.0, G), ("multiply", 1.0, M)))
    np.testing.assert_allclose(np.asarray(refit(rough, table).constants), [-2e3, 5e-9], rtol=1e-8)


def test_linear_fits_are_those_of_least_squares():
    noise = np.random.default_rng(5).normal(size=500)
    table = make_table(lambda g, m: 0.5 * g - 0.2 * m + noise)
    rough = make_expression(("add", 0.1, ("add", ("multiply", 1.0, G), ("multiply", 1.0, M))))
    design = np.column_stack([np.ones(500), table.values])
    expected = np.linalg.lstsq(design, table.output, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(refit(rough, table).constants), expected, rtol=1e-7)


def test_a_fit_never_gets_worse():
    table = make_table(lambda g, m: np.abs(g))
    for rule in (
        ("exp", ("multiply", 60.0, G)),
        ("divide", G, ("add", M, 0.5)),
        ("pow", G, 2.5),
        ("multiply", 1.0, ("greater", G, 0.2)),
    ):
        rough = make_expression(rule)
        before, after = (
            mean_squared_error(rough, table),
            mean_squared_error(refit(rough, table), table),
        )
        assert after <= before


def test_what_has_no_constants_comes_back():
    expression = make_expression(("tanh", G))
    assert refit(expression, make_table(lambda g, m: g)) is expression


def test_constants_have_64_bits_where_jax_has_32():
    table = make_table(lambda g, m: g / 3)
    with jax.enable_x64(False):
        fitted = refit(make_expression(("multiply", 1.0, G)), table)
    assert abs(float(np.asarray(fitted.constants)[0]) - 1 / 3) < 1e-14


def test_more_constants_than_rows_are_refused():
    with pytest.raises(ValueError, match="2 constants cannot be fitted to 1 rows"):
        refit(make_expression(("add", 1.0, ("multiply", 1.0, G))), make_table(lambda g, m: g, 1))
