"""Sums of several tanh of linear forms: what a network of one hidden layer computes.

A network with gates and memory is more than one bounded linear form, and often little more than
three or four. The units are fitted together from random starts (their loss has many minima), and
then lose weight after weight: LeCun, Denker and Solla 1989, "Optimal brain damage".
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lopt.symbolic.expression import Expression, make_expression
from lopt.symbolic.least_squares import Numbers, Row, gauss_newton, linear_fit
from lopt.symbolic.stepwise import backwards
from lopt.symbolic.template_forms import AbstractForm, add_up
from lopt.symbolic.template_sums import Inputs

Each = Float[np.ndarray, " unit"]
UNITS = (2, 3, 4, 6, 8)

# Random starts for each number of units, steps before all but the best are given up, and of that.
_STARTS, _TRIAL, _STEPS = 8, 15, 100
# Longer sums than this many numbers nobody would read, and they take minutes to fit on all rows.
_MOST = 64
# More units than before must leave less than this share of the squared error.
_HELPS = 0.98


def tanh_sums(
    inputs: Inputs, output: Row, odd: bool, units: Sequence[int] = UNITS
) -> list[Expression]:
    """Returns sums of more and more tanh, each with fewer and fewer weights, once few enough.

    Args:
        inputs: the columns.
        output: what the sums are to equal.
        odd: whether to leave out offsets.
        units: numbers of tanh to try, as long as more of them help.
    """
    found: list[Expression] = []
    least = square = float(np.mean(output**2))
    for count in units:
        form = TanhSumForm(inputs.names, inputs.columns, inputs.scales, count, odd)
        ((numbers, used),) = form.starts(output)
        loss = float(np.mean((form.values(numbers)[0] - output) ** 2))
        # What is left of an exact fit is rounding.
        if not loss < _HELPS * least - 1e-12 * square:
            break
        least = loss
        found += backwards(form, output, numbers, used, _MOST)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class TanhSumForm(AbstractForm):
    """`sum_k a_k tanh(b_k + w_k.x)`, with numbers (a, b, w_1, w_2, ...); b is zero if `odd`.

    Attributes:
        units: how many tanh.
        odd: whether to leave out b.
    """

    units: int
    odd: bool

    def _count(self) -> int:
        return self.units * (2 + len(self.names))

    def _parts(self, numbers: Numbers) -> tuple[Each, Each, Float[np.ndarray, "unit column"]]:
        heights, offsets, weights = np.split(numbers, (self.units, 2 * self.units))
        return heights, offsets, weights.reshape(self.units, -1)

    def values(self, numbers: Numbers) -> tuple[Row, Float[np.ndarray, "row number"]]:
        """Returns the values, and their derivatives by all numbers."""
        heights, offsets, weights = self._parts(numbers)
        squashed = np.tanh(self.columns @ weights.T + offsets)
        slopes = heights * (1 - squashed**2)
        by_weight = slopes[:, :, None] * self.columns[:, None, :]
        flat = by_weight.reshape(len(self.columns), -1)
        return squashed @ heights, np.concatenate([squashed, slopes, flat], axis=1)

    def starts(self, output: Row) -> list[tuple[Numbers, list[int]]]:
        """Returns the best of several fits from random weights, with all numbers in use."""
        count = self._count()
        used = np.r_[: self.units, (2 if self.odd else 1) * self.units : count]
        lower, upper = self.bounds()
        generator = np.random.default_rng(self.units)
        best, least = None, np.inf
        # Some rows tell good starts from bad ones, as long as they outnumber the numbers.
        every = max(1, len(output) // max(1000, 2 * count))
        few, wanted = dataclasses.replace(self, columns=self.columns[::every]), output[::every]
        for _ in range(_STARTS):
            start = np.zeros(count)
            start[used] = generator.normal(size=len(used)) / np.sqrt(len(self.names))
            _, offsets, weights = self._parts(start)
            start[: self.units] = linear_fit(np.tanh(few.columns @ weights.T + offsets), wanted)
            numbers, loss = gauss_newton(few.values, start, wanted, used, lower, upper, _TRIAL)
            if loss < least:
                best, least = numbers, loss
        assert best is not None
        best, _ = gauss_newton(self.values, best, output, used, lower, upper, steps=_STEPS)
        return [(best, used.tolist())]

    def bounds(self) -> tuple[Numbers, Numbers]:
        """Returns the least and the greatest value of each number."""
        count = self._count()
        return np.full(count, -np.inf), np.full(count, np.inf)

    def optional(self) -> Int[np.ndarray, " number"]:
        """Returns the numbers that a search may add or take away."""
        count = self._count()
        return np.arange((2 if self.odd else 1) * self.units, count)

    def expression(self, numbers: Numbers, used: list[int]) -> Expression | None:
        """Returns the formula, in the columns as they were; None if nothing is left of it."""
        heights, offsets, weights = self._parts(numbers)
        places = np.arange(2 * self.units, len(numbers)).reshape(self.units, -1)
        in_use, terms, rest = set(used), [], 0.0
        for height, offset, row, place in zip(heights, offsets, weights, places, strict=True):
            parts = [
                ("multiply", weight / scale, name)
                for weight, scale, name, number in zip(
                    row, self.scales, self.names, place, strict=True
                )
                if number in in_use
            ]
            if not parts:
                rest += height * np.tanh(offset)
                continue
            inner = add_up([*parts, offset] if offset else parts)
            terms.append(("multiply", height, ("tanh", inner)))
        if not terms:
            return None
        return make_expression(add_up(terms if rest == 0 else [*terms, rest]))
