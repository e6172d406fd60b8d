"""Known optimizers are what they say, and are found again."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lopt.symbolic.expression import Variable
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.sanity import (
    LAG_RULES,
    adam_table,
    lag_table,
    run_sanity,
    tanh_table,
)


def lagged(table):
    return [table.values[:, table.columns.index(Variable("gradient", lag))] for lag in range(20)]


def test_tables_of_raw_lags_follow_their_rules():
    g = lagged(lag_table("sgd"))
    np.testing.assert_allclose(lag_table("sgd").output, -0.01 * g[0])
    expected = sum((1 - 0.1 * lag) * g[lag] for lag in range(11))
    np.testing.assert_allclose(lag_table("linear lags").output, expected)
    expected = g[0] ** 2 + g[1] + 2 * g[2] + np.exp(g[4])
    np.testing.assert_allclose(lag_table("nonlinear mix").output, expected)
    # What is before the last 20 gradients weighs 0.6^20.
    expected = sum(0.6**lag * g[lag] for lag in range(20))
    np.testing.assert_allclose(lag_table("momentum 0.6").output, expected, atol=1e-4)


def test_adams_table_of_raw_lags_is_only_nearly_a_function_of_them():
    table = lag_table("adam")
    g = lagged(table)
    weights = 0.9 ** np.arange(20)
    ratio = weights @ g / np.sqrt(weights @ np.square(g)) * np.sqrt(0.1)
    explained = np.corrcoef(ratio, table.output)[0, 1] ** 2
    assert 0.93 < explained < 0.9999


def test_gradients_are_about_as_large_as_they_say_and_lags_are_neighbours():
    table = lag_table("sgd")
    g = table.values[:, 0]
    assert 0.09 < g.std() < 0.11
    first = (table.run == 3) & (table.coordinate == 2)
    by_step = table.take(np.flatnonzero(first)[np.argsort(table.step[first])])
    np.testing.assert_array_equal(by_step.values[1:, 1], by_step.values[:-1, 0])


def test_tables_of_averages_follow_their_rules():
    table = adam_table()
    m, v = (
        table.values[:, table.columns.index(Variable(name))]
        for name in ("momentum_0.9", "second_moment_0.999")
    )
    np.testing.assert_allclose(table.output, -1e-3 * m / (np.sqrt(v) + 1e-8))
    table = tanh_table()
    m, before, g = table.values[:, 0], table.values[:, 1], table.values[:, 2]
    np.testing.assert_allclose(table.output, 0.1 * np.tanh(-1.3 * m - 0.45 * g + 0.6 * before))


def test_coordinates_and_seeds_differ():
    assert lag_table("sgd", 0).output.tolist() != lag_table("sgd", 1).output.tolist()
    table = adam_table()
    pairs = set(zip(table.run.tolist(), table.coordinate.tolist(), strict=True))
    assert len(pairs) == 500
    assert len(table) == 20_000


def test_gradient_descent_is_found_quickly():
    small = (OperonSearch(population=200, generations=10, tuned_generations=5, restarts=1),)
    seen = []
    (row,) = run_sanity(("sgd",), small, progress=lambda *stage: seen.append(stage))
    assert row.passed
    assert row.nodes == 3
    np.testing.assert_allclose(np.asarray(row.expression.constants), [-0.01], rtol=1e-9)
    assert [stage[0] for stage in seen] == [0, 1]


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="lion"):
        run_sanity(("lion",))
    with pytest.raises(ValueError, match="lion"):
        lag_table("lion")


# In a process of its own, as a user's: type checks of every call would count as seconds.
SCRIPT = """
import json, sys
import numpy as np
from lopt.symbolic.sanity import run_sanity
names, seed = json.loads(sys.argv[1])
for row in run_sanity(tuple(names), seed=seed):
    constants = np.asarray(row.expression.constants).tolist()
    print(json.dumps([row.name, row.passed, row.r_squared, row.nodes, row.seconds, constants]))
"""


def measured(names, seed=0):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([list(names), seed])],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_suite_of_raw_lags_reaches_its_figures():
    rows = measured(LAG_RULES)
    assert [name for name, *_ in rows] == list(LAG_RULES)
    assert all(passed for _, passed, *_ in rows), rows
    assert sum(seconds for *_, seconds, _ in rows) < 120, rows


@pytest.mark.slow
def test_adams_law_is_found_by_four_seeds_of_five():
    rows = [measured(["adam from averages"], seed)[0] for seed in range(5)]
    good = [r_squared > 0.9999 and nodes <= 16 for _, _, r_squared, nodes, *_ in rows]
    assert sum(good) >= 4, rows
    assert max(seconds for *_, seconds, _ in rows) < 60, rows


@pytest.mark.slow
def test_the_tanh_rule_is_found_to_three_digits_by_four_seeds_of_five():
    rows = [measured(["tanh rule"], seed)[0] for seed in range(5)]
    good = [
        r_squared > 0.9999
        and nodes <= 16
        and np.round(np.sort(np.abs(constants)), 3).tolist() == [0.1, 0.45, 0.6, 1.3]
        for _, _, r_squared, nodes, _, constants in rows
    ]
    assert sum(good) >= 4, rows
    assert max(seconds for *_, seconds, _ in rows) < 60, rows
