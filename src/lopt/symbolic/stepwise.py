"""Stepwise fits: a term more at a time, then a term fewer, and every fit on the way is kept.

The way in finds good terms early, the way out mends what came in too early (Efroymson 1960). What
is returned is a front of models for a front of expressions, not one model.
"""

import numpy as np
from jaxtyping import Float

from lopt.symbolic.expression import Expression
from lopt.symbolic.least_squares import (
    Matrix,
    Numbers,
    Row,
    forward_selection,
    gauss_newton,
    linear_fit,
)
from lopt.symbolic.template_forms import AbstractForm


def nested_choices(columns: Matrix, output: Row, count: int, forced: int) -> list[list[int]]:
    """Returns choices of columns for a linear fit, of every number of them, in and out.

    Args:
        columns: the candidates.
        output: what their linear combination is to equal.
        count: how many to choose at most, beside the forced ones.
        forced: the number of leading columns that are in every choice.
    """
    chosen = forward_selection(columns, output, count + forced, forced)
    choices = [chosen[:number] for number in range(max(forced, 1), len(chosen) + 1)]
    left = list(chosen)
    while len(left) > max(forced, 1):
        weights = linear_fit(columns[:, left], output)
        curvature = columns[:, left].T @ columns[:, left]
        variance = np.diag(np.linalg.pinv(curvature))
        costs = weights**2 / np.maximum(variance, 1e-300)
        costs[[place for place, one in enumerate(left) if one < forced]] = np.inf
        left = [one for place, one in enumerate(left) if place != int(np.argmin(costs))]
        choices.append(left)
    return choices


def stepwise(form: AbstractForm, output: Row, max_terms: int) -> list[Expression]:
    """Fits a form with one term, two terms and so on, and then with fewer again.

    The next term is the one that lowers the squared error most by the slopes at the fit so far; the
    next to go is that whose square, in units of its variance, is smallest.

    Args:
        form: with its columns.
        output: what it is to equal.
        max_terms: how many of its optional numbers to use at most.
    """
    found: list[Expression] = []
    for numbers, used in form.starts(output):
        numbers, used = _fit(form, output, numbers, used)
        _keep(found, form, numbers, used)
        while (added := _next_term(form, output, numbers, used)) is not None:
            if len(used) >= max_terms + len(set(used) - set(form.optional().tolist())):
                break
            numbers, used = _fit(form, output, numbers, [*used, added])
            _keep(found, form, numbers, used)
        found += backwards(form, output, numbers, used)
    return found


def backwards(
    form: AbstractForm, output: Row, numbers: Numbers, used: list[int], most: int | None = None
) -> list[Expression]:
    """Fits a form with fewer terms again and again; of many, a tenth goes at a time.

    Args:
        form: with its columns.
        output: what it is to equal.
        numbers: of a fit.
        used: those of them that are in use.
        most: how many may be in use in what is kept; any number by default.
    """
    found: list[Expression] = []
    while dropped := _weakest_terms(form, numbers, used):
        numbers = numbers.copy()
        numbers[dropped] = 0.0
        left = [one for one in used if one not in set(dropped)]
        numbers, used = _fit(form, output, numbers, left)
        if most is None or len(used) <= most:
            _keep(found, form, numbers, used)
    return found


def _fit(
    form: AbstractForm, output: Row, numbers: Numbers, used: list[int]
) -> tuple[Numbers, list[int]]:
    lower, upper = form.bounds()
    numbers, _ = gauss_newton(form.values, numbers, output, np.asarray(used, int), lower, upper)
    return numbers, used


def _keep(found: list[Expression], form: AbstractForm, numbers: Numbers, used: list[int]) -> None:
    expression = form.expression(numbers, used)
    if expression is not None and np.all(np.isfinite(numbers)):
        found.append(expression)


def _next_term(form: AbstractForm, output: Row, numbers: Numbers, used: list[int]) -> int | None:
    """Returns the number whose slope explains most of what is left, if any does."""
    values, slopes = form.values(numbers)
    residual = output - values
    candidates = np.setdiff1d(form.optional(), used)
    if not len(candidates):
        return None
    basis = _orthonormal(slopes[:, used])
    residual = residual - basis @ (basis.T @ residual)
    rest = slopes[:, candidates]
    sizes = np.linalg.norm(rest, axis=0)
    rest = rest - basis @ (basis.T @ rest)
    left = np.linalg.norm(rest, axis=0)
    gains = (residual @ rest) / np.where(left > 1e-6 * (sizes + 1e-300), left, np.inf)
    # A number that stands at its least may only grow.
    bounded = np.isfinite(form.bounds()[0][candidates])
    gains = np.where(bounded, np.maximum(gains, 0.0), np.abs(gains))
    best = int(np.argmax(gains))
    return int(candidates[best]) if gains[best] > 1e-7 * np.linalg.norm(output) else None


def _weakest_terms(form: AbstractForm, numbers: Numbers, used: list[int]) -> list[int]:
    """Returns the numbers that can go most cheaply, a tenth of them, if more than one is left."""
    allowed = set(form.optional().tolist())
    optional = [place for place, one in enumerate(used) if one in allowed]
    if len(optional) < 2:
        return []
    _, slopes = form.values(numbers)
    slopes = slopes[:, used]
    curvature = slopes.T @ slopes
    ridge = 1e-10 * np.trace(curvature) / len(used) + 1e-300
    variance = np.diag(np.linalg.inv(curvature + ridge * np.eye(len(used))))
    costs = numbers[used] ** 2 / np.maximum(variance, 1e-300)
    optional.sort(key=lambda place: float(costs[place]))
    return [used[place] for place in optional[: max(1, len(optional) // 10)]]


def _orthonormal(columns: Matrix) -> Float[np.ndarray, "row rank"]:
    norms = np.linalg.norm(columns, axis=0)
    left, sizes, _ = np.linalg.svd(columns / np.where(norms > 0, norms, 1.0), full_matrices=False)
    return left[:, sizes > 1e-9]
