"""The choice among candidates: the shortest that is as good as the best, by a standard error.

Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3, but with the error of the
*difference* to the best: what all candidates get wrong alike, such as a few outliers, says nothing
about which is better. Rows of one coordinate are far from independent, so the standard error is
over coordinates or, where there are enough, over runs.
"""

import numpy as np

from lopt.symbolic.expression import Expression
from lopt.symbolic.search import Candidate, Front, mean_squared_error, predict
from lopt.symbolic.split import coordinate_groups, run_groups
from lopt.symbolic.table import Table

# Runs that are enough for a standard error over them.
_ENOUGH_RUNS = 5
# The share of groups at either end whose differences count as those of the next one.
_TAIL = 0.1


def select(
    front: Front,
    validation: Table,
    errors: float = 1.0,
    negligible: float = 1e-8,
    most: float = 0.03,
) -> Candidate:
    """Returns the shortest candidate that is as good as the one with the least loss.

    That is, whose loss is larger by less than a standard error of the difference, and by less than
    a share of the output's variance.

    Args:
        front: whose candidates have the loss "validation".
        validation: the table of those losses.
        errors: how many standard errors; 0 takes the least loss itself.
        negligible: fraction of the output's variance that is no loss at all, such as that of
            rounding: without noise there is always a longer expression with a smaller one.
        most: R2 that the choice may lose to the best, whatever the standard error.
    """
    best = min(front.candidates, key=lambda one: (one.losses["validation"], one.complexity))
    variance = float(np.var(validation.output))

    def is_as_good(one: Candidate) -> bool:
        if not one.losses["validation"] <= best.losses["validation"] + most * variance:
            return False
        difference, error = paired_difference(one.expression, best.expression, validation)
        return difference <= errors * error + negligible * variance

    return next(one for one in front.candidates if one is best or is_as_good(one))


def paired_difference(one: Expression, other: Expression, table: Table) -> tuple[float, float]:
    """Returns the mean difference of squared errors of two expressions, and its standard error.

    For groups of n_i rows with mean differences d_i and the mean d of all N rows, it is the root
    of G / (G - 1) sum_i (n_i / N)^2 (d_i - d)^2, that of a ratio of sums; d_i beyond the outer
    tenths count as those next to them. It is zero for one group.
    """
    squares = [(predict(each, table) - table.output) ** 2 for each in (one, other)]
    groups = run_groups(table)
    if groups.max() + 1 < _ENOUGH_RUNS:
        groups = coordinate_groups(table)
    sizes = np.bincount(groups)
    count, rows = len(sizes), len(table)
    means = np.bincount(groups, squares[0] - squares[1]) / sizes
    ordered, tail = np.sort(means), int(_TAIL * count)
    means = np.clip(means, ordered[tail], ordered[count - 1 - tail])
    mean = float(np.sum(sizes * means) / rows)
    if count == 1:
        return mean, 0.0
    return mean, float(np.sqrt(count / (count - 1) * np.sum((sizes * (means - mean)) ** 2)) / rows)


def r_squared(expression: Expression, table: Table) -> float:
    """Returns 1 - mean squared error / variance of the output, about its own mean.

    It is minus infinity where the expression has no value.

    Raises:
        ValueError: if the output is constant.
    """
    return 1 - mean_squared_error(expression, table) / output_variance(table)


def output_variance(table: Table) -> float:
    """Returns the variance of the output.

    Raises:
        ValueError: if it is zero.
    """
    variance = float(np.var(table.output, dtype=float))
    if variance == 0:
        raise ValueError(
            f"Table(output) is {table.output[0]} in all of its {len(table)} rows: there is nothing "
            "to explain, and R2 has no meaning; record steps at which the rule does something."
        )
    return variance
