"""The choice among candidates: the shortest that is as good as the best, by a standard error.

Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3. Rows of one coordinate
are far from independent, so the standard error is over coordinates or, where there are enough,
over runs.
"""

import numpy as np
from jaxtyping import Float

from lopt.symbolic.expression import Expression
from lopt.symbolic.search import Candidate, Front, mean_squared_error, predict
from lopt.symbolic.split import coordinate_groups, run_groups
from lopt.symbolic.table import Table

# Runs that are enough for a standard error over them.
_ENOUGH_RUNS = 5


def select(
    front: Front, validation: Table, errors: float = 1.0, negligible: float = 1e-8
) -> Candidate:
    """Returns the shortest candidate whose loss is within a standard error of the least.

    Args:
        front: whose candidates have the loss "validation".
        validation: the table of those losses.
        errors: how many standard errors; 0 takes the least loss itself.
        negligible: fraction of the output's variance that is no loss at all, such as that of
            rounding: without noise there is always a longer expression with a smaller one.
    """
    best = min(front.candidates, key=lambda one: (one.losses["validation"], one.complexity))
    limit = best.losses["validation"] + errors * standard_error(best.expression, validation)
    limit += negligible * float(np.var(validation.output))
    return next(one for one in front.candidates if one.losses["validation"] <= limit)


def standard_error(expression: Expression, table: Table) -> float:
    """Returns the standard error of an expression's mean squared error over groups of rows.

    For groups of n_i rows with mean errors e_i and the mean e of all N rows, it is the root of
    G / (G - 1) sum_i (n_i / N)^2 (e_i - e)^2, that of a ratio of sums. It is zero for one group.
    """
    errors = (predict(expression, table) - table.output) ** 2
    groups = run_groups(table)
    if groups.max() + 1 < _ENOUGH_RUNS:
        groups = coordinate_groups(table)
    sizes, sums = np.bincount(groups), np.bincount(groups, errors)
    count = len(sizes)
    if count == 1:
        return 0.0
    deviations: Float[np.ndarray, " group"] = sums - sizes * errors.mean()
    return float(np.sqrt(count / (count - 1) * np.sum(deviations**2)) / len(table))


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
