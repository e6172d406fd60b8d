"""Least squares in plain NumPy: forward selection of linear terms, and a small Gauss-Newton.

The forms of `template.py` are linear in most of their constants and cheap to differentiate by
hand; a solver without compilation fits hundreds of them in a second. Damping as in Marquardt 1963,
"An algorithm for least-squares estimation of nonlinear parameters".
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

Row = Float[np.ndarray, " row"]
Matrix = Float[np.ndarray, "row term"]
Weights = Float[np.ndarray, " term"]
Numbers = Float[np.ndarray, " number"]
Model = Callable[[Numbers], tuple[Row, Float[np.ndarray, "row number"]]]


def linear_fit(columns: Matrix, output: Row) -> Weights:
    """Returns the weights of least squares; the smallest ones where they are not unique."""
    norms = np.linalg.norm(columns, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    return np.linalg.lstsq(columns / norms, output, rcond=1e-12)[0] / norms


def forward_selection(columns: Matrix, output: Row, count: int, forced: int = 0) -> list[int]:
    """Orders terms by how much each lowers the squared error beside those chosen before it.

    Args:
        columns: the candidates.
        output: what their linear combination is to equal.
        count: how many to choose; fewer are when the rest are combinations of them.
        forced: the number of leading columns that are chosen whatever they do.

    Returns:
        The chosen columns, in the order of choice.

    Example:
        >>> x = np.eye(4)
        >>> forward_selection(x, np.asarray([0.0, 3.0, -1.0, 0.0]), 2)
        [1, 2]
    """
    norms = np.linalg.norm(columns, axis=0)
    rest = columns / np.where(norms > 0, norms, 1.0)
    residual = np.asarray(output, float)
    chosen: list[int] = []
    for number in range(min(count, columns.shape[1])):
        left = np.linalg.norm(rest, axis=0)
        gain = np.abs(residual @ rest) / np.where(left > 1e-7, left, np.inf)
        gain[chosen] = -1.0
        best = number if number < forced else int(np.argmax(gain))
        if gain[best] <= 0.0:
            break
        chosen.append(best)
        # Everything that is left is kept orthogonal to what was chosen.
        direction = rest[:, best] / left[best]
        rest = rest - np.outer(direction, direction @ rest)
        residual = residual - direction * (direction @ residual)
    return chosen


def gauss_newton(
    model: Model,
    start: Numbers,
    output: Row,
    free: Int[np.ndarray, " free"],
    lower: Numbers,
    upper: Numbers,
    steps: int = 30,
    tolerance: float = 1e-5,
) -> tuple[Numbers, float]:
    """Fits some numbers of a model by damped Gauss-Newton within bounds.

    Args:
        model: from all numbers to values and their derivatives by all numbers.
        start: where to begin; numbers that are not free stay there.
        output: the values wanted.
        free: which numbers to fit.
        lower: the least value of each number.
        upper: the greatest.
        steps: the most of them.
        tolerance: share of the loss that a step must take away, or it is the last.

    Returns:
        The numbers, and the mean squared error there.
    """
    numbers, damping = np.array(start, float), 1e-3
    values, slopes = model(numbers)
    loss = _mean_square(values - output)
    for _ in range(steps):
        # In units in which all numbers count alike; one that does nothing here stays.
        sizes = np.linalg.norm(slopes[:, free], axis=0)
        sizes = np.where(sizes > 0, sizes, 1.0)
        slopes = slopes[:, free] / sizes
        curvature, slope = slopes.T @ slopes, slopes.T @ (values - output)
        before = loss
        while damping < 1e10:
            move = np.linalg.solve(curvature + damping * np.eye(len(sizes)), -slope) / sizes
            trial = numbers.copy()
            trial[free] = np.clip(numbers[free] + move, lower[free], upper[free])
            trial_values, trial_slopes = model(trial)
            trial_loss = _mean_square(trial_values - output)
            if trial_loss < loss:
                numbers, values, slopes, loss = trial, trial_values, trial_slopes, trial_loss
                damping = max(damping / 10, 1e-12)
                break
            damping *= 10
        if not loss < before * (1 - tolerance):
            break
    return numbers, loss


def _mean_square(error: Row) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.mean(error**2))
    return square if np.isfinite(square) else np.inf
