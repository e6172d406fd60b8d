"""The exact fit of an expression's constants: least squares on all rows, in 64 bits.

Searches fit constants roughly, on few rows and in 32 bits. What they found is where this fit
starts, and the same structure comes out of it with better numbers.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.symbolic.derivatives import Columns, jacobian
from lopt.symbolic.expression import Expression, Node, evaluate
from lopt.symbolic.search import predict
from lopt.symbolic.table import Table

Constants = Float[np.ndarray, " constant"]
Row = Float[np.ndarray, " row"]
# Beyond it squares, and squares of their sums, leave the range of numbers.
_LARGEST = 1e75
# Relative reductions of squares, steps and gradients that are none any more.
_TOLERANCES = {"ftol": 1e-10, "xtol": 1e-12, "gtol": 1e-14}


def refit(expression: Expression, table: Table, most: int = 100) -> Expression:
    """Returns the expression with the constants that have the least squared error nearby.

    It is returned as it is if it has no constants, no value on some row, or nothing better near it.

    Args:
        expression: with roughly fitted constants, which are where the descent starts.
        table: all rows to fit.
        most: evaluations of the residual.

    Raises:
        ValueError: if there are fewer rows than constants.
        KeyError: if a variable is not a column.
    """
    from scipy.optimize import least_squares

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

    # Not "lm": in SciPy 1.17 what it returns depends on what fresh memory happens to hold.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        fitted = least_squares(
            _residuals,
            start,
            _slopes,
            method="trf",
            tr_solver="exact",
            x_scale="jac",
            max_nfev=most,
            args=(expression.root, columns, table.output, unit),
            **_TOLERANCES,
        ).x
    # Of NumPy, and so in 64 bits even where JAX is kept to 32.
    better = Expression(expression.root, fitted)
    after = predict(better, table)
    gains = np.sum((after - table.output) ** 2) < np.sum((before - table.output) ** 2)
    return better if gains else expression


def _residuals(constants: Constants, root: Node, columns: Columns, output: Row, unit: float) -> Row:
    with np.errstate(all="ignore"):
        error = (evaluate(root, constants, columns) - output) / unit
    # A step to where there is no value is a bad one, and not an error.
    return np.nan_to_num(error, nan=_LARGEST, posinf=_LARGEST).clip(-_LARGEST, _LARGEST)


def _slopes(
    constants: Constants, root: Node, columns: Columns, output: Row, unit: float
) -> Float[np.ndarray, "row constant"]:
    _, by_constant = jacobian(root, constants, columns, len(output))
    slopes = np.nan_to_num(by_constant.T / unit, nan=0.0, posinf=0.0, neginf=0.0)
    return slopes.clip(-_LARGEST, _LARGEST)
