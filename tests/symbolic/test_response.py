"""Response curves of expressions and networks, against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.response import make_grid, partial_dependence, response
from lopt.symbolic.table import Table

F, G = Variable("f"), Variable("g", 2)


@pytest.fixture
def table() -> Table:
    values = np.random.default_rng(0).normal([0.0, 3.0], size=(501, 2))
    ids = np.zeros(501, int)
    return Table((F, G), values, values[:, 0], ids, ids, ids, ids, ids)


PRODUCT = make_expression(("multiply", ("tanh", F), G))


def test_others_are_held_at_their_quantiles(table):
    curve = response(PRODUCT, table, F, others=(0.1, 0.5, 0.9), points=9)
    held = np.quantile(table.values[:, 1], [0.1, 0.5, 0.9])
    assert curve.others == (0.1, 0.5, 0.9)
    assert np.allclose(curve.output, held[:, None] * np.tanh(curve.grid))


def test_partial_dependence_is_the_mean_over_the_others(table):
    curve = partial_dependence(PRODUCT, table, F, points=7)
    assert np.allclose(curve.output, table.values[:, 1].mean() * np.tanh(curve.grid)[None])
    few = partial_dependence(PRODUCT, table, F, points=7, rows=2)
    assert np.allclose(few.output, table.values[[0, 500], 1].mean() * np.tanh(few.grid)[None])


def test_partial_dependence_of_a_sum_is_its_part_and_a_constant(table):
    together = make_expression(("add", ("square", F), ("exp", G)))
    curve = partial_dependence(together, table, F)
    assert np.allclose(curve.output[0] - curve.grid**2, np.mean(np.exp(table.values[:, 1])))


def test_network_and_expression_stand_side_by_side(table):
    def network(columns):
        return jnp.tanh(columns[F]) * columns[G]

    for curves in (response, partial_dependence):
        one, other = curves(PRODUCT, table, F), curves(network, table, F)
        assert np.array_equal(one.grid, other.grid)
        assert np.allclose(one.output, other.output)


def test_a_constant_has_a_flat_curve(table):
    curve = response(make_expression(2.0), table, G, points=4)
    assert curve.output.tolist() == [[2.0] * 4]


def test_the_grid_lies_between_the_tails(table):
    grid = make_grid(table, F, points=5, tails=0.1)
    assert np.allclose(grid[[0, -1]], np.quantile(table.values[:, 0], [0.1, 0.9]))
    assert np.allclose(np.diff(grid), grid[1] - grid[0])


def test_bad_input_is_named(table):
    with pytest.raises(ValueError, match="no column h"):
        response(PRODUCT, table, Variable("h"))
    with pytest.raises(ValueError, match=r"others=\(1.5,\)"):
        response(PRODUCT, table, F, others=(1.5,))
    with pytest.raises(ValueError, match=r"tails=0\.5"):
        make_grid(table, F, tails=0.5)
    with pytest.raises(ValueError, match="points=1"):
        make_grid(table, F, points=1)
    with pytest.raises(ValueError, match="rows=0"):
        partial_dependence(PRODUCT, table, F, rows=0)
