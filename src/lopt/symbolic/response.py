"""Response curves: an output as a function of one feature, for equation and network alike.

Others are held at quantiles of theirs, or averaged over (partial dependence, Friedman 2001,
"Greedy function approximation"). Where the equation's curve leaves the network's, the equation is
wrong, and this shows in which feature.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.core.checks import check_integer, is_real
from lopt.symbolic.expression import Variable
from lopt.symbolic.table import Table

Function = Callable[[Mapping[Variable, Any]], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """Outputs along one column.

    Attributes:
        variable: the column.
        grid: its values, increasing.
        output: at each, in each curve.
        others: of each curve, the quantile at which the other columns are held.
    """

    variable: Variable
    grid: Float[np.ndarray, " point"]
    output: Float[np.ndarray, "curve point"]
    others: tuple[float, ...]


def response(
    function: Function,
    table: Table,
    variable: Variable,
    others: Sequence[float] = (0.5,),
    points: int = 65,
    tails: float = 0.01,
) -> Response:
    """Returns the output along a column, with the others at quantiles.

    The grid follows from the table alone: curves of two functions have the same.

    Args:
        function: from columns, of any one length, to outputs; an `Expression` is one.
        table: where quantiles are taken from.
        variable: the column.
        others: a curve for each of these quantiles of the other columns, from 0 to 1.
        points: of the grid.
        tails: the quantile at which the grid begins; it ends at one minus that.

    Raises:
        ValueError: if there is no such column, or a quantile is not from 0 to 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from lopt.symbolic.expression import make_expression
        >>> g = Variable("gradient")
        >>> ids = np.zeros(3, int)
        >>> x = np.asarray([-1.0, 0.0, 3.0])
        >>> table = Table((g,), x[:, None], x, ids, ids, ids, ids, ids)
        >>> curve = response(make_expression(("multiply", -2.0, g)), table, g, points=3, tails=0.0)
        >>> curve.grid.tolist(), curve.output.tolist()
        ([-1.0, 1.0, 3.0], [[2.0, -2.0, -6.0]])
    """
    for quantile in others:
        if not is_real(quantile) or not 0 <= quantile <= 1:
            raise ValueError(f"response(others={others!r}) must be from 0 to 1; try (0.5,).")
    grid = make_grid(table, variable, points, tails)
    curves = []
    for quantile in others:
        held = np.quantile(np.asarray(table.values, float), quantile, axis=0)
        columns = {
            one: np.full(points, value) for one, value in zip(table.columns, held, strict=True)
        }
        curves.append(_evaluate(function, {**columns, variable: grid}, points))
    return Response(variable, grid, np.stack(curves), tuple(map(float, others)))


def partial_dependence(
    function: Function,
    table: Table,
    variable: Variable,
    points: int = 65,
    tails: float = 0.01,
    rows: int = 1000,
) -> Response:
    """Returns the mean output along a column, over the other columns as the table has them.

    Args:
        function: from columns, of any one length, to outputs.
        table: whose rows to average over.
        variable: the column.
        points: of the grid.
        tails: the quantile at which the grid begins; it ends at one minus that.
        rows: how many to average over at most, evenly spread over the table.

    Returns:
        One curve, with no quantile.

    Raises:
        ValueError: if there is no such column.
    """
    check_integer("partial_dependence", "rows", rows, hint=1000)
    grid = make_grid(table, variable, points, tails)
    count = min(rows, len(table))
    few = table.take(np.linspace(0, len(table) - 1, count).round().astype(int))
    columns = {one: np.tile(np.asarray(x, float), points) for one, x in few.mapping().items()}
    columns[variable] = np.repeat(grid, count)
    output = _evaluate(function, columns, points * count).reshape(points, count).mean(axis=1)
    return Response(variable, grid, output[None], ())


def make_grid(
    table: Table, variable: Variable, points: int = 65, tails: float = 0.01
) -> Float[np.ndarray, " point"]:
    """Returns evenly spaced values of a column, between quantiles at its two ends.

    Raises:
        ValueError: if there is no such column, or the quantile is not from 0 to below 0.5.
    """
    check_integer("make_grid", "points", points, 2, hint=65)
    if not is_real(tails) or not 0 <= tails < 0.5:
        raise ValueError(f"make_grid(tails={tails!r}) must be from 0 to below 0.5; try 0.01.")
    values = np.asarray(table.column(variable), float)
    first, last = np.quantile(values, [tails, 1 - tails])
    return np.linspace(float(first), float(last), points)


def _evaluate(
    function: Function, columns: Mapping[Variable, Float[np.ndarray, " row"]], count: int
) -> Float[np.ndarray, " row"]:
    return np.array(np.broadcast_to(np.asarray(function(columns), float), (count,)))
