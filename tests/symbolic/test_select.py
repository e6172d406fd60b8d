"""The shortest within a standard error is chosen, and the error is one of groups."""

import numpy as np
import pytest

from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.search import judge, make_front, predict
from lopt.symbolic.select import output_variance, paired_difference, r_squared, select
from lopt.symbolic.table import Table

G, M = Variable("gradient"), Variable("momentum")


def make_table(noise, runs=20, coordinates=2, steps=25, seed=0):
    """Output g + 0.1 m + noise, of which each run has its own size."""
    rows = runs * coordinates * steps
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, 2))
    run, rest = np.divmod(np.arange(rows), coordinates * steps)
    coordinate, step = np.divmod(rest, steps)
    error = noise * generator.normal(size=rows) * generator.uniform(0, 2, runs)[run]
    output = values @ (1.0, 0.1) + error
    zeros = np.zeros(rows, int)
    return Table((G, M), values, output, zeros, run, zeros, coordinate, step)


SHORT = make_expression(G)
LONG = make_expression(("add", G, ("multiply", 0.1, M)))


def chosen(table, **options):
    # Equal losses on "train" and "validation": no fit takes place here.
    front = make_front(judge([SHORT, LONG], {"train": table, "validation": table}))
    return select(front, table, **options).expression.root


def test_the_longer_one_is_chosen_where_it_is_better_for_sure():
    assert chosen(make_table(0.01)) == LONG.root


def test_the_shorter_one_is_chosen_where_noise_hides_the_difference():
    table = make_table(2.5, seed=2)
    assert chosen(table) == SHORT.root
    assert chosen(table, errors=0.0) == LONG.root


def test_what_is_negligible_is_not_bought_with_length():
    table = make_table(0.0)
    assert chosen(table) == LONG.root
    # The momentum explains a hundredth of the variance.
    assert chosen(table, negligible=0.02) == SHORT.root


def differences(table, groups):
    """Mean differences of the squared errors of SHORT and LONG, by group."""
    squares = [(predict(one, table) - table.output) ** 2 for one in (SHORT, LONG)]
    return np.sort((squares[0] - squares[1]).reshape(groups, -1).mean(1))


def test_the_standard_error_is_that_of_differences_of_groups():
    table = make_table(1.0)
    means = differences(table, 20)
    means[:2], means[-2:] = means[2], means[-3]  # outer tenths
    found = paired_difference(SHORT, LONG, table)
    np.testing.assert_allclose(found, (means.mean(), means.std(ddof=1) / np.sqrt(20)))


def test_with_few_runs_the_groups_are_coordinates():
    table = make_table(1.0, runs=3, coordinates=8)
    means = differences(table, 24)
    means[:2], means[-2:] = means[2], means[-3]
    found = paired_difference(SHORT, LONG, table)
    np.testing.assert_allclose(found, (means.mean(), means.std(ddof=1) / np.sqrt(24)))


def test_a_single_group_has_no_standard_error():
    assert paired_difference(SHORT, LONG, make_table(1.0, runs=1, coordinates=1))[1] == 0


@pytest.mark.parametrize("seed", range(8))
def test_outliers_that_all_share_do_not_hide_the_law(seed):
    """y = 0.5 a + 0.2 b + noise of three degrees of freedom: the law is 5 paired errors better."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(2000, 2))
    output = values @ (0.5, 0.2) + 0.5 * generator.standard_t(3, 2000)
    zeros, run = np.zeros(2000, int), np.arange(2000) // 50
    table = Table((G, M), values, output, zeros, run, zeros, zeros, np.arange(2000) % 50)
    half = ("multiply", 0.5, G)
    law = make_expression(("add", half, ("multiply", 0.2, M)))
    front = make_front(judge([make_expression(half), law], {"train": table, "validation": table}))
    difference, error = paired_difference(make_expression(half), law, table)
    assert difference > 3 * error
    assert select(front, table).expression.root == law.root


def test_no_more_than_a_share_of_the_variance_is_lost():
    table = make_table(1.0)
    assert chosen(table, errors=1e9) == SHORT.root
    assert chosen(table, errors=1e9, most=1e-4) == LONG.root


def test_r_squared_is_one_for_the_law_and_zero_for_the_mean():
    table = make_table(0.0)
    assert r_squared(LONG, table) > 1 - 1e-12
    np.testing.assert_allclose(
        r_squared(make_expression(float(table.output.mean())), table), 0, atol=1e-12
    )
    np.testing.assert_allclose(
        r_squared(SHORT, table), 1 - np.mean((0.1 * table.values[:, 1]) ** 2) / table.output.var()
    )


def test_a_constant_output_has_no_r_squared():
    table = make_table(0.0)
    constant = Table(**{**vars(table), "output": np.full(len(table), 2.0)})
    with pytest.raises(ValueError, match="nothing to explain"):
        output_variance(constant)
