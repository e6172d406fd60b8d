"""Two forms of update rules that are linear in their weights: sums of columns, sums of powers.

Signed powers `|x|^p sign(x)` bend a response without changing its sign; their exponents are chosen
from a few and then refined by Gauss-Newton.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lopt.symbolic.expression import Expression, Variable, make_expression
from lopt.symbolic.least_squares import Matrix, Numbers, Row, Weights, gauss_newton, linear_fit
from lopt.symbolic.stepwise import nested_choices
from lopt.symbolic.template_forms import add_up

SIGNED_POWERS = (0.5, 2.0)
_POWERS = {"abs": 1.0, "square": 2.0, "cube": 3.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Columns of size one, and what they were.

    Attributes:
        names: of the columns.
        columns: their values.
        scales: what they were divided by.
    """

    names: tuple[Variable, ...]
    columns: Matrix
    scales: Weights

    def value(self, term: Any) -> Row:
        """Returns a term of the columns: None for one, a name, or an operator of a name."""
        if term is None:
            return np.ones(len(self.columns))
        if isinstance(term, Variable):
            return self.columns[:, self.names.index(term)]
        x = self.value(term[1])
        if term[0] == "pow":
            return np.sign(x) * np.abs(x) ** term[2]
        return {"abs": np.abs(x), "square": x**2, "cube": x**3}[term[0]]

    def unit(self, term: Any) -> float:
        """Returns the term of the columns as they were, in units of `value`."""
        if term is None:
            return 1.0
        if isinstance(term, Variable):
            return float(self.scales[self.names.index(term)])
        return self.unit(term[1]) ** (term[2] if term[0] == "pow" else _POWERS[term[0]])

    def expression(self, terms: list[Any], weights: Weights) -> Expression:
        """Returns the weighted sum of terms, in the columns as they were."""
        weights = weights / np.asarray([self.unit(term) for term in terms])
        return make_expression(
            add_up(
                [
                    weight if term is None else ("multiply", weight, term)
                    for term, weight in zip(terms, weights.tolist(), strict=True)
                ]
            )
        )


def linear_sums(inputs: Inputs, output: Row, intercept: bool, max_terms: int) -> list[Expression]:
    """Returns linear combinations of every number of columns up to `max_terms`."""
    terms = [None] * intercept + list(inputs.names)
    return _sums(inputs, terms, output, int(intercept), max_terms, free=False)


def power_sums(inputs: Inputs, output: Row, odd: bool, max_terms: int) -> list[Expression]:
    """Returns sums of signed powers; of absolute values, squares and one as well if not `odd`."""
    terms: list[Any] = [] if odd else [None]
    for name in inputs.names:
        terms += [name, ("cube", name), *(("pow", name, power) for power in SIGNED_POWERS)]
        if not odd and np.min(inputs.value(name)) < 0:
            terms += [("abs", name), ("square", name)]
    return _sums(inputs, terms, output, 0, max_terms, free=True)


def _sums(
    inputs: Inputs, terms: list[Any], output: Row, forced: int, max_terms: int, free: bool
) -> list[Expression]:
    """Returns sums of terms, with their exponents `free` as well."""
    dictionary = np.column_stack([inputs.value(term) for term in terms])
    found = []
    for chosen in nested_choices(dictionary, output, max_terms, forced):
        weights, parts = linear_fit(dictionary[:, chosen], output), [terms[i] for i in chosen]
        found.append(inputs.expression(parts, weights))
        if free and any(_exponent(part) is not None for part in parts):
            found.append(inputs.expression(*_refine(inputs, parts, weights, output)))
    return found


def _exponent(term: Any) -> float | None:
    """Returns p if a term is `|x|^p sign(x)`."""
    if isinstance(term, Variable):
        return 1.0
    if term is None or term[0] in ("abs", "square"):
        return None
    return 3.0 if term[0] == "cube" else float(term[2])


def _refine(
    inputs: Inputs, terms: list[Any], weights: Weights, output: Row
) -> tuple[list[Any], Weights]:
    """Returns the terms with the exponents of their signed powers fitted, and their weights."""
    count = len(terms)
    exponents = {i: _exponent(term) for i, term in enumerate(terms)}
    signed = {i: power for i, power in exponents.items() if power is not None}
    names = {i: terms[i] if isinstance(terms[i], Variable) else terms[i][1] for i in signed}
    fixed = np.column_stack([inputs.value(term) for term in terms])
    logs = {i: np.log(np.maximum(np.abs(inputs.value(names[i])), 1e-30)) for i in signed}

    def with_powers(numbers: Numbers) -> Mapping[int, Any]:
        return {i: ("pow", names[i], float(numbers[count + k])) for k, i in enumerate(signed)}

    def model(numbers: Numbers) -> tuple[Row, Matrix]:
        columns = fixed.copy()
        for i, term in with_powers(numbers).items():
            columns[:, i] = inputs.value(term)
        slopes = [numbers[i] * columns[:, i] * logs[i] for i in signed]
        return columns @ numbers[:count], np.column_stack([columns, *slopes])

    start = np.concatenate([weights, list(signed.values())])
    lower, upper = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    lower[count:], upper[count:] = 0.1, 4.0
    numbers, _ = gauss_newton(model, start, output, np.arange(len(start)), lower, upper)
    refined = with_powers(numbers)
    return [refined.get(i, term) for i, term in enumerate(terms)], numbers[:count]
