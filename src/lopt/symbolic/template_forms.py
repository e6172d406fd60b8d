"""The forms of update rules that `TemplateSearch` fits: their values, slopes and expressions.

Each is a function of numbers of which most are zero; a search decides which are not. The clipped
sum is the final rule of Zheng et al. 2022 (arXiv:2203.06578), the ratio that of Adam (Kingma and
Ba 2015, arXiv:1412.6980), the tanh of a linear form that of an RNNprop network without memory.
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt.symbolic.expression import Call, Constant, Expression, Node, Variable, make_expression
from lopt.symbolic.least_squares import Matrix, Numbers, Row, Weights


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractForm(abc.ABC):
    """A function of columns and numbers.

    Attributes:
        names: of the columns.
        columns: their values, of size one.
        scales: what they were divided by.
    """

    names: tuple[Variable, ...]
    columns: Matrix
    scales: Weights

    @abc.abstractmethod
    def values(self, numbers: Numbers) -> tuple[Row, Float[np.ndarray, "row number"]]:
        """Returns the values, and their derivatives by all numbers."""

    @abc.abstractmethod
    def starts(self, output: Row) -> list[tuple[Numbers, list[int]]]:
        """Returns where fits begin: all numbers, and which of them are in use."""

    @abc.abstractmethod
    def bounds(self) -> tuple[Numbers, Numbers]:
        """Returns the least and the greatest value of each number."""

    @abc.abstractmethod
    def optional(self) -> Int[np.ndarray, " number"]:
        """Returns the numbers that a search may add or take away."""

    @abc.abstractmethod
    def expression(self, numbers: Numbers, used: list[int]) -> Expression | None:
        """Returns the formula, in the columns as they were; None if nothing is left of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class TanhForm(AbstractForm):
    """`a tanh(b + w.x)`, with numbers (a, b, w); b is zero if `odd`.

    Attributes:
        odd: whether to leave out b.
    """

    odd: bool

    def values(self, numbers: Numbers) -> tuple[Row, Float[np.ndarray, "row number"]]:
        """Returns the values, and their derivatives by all numbers."""
        squashed = np.tanh(self.columns @ numbers[2:] + numbers[1])
        slope = numbers[0] * (1 - squashed**2)
        slopes = np.column_stack([squashed, slope, slope[:, None] * self.columns])
        return numbers[0] * squashed, slopes

    def starts(self, output: Row) -> list[tuple[Numbers, list[int]]]:
        """Returns where fits begin."""
        # Bounded by a little more than the output: nothing to cut off, and it bends.
        start = np.zeros(2 + len(self.names))
        start[0] = 1.5 * float(np.max(np.abs(output)))
        return [(start, [0] if self.odd else [0, 1])]

    def bounds(self) -> tuple[Numbers, Numbers]:
        """Returns the least and the greatest value of each number."""
        return _unbounded(2 + len(self.names))

    def optional(self) -> Int[np.ndarray, " number"]:
        """Returns the numbers that a search may add or take away."""
        return 2 + np.arange(len(self.names))

    def expression(self, numbers: Numbers, used: list[int]) -> Expression | None:
        """Returns the formula, in the columns as they were; None if nothing is left of it."""
        terms = [
            ("multiply", numbers[i] / self.scales[i - 2], self.names[i - 2])
            for i in sorted(used)
            if i >= 2
        ]
        if not terms:
            return None
        inner = add_up(terms if self.odd else [*terms, numbers[1]])
        return make_expression(("multiply", numbers[0], ("tanh", inner)))


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedForm(AbstractForm):
    """`sum_j w_j tanh(x_j / gamma)`, with one gamma for all lags of a feature.

    Its numbers are w, then 1 / gamma for each feature.
    """

    def _groups(self) -> Int[np.ndarray, " term"]:
        features = sorted({one.name for one in self.names})
        return np.asarray([features.index(one.name) for one in self.names])

    def values(self, numbers: Numbers) -> tuple[Row, Float[np.ndarray, "row number"]]:
        """Returns the values, and their derivatives by all numbers."""
        count, groups = len(self.names), self._groups()
        weights, slopes = numbers[:count], numbers[count:][groups]
        squashed = np.tanh(self.columns * slopes)
        by_slope = weights * (1 - squashed**2) * self.columns
        by_group = [by_slope[:, groups == one].sum(axis=1) for one in range(len(numbers) - count)]
        return squashed @ weights, np.column_stack([squashed, *by_group])

    def starts(self, output: Row) -> list[tuple[Numbers, list[int]]]:
        """Returns where fits begin."""
        # The line search over gamma: bent hardly, somewhat, and hard.
        count, features = len(self.names), int(self._groups().max()) + 1
        free = list(range(count, count + features))
        return [
            (np.concatenate([np.zeros(count), np.full(features, slope)]), free)
            for slope in (0.2, 1.0, 5.0)
        ]

    def bounds(self) -> tuple[Numbers, Numbers]:
        """Returns the least and the greatest value of each number."""
        lower, upper = _unbounded(len(self.names) + int(self._groups().max()) + 1)
        lower[len(self.names) :], upper[len(self.names) :] = 1e-3, 1e3
        return lower, upper

    def optional(self) -> Int[np.ndarray, " number"]:
        """Returns the numbers that a search may add or take away."""
        return np.arange(len(self.names))

    def expression(self, numbers: Numbers, used: list[int]) -> Expression | None:
        """Returns the formula, in the columns as they were; None if nothing is left of it."""
        count, groups = len(self.names), self._groups()
        chosen = [i for i in sorted(used) if i < count]
        if not chosen:
            return None
        features = sorted({int(groups[i]) for i in chosen})
        # Lags of a feature share the constant gamma, so they also share it when it is fitted.
        weights = [numbers[i] for i in chosen]
        gammas = []
        for one in features:
            scale = next(self.scales[i] for i in chosen if groups[i] == one)
            gammas.append(scale / numbers[count + one])
        terms: list[Node] = []
        for place, i in enumerate(chosen):
            gamma = Constant(len(chosen) + features.index(int(groups[i])))
            squashed = Call("tanh", (Call("divide", (self.names[i], gamma)),))
            terms.append(Call("multiply", (Constant(place), squashed)))
        return Expression(_chain(terms), as_constants([*weights, *gammas]))


@dataclasses.dataclass(frozen=True, eq=False)
class RatioForm(AbstractForm):
    """`w.x / sqrt(v.q)`: momentum over the root of a second moment, as in Adam.

    q holds one, the squares of the columns, and columns that are never negative as they are, since
    those may be second moments already. Its numbers are w, then v.

    Attributes:
        moments: which columns are never negative.
        numerators: which may stand in the numerator.
    """

    moments: Int[np.ndarray, " moment"]
    numerators: Int[np.ndarray, " numerator"]

    def _second(self) -> Float[np.ndarray, "row second"]:
        ones = np.ones((len(self.columns), 1))
        return np.concatenate([ones, self.columns**2, self.columns[:, self.moments]], axis=1)

    def values(self, numbers: Numbers) -> tuple[Row, Float[np.ndarray, "row number"]]:
        """Returns the values, and their derivatives by all numbers."""
        count, second = len(self.names), self._second()
        above, square = self.columns @ numbers[:count], second @ numbers[count:]
        # As division of expressions: zero where there is nothing to divide by.
        inverse = np.where(square > 1e-30, 1 / np.sqrt(np.maximum(square, 1e-30)), 0.0)
        value = above * inverse
        by_second = -0.5 * (value * inverse**2)[:, None] * second
        return value, np.column_stack([inverse[:, None] * self.columns, by_second])

    def starts(self, output: Row) -> list[tuple[Numbers, list[int]]]:
        """Returns where fits begin."""
        count, second = len(self.names), self._second()
        found = []
        for below in range(1, second.shape[1]):
            square = second[:, below]
            inverse = np.where(square > 1e-30, 1 / np.sqrt(np.maximum(square, 1e-30)), 0.0)
            columns = self.columns[:, self.numerators] * inverse[:, None]
            norms = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
            gains = np.abs(output @ columns) / norms
            best = int(np.argmax(gains))
            if not gains[best] > 0:
                continue
            numbers = np.zeros(count + second.shape[1])
            above = int(self.numerators[best])
            numbers[above] = output @ columns[:, best] / norms[best] ** 2
            numbers[count + below] = 1.0
            found.append((float(gains[best]), numbers, [above, count + below]))
        found.sort(key=lambda one: -one[0])
        return [(numbers, used) for _, numbers, used in found[:2]]

    def bounds(self) -> tuple[Numbers, Numbers]:
        """Returns the least and the greatest value of each number."""
        lower, upper = _unbounded(2 * len(self.names) + 1 + len(self.moments))
        lower[len(self.names) :] = 0.0
        return lower, upper

    def optional(self) -> Int[np.ndarray, " number"]:
        """Returns the numbers that a search may add or take away."""
        count = len(self.names)
        return np.concatenate([self.numerators, count + np.arange(count + 1 + len(self.moments))])

    def expression(self, numbers: Numbers, used: list[int]) -> Expression | None:
        """Returns the formula, in the columns as they were; None if nothing is left of it."""
        count = len(self.names)
        above = [i for i in sorted(used) if i < count]
        below = [i for i in sorted(used, reverse=True) if i >= count and numbers[i] > 0]
        if not above or not below:
            return None
        # Only the ratio counts: the weight of one second moment is made one and left out.
        squares = self._squares()
        unit = numbers[below[0]] * squares[below[0] - count][1]
        parts: list[Any] = []
        for i in below:
            part, weight = squares[i - count]
            weight = numbers[i] * weight / unit
            if part is None:
                parts.append(weight)
            else:
                parts.append(part if i == below[0] else ("multiply", weight, part))
        terms = [
            ("multiply", numbers[i] / self.scales[i] / np.sqrt(unit), self.names[i]) for i in above
        ]
        return make_expression(("divide", add_up(terms), ("sqrt", add_up(parts))))

    def _squares(self) -> list[tuple[Any, float]]:
        """Returns each part of q in the columns as they were, and its weight."""
        squares = [
            (("square", name), scale**-2)
            for name, scale in zip(self.names, self.scales, strict=True)
        ]
        moments = [(self.names[i], 1 / self.scales[i]) for i in self.moments]
        return [(None, 1.0), *squares, *moments]


def add_up(parts: list[Any]) -> Any:
    """Returns the sum of parts, as `make_expression` takes it."""
    total = parts[0]
    for part in parts[1:]:
        total = ("add", total, part)
    return total


def _chain(parts: list[Node]) -> Node:
    total = parts[0]
    for part in parts[1:]:
        total = Call("add", (total, part))
    return total


def as_constants(numbers: list[float]) -> Float[Array, " constant"]:
    """Returns numbers as the constants of an expression."""
    return jnp.asarray(np.asarray(numbers, float))


def _unbounded(count: int) -> tuple[Numbers, Numbers]:
    return np.full(count, -np.inf), np.full(count, np.inf)
