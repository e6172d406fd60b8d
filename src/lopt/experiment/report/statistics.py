"""Means over seeds with their errors, and how all reports show numbers and text."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

# Escape sequences, and control characters other than tabs and ends of lines.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A mean over seeds and its standard error, which is None for fewer than two seeds."""

    mean: float | None
    error: float | None = None

    def __str__(self) -> str:
        if self.mean is None or self.error is None or not math.isfinite(self.mean + self.error):
            return number(self.mean)
        places = 1 - math.floor(math.log10(self.error)) if self.error > 0 else 9
        if 0 <= places <= 6 and abs(self.mean) < 1e6:
            return f"{self.mean:.{places}f} ± {self.error:.{places}f}"
        return f"{number(self.mean)} ± {number(self.error, 2)}"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number and an interval that holds it with a stated confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low, 2)}, {number(self.high, 2)}]"


Cell = str | bool | int | float | Measured | Interval | None


def measured(values: ArrayLike) -> Measured:
    """Returns mean and standard error of one number for each seed."""
    seeds = np.asarray(values, float)
    mean, error = mean_and_error(seeds)
    return Measured(float(mean) if len(seeds) else None, None if error is None else float(error))


def mean_and_error(values: Float[np.ndarray, "seed ..."]) -> tuple[Any, Any]:
    """Returns mean and standard error over the first axis; no error of fewer than two seeds."""
    if not len(values):
        return np.full(values.shape[1:], np.nan), None
    return values.mean(axis=0), stats.sem(values, axis=0) if len(values) > 1 else None


def number(value: Any, digits: int = 3) -> str:
    """Returns a cell of a table as text, a number with so many significant digits."""
    if value is None:
        return "-"
    if isinstance(value, str | Measured | Interval):
        return str(value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = max(digits, len(str(int(abs(value)))))  # all those of an integer part
        return np.format_float_positional(value, digits, fractional=False, trim="-")
    return f"{value:.{digits - 1}e}"


def plain(text: object) -> str:
    """Returns text without escape sequences and control characters."""
    return _CONTROLS.sub("", str(text))


def running_mean(
    values: Float[np.ndarray, "... step"], width: int
) -> Float[np.ndarray, "... step"]:
    """Returns means over up to `width` steps back."""
    # Not as differences of sums, which lose what is much smaller than the first values.
    padded = np.concatenate([np.zeros((*values.shape[:-1], width - 1)), values], axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1)
    inside = np.add.outer(np.arange(values.shape[-1]), np.arange(width)) >= width - 1
    return windows.mean(axis=-1, where=inside)


def shown_steps(steps: int, most: int = 40) -> Sequence[int]:
    """Returns at most so many steps, evenly, counted from one; the last is among them."""
    return np.unique(np.linspace(1, steps, min(most, steps)).round().astype(int)).tolist()
