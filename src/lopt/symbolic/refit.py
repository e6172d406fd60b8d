"""The exact fit of an expression's constants: least squares on all rows, in 64 bits.

Searches fit constants roughly, on few rows and in 32 bits. What they found is where this fit
starts, and the same structure comes out of it with better numbers.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.symbolic.derivatives import jacobian
from lopt.symbolic.expression import Expression
from lopt.symbolic.least_squares import Numbers, Row, gauss_newton
from lopt.symbolic.search import predict
from lopt.symbolic.table import Table

# Beyond it squares, and squares of their sums, leave the range of numbers.
_LARGEST = 1e75


def refit(expression: Expression, table: Table, most: int | None = None) -> Expression:
    """Returns the expression with the constants that have the least squared error nearby.

    It is returned as it is if it has no constants, no value on some row, or nothing better near it.

    Args:
        expression: with roughly fitted constants, which are where the descent starts.
        table: all rows to fit.
        most: steps of a rough fit; an exact one by default, of 100 steps, or of 20 for more than
            20 constants, which are no law.

    Raises:
        ValueError: if there are fewer rows than constants.
        KeyError: if a variable is not a column.
    """
    start = np.asarray(expression.constants, float)
    if start.size > len(table):
        raise ValueError(
            f"refit: an expression of {start.size} constants cannot be fitted to {len(table)} rows."
        )
    before = predict(expression, table)
    if not start.size or not np.isfinite(before).all():
        return expression
    # Residuals of order one, whatever the unit of the output.
    unit = max(float(np.sqrt(np.mean((before - table.output) ** 2))), np.finfo(float).tiny)
    columns: Any = {
        name: np.asarray(column, float)
        for name, column in table.mapping().items()
        if name in expression.variables
    }

    def model(constants: Numbers) -> tuple[Row, Float[np.ndarray, "row constant"]]:
        values, slopes = jacobian(expression.root, constants, columns, len(table))
        # A step to where there is no value is a bad one, and not an error.
        values = np.nan_to_num(values / unit, nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
        slopes = np.nan_to_num(slopes.T / unit, nan=0.0, posinf=0.0, neginf=0.0)
        return values.clip(-_LARGEST, _LARGEST), slopes.clip(-_LARGEST, _LARGEST)

    steps, tolerance = most or (100 if start.size <= 20 else 20), 1e-10 if most is None else 1e-5
    free, bound = np.arange(start.size), np.full(start.size, np.inf)
    output = np.asarray(table.output, float) / unit
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        fitted, _ = gauss_newton(model, start, output, free, -bound, bound, steps, tolerance)
    # Of NumPy, and so in 64 bits even where JAX is kept to 32.
    better = Expression(expression.root, fitted)
    after = predict(better, table)
    gains = np.sum((after - table.output) ** 2) < np.sum((before - table.output) ** 2)
    return better if gains else expression
