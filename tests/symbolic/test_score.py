"""Scores mean what they say: R2, ceilings, and what a feature is worth, against closed forms."""

import dataclasses

import numpy as np
import pytest

from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.score import (
    ablate,
    ceiling,
    feature_names,
    fix_variables,
    permutation_losses,
    scores,
)
from lopt.symbolic.search import predict
from lopt.symbolic.table import Table

F, OLD, G = Variable("f"), Variable("f", 1), Variable("g")
COLUMNS = (F, OLD, G)


def make_table(rule, seed: int, rows: int = 800) -> Table:
    values = np.random.default_rng(seed).normal(size=(rows, 3)) * [2.0, 1.0, 1e-3]
    ids = np.zeros(rows, int)
    return Table(COLUMNS, values, rule(*values.T), ids, ids, ids, ids, ids)


def make_tables(rule) -> dict[str, Table]:
    names = ("train", "validation", "test")
    return {name: make_table(rule, seed) for seed, name in enumerate(names)}


def test_scores_are_the_explained_variance():
    tables = make_tables(lambda f, old, g: f + old)
    half = scores(make_expression(F), tables)
    exact = scores(make_expression(("add", F, OLD)), tables)
    assert list(half) == ["train", "validation", "test"]
    assert exact == {"train": 1.0, "validation": 1.0, "test": 1.0}
    # Four fifths of the variance are f's; what is left out counts with its mean.
    for name, table in tables.items():
        old = table.values[:, 1]
        assert np.isclose(half[name], 1 - np.mean(old**2) / np.var(table.output))


def test_ablation_of_a_sum_loses_each_share_of_the_variance():
    tables = make_tables(lambda f, old, g: f + 3e3 * g)
    expression = make_expression(("add", F, ("multiply", 3e3, G)))
    f, g = ablate(expression, tables["train"], tables["test"])
    test, train = tables["test"], tables["train"]
    assert (f.feature, g.feature) == ("f", "g")
    for loss, column, weight in ((f, 0, 1.0), (g, 2, 3e3)):
        mean = train.values[:, column].mean()
        lost = np.mean((weight * (test.values[:, column] - mean)) ** 2) / np.var(test.output)
        assert np.isclose(loss.replaced, lost)
        assert np.isclose(loss.refitted, lost, atol=0.02)


def test_an_unused_feature_loses_nothing():
    tables = make_tables(lambda f, old, g: f)
    expression = make_expression(("add", F, ("multiply", 0.0, OLD)))
    f, g = ablate(expression, tables["train"], tables["test"])
    assert (g.replaced, g.refitted) == (0.0, 0.0)
    assert f.replaced == pytest.approx(1, abs=0.02)
    multiplied = ablate(make_expression(("multiply", 1.0, F)), tables["train"], tables["test"])
    assert multiplied[1].replaced == 0


def test_a_refit_makes_up_for_a_feature_that_another_can_replace():
    def rule(f, old, g):
        return f

    tables = make_tables(rule)
    # g is a copy of f in other units.
    for name, table in tables.items():
        values = table.values.copy()
        values[:, 2] = 1e-3 * values[:, 0]
        tables[name] = dataclasses.replace(table, values=values)
    expression = make_expression(("add", ("multiply", 0.5, F), ("multiply", 500.0, G)))
    f, g = ablate(expression, tables["train"], tables["test"])
    for loss in (f, g):
        assert loss.replaced == pytest.approx(0.25, abs=0.02)
        assert loss.refitted == pytest.approx(0, abs=1e-9)


def test_no_refit_loses_more_than_everything():
    tables = make_tables(lambda f, old, g: f / (1 + 1e6 * g * g))
    expression = make_expression(("divide", F, ("add", 1.0, ("multiply", 1e6, ("square", G)))))
    for loss in ablate(expression, tables["train"], tables["test"]):
        assert loss.refitted <= 1.02


def test_lags_of_a_feature_go_together():
    tables = make_tables(lambda f, old, g: f + old)
    f, _ = ablate(make_expression(("add", F, OLD)), tables["train"], tables["test"])
    assert f.replaced == pytest.approx(1, abs=0.02)
    assert feature_names(COLUMNS) == ("f", "g")


def test_a_fixed_variable_is_one_constant_and_the_same_value():
    table = make_table(lambda f, old, g: f, 0)
    expression = make_expression(("add", ("multiply", F, G), ("square", F)))
    fixed = fix_variables(expression, {F: 1.5})
    assert fixed.constants.tolist() == [1.5]
    assert np.allclose(predict(fixed, table), 1.5 * table.values[:, 2] + 1.5**2)


def test_the_ceiling_is_near_one_on_a_smooth_function_and_near_zero_on_noise():
    smooth = ceiling(make_tables(lambda f, old, g: 1e-4 * np.tanh(f) * np.cos(old)))
    assert smooth.scores["test"] > 0.95
    assert smooth.scores["train"] >= smooth.scores["test"]
    noise = np.random.default_rng(9)
    nothing = ceiling(make_tables(lambda f, old, g: noise.normal(size=f.shape)))
    assert abs(nothing.scores["test"]) < 0.05


def test_the_ceiling_of_a_straight_line_is_one():
    found = ceiling(make_tables(lambda f, old, g: f - 2 * old + 500 * g))
    assert found.on_linear
    assert found.scores["test"] > 1 - 1e-6


def test_the_ceiling_knows_which_feature_counts():
    found = ceiling(make_tables(lambda f, old, g: np.tanh(2e3 * g)))
    f, g = found.losses
    assert g.replaced > 1.5
    assert abs(f.replaced) < 0.02
    assert f.refitted is None


def test_shuffling_loses_twice_the_share_of_a_feature():
    # Of independent shares, a shuffled one counts once for the mean and once for the noise.
    table = make_table(lambda f, old, g: f + 2e3 * g, 0, rows=4000)
    f, g = permutation_losses(lambda some: some.values @ [1.0, 0.0, 2e3], table)
    assert f.replaced == pytest.approx(1, abs=0.1)
    assert g.replaced == pytest.approx(1, abs=0.1)


def test_a_ceiling_repeats_itself():
    tables = make_tables(lambda f, old, g: np.abs(f))
    one, other = ceiling(tables, seed=3, most=20), ceiling(tables, seed=3, most=20)
    assert one.scores == other.scores
    assert one.losses == other.losses


def test_bad_input_is_named():
    tables = make_tables(lambda f, old, g: f)
    with pytest.raises(ValueError, match=r"ceiling\(tables\) has no 'validation'"):
        ceiling({"train": tables["train"]})
    with pytest.raises(ValueError, match=r"ceiling\(most=0\)"):
        ceiling(tables, most=0)
    with pytest.raises(ValueError, match="R2 has no meaning"):
        ceiling(make_tables(lambda f, old, g: 0 * f))
