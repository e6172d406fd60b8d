"""Temporal perception field and mapping complexity, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.metrics import (
    Perception,
    equation_complexity,
    network_complexity,
    perception_of_expression,
    perception_of_network,
    remember,
    to_histories,
)
from lopt.symbolic.search import judge, make_front
from lopt.symbolic.table import Table

G = [Variable("g", lag) for lag in range(60)]


def make_table(columns, values: np.ndarray, output: np.ndarray | None = None) -> Table:
    ids = np.zeros(len(values), int)
    output = values[:, 0] if output is None else output
    return Table(tuple(columns), values, output, ids, ids, ids, ids, ids)


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Noise whose columns have a standard deviation of exactly one."""
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    return values / values.std(axis=0)


def average(decay: float, lags: int):
    """Returns sum_tau decay^tau g_{t-tau} as an expression."""
    form = ("multiply", decay ** (lags - 1), G[lags - 1])
    for lag in reversed(range(lags - 1)):
        form = ("add", ("multiply", decay**lag, G[lag]), form)
    return make_expression(form)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.7])
def test_an_exponential_average_sees_one_over_one_minus_decay_steps(decay):
    lags = 60
    table = make_table(G[:lags], noise(50, lags))
    (seen,) = perception_of_expression(average(decay, lags), table)
    assert seen.feature == "g"
    assert np.isclose(seen.field, 1 / (1 - decay))
    # (sum d^t)^2 / sum d^2t
    assert np.isclose(seen.participation, (1 + decay) / (1 - decay))


def test_the_network_with_that_memory_sees_the_same():
    decay, lags = 0.7, 60
    network = remember(lambda m, g: (decay * m + g[0],) * 2, jnp.zeros(()))
    histories = jnp.asarray(noise(50, lags))[:, :, None]
    (seen,) = perception_of_network(network, histories, ["g"], rows_at_once=16)
    (of_expression,) = perception_of_expression(
        average(decay, lags), make_table(G[:lags], np.asarray(histories[:, :, 0]))
    )
    assert np.isclose(seen.field, 1 / (1 - decay))
    assert np.allclose(seen.importance, of_expression.importance)


def test_memory_is_unrolled_from_the_oldest_to_the_present():
    network = remember(lambda m, x: (10 * m + x[0],) * 2, jnp.zeros(()))
    assert float(network(jnp.asarray([[3.0], [2.0], [1.0]]))) == 123


def test_importance_is_the_mean_slope_times_the_spread():
    # u = g_t^2 + tanh(g_{t-1}), with columns of different size.
    values = noise(300, 2) * [2.0, 0.5] + [0.3, -0.2]
    expression = make_expression(("add", ("square", G[0]), ("tanh", G[1])))
    (seen,) = perception_of_expression(expression, make_table(G[:2], values))
    slopes = np.stack([np.abs(2 * values[:, 0]), 1 - np.tanh(values[:, 1]) ** 2])
    wanted = slopes.mean(axis=1) * values.std(axis=0)
    assert np.allclose(seen.importance, wanted)
    assert np.isclose(seen.field, (wanted[0] + 2 * wanted[1]) / wanted.sum())


def test_derivatives_are_those_of_finite_differences():
    m, v = Variable("m"), Variable("v")
    values = np.abs(noise(40, 2)) + 0.1
    expression = make_expression(("tanh", ("divide", m, ("sqrt", v))))
    seen = perception_of_expression(expression, make_table((m, v), values))
    for one, column in zip(seen, range(2), strict=True):
        step = np.zeros(2)
        step[column] = 1e-6
        ends = [np.tanh(x[:, 0] / np.sqrt(x[:, 1])) for x in (values + step, values - step)]
        slope = np.mean(np.abs(ends[0] - ends[1])) / 2e-6
        assert np.isclose(one.importance[0], slope * values[:, column].std(), rtol=1e-6)


def test_unused_features_and_lags_count_nothing():
    other = Variable("other")
    table = make_table((*G[:3], other), noise(30, 4))
    g, nothing = perception_of_expression(make_expression(("multiply", 2.0, G[2])), table)
    assert g.importance.tolist() == [0, 0, g.importance[2]]
    assert (g.field, g.participation) == (3, 1)
    assert (nothing.field, nothing.participation) == (0, 0)
    constant = perception_of_expression(make_expression(1.0), table)
    assert [one.field for one in constant] == [0, 0]


def test_even_importance_takes_part_evenly():
    seen = Perception("g", np.full(8, 0.3))
    assert np.isclose(seen.field, 4.5)
    assert np.isclose(seen.participation, 8)


def test_histories_are_the_columns_in_order_of_lags():
    f, g = Variable("f"), Variable("g")
    columns = (Variable("f", 1), g, f, Variable("g", 1))
    values = noise(5, 4)
    names, histories = to_histories(make_table(columns, values))
    assert names == ("f", "g")
    assert np.array_equal(histories[:, 0], values[:, [2, 1]])
    assert np.array_equal(histories[:, 1], values[:, [0, 3]])
    with pytest.raises(ValueError, match=r"no column g\[t-1\]"):
        to_histories(make_table(columns[:3], values[:, :3]))


def test_names_must_fit_histories():
    with pytest.raises(ValueError, match=r"names=\('g',\)"):
        perception_of_network(lambda h: jnp.sum(h), jnp.zeros((2, 3, 2)), ["g"])


def test_equation_complexity_is_the_first_on_the_front_that_reaches_it():
    values = noise(400, 3)
    values -= values.mean(axis=0)
    output = values @ [3.0, 1.0, 0.1]
    table = make_table(G[:3], values, output)
    one = ("multiply", 3.0, G[0])
    two = ("add", one, G[1])
    three = ("add", two, ("multiply", 0.1, G[2]))
    front = make_front(judge(map(make_expression, (one, two, three)), {"train": table}))
    for least, nodes in ((0.5, 3), (0.95, 5), (0.9999, 9)):
        assert equation_complexity(front, table, least) == nodes
    assert equation_complexity(make_front(judge([make_expression(G[0])], {"train": table})),
                               table, 0.99) == math.inf  # fmt: skip


def test_network_complexity_grows_with_the_map():
    def tables(rule):
        made = {}
        for seed, name in enumerate(("train", "validation")):
            x = noise(300, 2, seed)
            made[name] = make_table(G[:2], x, 1e-3 * rule(*x.T))
        return made

    # One neuron is exactly a tanh of a linear form: two weights, a bias, a weight, a bias.
    assert network_complexity(tables(lambda x, y: np.tanh(x - y)), 0.999) == 5
    bump = tables(lambda x, y: np.exp(-(x**2)) * np.tanh(2 * y))
    size = network_complexity(bump, 0.95)
    assert 5 < size < math.inf
    assert network_complexity(bump, 0.99999, widths=(1,), tries=1) == math.inf


@pytest.mark.parametrize("least", [1.0, 1.5, float("nan")])
def test_an_r_squared_of_one_or_more_cannot_be_asked_for(least):
    table = make_table(G[:2], noise(30, 2))
    with pytest.raises(ValueError, match=r"network_complexity\(least="):
        network_complexity({"train": table, "validation": table}, least)


def test_perception_of_a_network_works_under_jit():
    histories = jnp.asarray(noise(6, 4))[:, :, None]
    network = jax.jit(lambda history: jnp.tanh(history[:, 0] @ jnp.asarray([1.0, 0.0, 0.0, 0.5])))
    (seen,) = perception_of_network(network, histories, ["g"])
    assert seen.importance[1] == seen.importance[2] == 0
    assert 1 < seen.field < 4
