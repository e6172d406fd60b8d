"""Two more forms of update rules: exponential averages of lags, whose weights are one decay.

Momentum and Adam remember by exponential averages (Polyak 1964; Kingma and Ba 2015,
arXiv:1412.6980). From raw lags they are fitted with two to four constants, however long the memory.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from lopt.symbolic.expression import Call, Constant, Expression, Node, Variable
from lopt.symbolic.least_squares import Matrix, Numbers, Row, gauss_newton
from lopt.symbolic.template_forms import as_constants


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """`a S(d, x) / sqrt(e + S(c, x^2))` with `S(d, x) = sum_tau d^tau x_{t-tau}`.

    Its numbers are (a, d, e, c). Without the root, only (a, d) count.

    Attributes:
        lags: of one feature, the newest first.
        columns: their values.
        root: whether to divide by the root of the second moment.
    """

    lags: tuple[Variable, ...]
    columns: Matrix
    root: bool

    def values(self, numbers: Numbers) -> tuple[Row, Float[np.ndarray, "row number"]]:
        """Returns the values, and their derivatives by all numbers."""
        size, decay, floor, second_decay = numbers
        average, by_decay = _average(self.columns, decay)
        if not self.root:
            nothing = np.zeros_like(average)
            return size * average, np.column_stack([average, size * by_decay, nothing, nothing])
        square, by_second = _average(self.columns**2, second_decay)
        inverse = 1 / np.sqrt(np.maximum(floor + square, 1e-30))
        value = size * average * inverse
        slope = -0.5 * value * inverse**2
        return value, np.column_stack(
            [average * inverse, size * by_decay * inverse, slope, slope * by_second]
        )

    def fit(self, output: Row) -> tuple[Numbers, float]:
        """Returns the best numbers from several starts, and the mean squared error there."""
        lower, upper = np.asarray([-np.inf, -0.999, 0.0, 0.0]), np.asarray([np.inf, 1.1, 1e6, 1.1])
        free = np.arange(4) if self.root else np.arange(2)
        size = float(np.mean(self.columns**2))
        best, best_loss = np.zeros(4), np.inf
        for decay in (0.5, 0.9):
            for second in (0.5, 0.9) if self.root else (0.0,):
                start = np.asarray([1.0, decay, 1e-6 * size, second])
                unit, _ = self.values(start)
                start[0] = unit @ output / max(unit @ unit, 1e-300)
                found, loss = gauss_newton(self.values, start, output, free, lower, upper, 60)
                if loss < best_loss:
                    best, best_loss = found, loss
        return best, best_loss

    def expression(self, numbers: Numbers) -> Expression:
        """Returns the formula, sums written by Horner's rule: every decay is one constant."""
        size, decay, floor, second_decay = (float(number) for number in numbers)
        above = Call("multiply", (Constant(0), _horner(list(self.lags), Constant(1))))
        if not self.root:
            return Expression(above, as_constants([size, decay]))
        squares: list[Node] = [Call("square", (lag,)) for lag in self.lags]
        below = _horner(squares, Constant(2))
        constants = [size, decay, second_decay]
        if floor > 0:
            below, constants = Call("add", (below, Constant(3))), [*constants, floor]
        return Expression(Call("divide", (above, Call("sqrt", (below,)))), as_constants(constants))


def memories(
    names: tuple[Variable, ...], columns: Matrix, lengths: tuple[int, ...]
) -> list[Memory]:
    """Returns the forms for every feature of which there are enough lags, unbroken from 0.

    Args:
        names: of the columns.
        columns: theirs.
        lengths: how many lags to try; all lags that there are come on top.
    """
    found = []
    for name in sorted({one.name for one in names}):
        place = {one.lag: i for i, one in enumerate(names) if one.name == name}
        unbroken = next(lag for lag in range(len(place) + 1) if lag not in place)
        for length in sorted({*(one for one in lengths if one < unbroken), unbroken}):
            if length >= 2:
                chosen = [place[lag] for lag in range(length)]
                lags = tuple(names[i] for i in chosen)
                found += [Memory(lags, columns[:, chosen], root) for root in (False, True)]
    return found


def _average(columns: Matrix, decay: float) -> tuple[Row, Row]:
    """Returns `sum_tau decay^tau x_tau` and its derivative by the decay."""
    lags = np.arange(columns.shape[1])
    slopes = lags * float(decay) ** np.maximum(lags - 1, 0)
    return columns @ float(decay) ** lags, columns @ slopes


def _horner(parts: list[Node], decay: Constant) -> Node:
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = Call("add", (part, Call("multiply", (decay, total))))
    return total
