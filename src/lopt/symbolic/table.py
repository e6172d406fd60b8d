"""Tables: what an optimizer saw and did, a row for each recorded coordinate and step.

Rows know which run and which coordinate they come from, and splits follow them: neighbouring
steps of one coordinate are nearly the same row, and must not be on both sides.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lopt.symbolic.expression import Variable

IDS = ("task", "run", "tensor", "coordinate", "step")


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Features and outputs of coordinates of recorded runs.

    Attributes:
        columns: the features.
        values: theirs, finite.
        output: what the rule put out, before its scale.
        task, run, tensor, coordinate, step: where each row comes from; coordinates are numbered
            within a run.
        about: what else there is to say, such as the run that was recorded; kept in files, so
            made of what JSON has.
    """

    columns: tuple[Variable, ...]
    values: Float[np.ndarray, "row column"]
    output: Float[np.ndarray, " row"]
    task: Int[np.ndarray, " row"]
    run: Int[np.ndarray, " row"]
    tensor: Int[np.ndarray, " row"]
    coordinate: Int[np.ndarray, " row"]
    step: Int[np.ndarray, " row"]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.output)
        if self.values.shape != (rows, len(self.columns)):
            raise ValueError(
                f"Table(values) has shape {self.values.shape}, not {(rows, len(self.columns))}: a "
                "row for each output, a column for each name."
            )
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"Table(columns={list(map(str, self.columns))}) repeats a name.")
        for name in IDS:
            if getattr(self, name).shape != (rows,):
                raise ValueError(
                    f"Table({name}) has shape {getattr(self, name).shape}, not ({rows},)."
                )
        for column, values in zip(self.columns, self.values.T, strict=True):
            _check_finite(f"the column {column}", values)
        _check_finite("the output", self.output)

    def __len__(self) -> int:
        return len(self.output)

    @property
    def scale(self) -> Float[np.ndarray, " column"]:
        """The root mean square of each column; one where it is zero."""
        scale = np.sqrt(np.mean(np.square(self.values, dtype=float), axis=0))
        return np.where(scale > 0, scale, 1.0)

    def mapping(self) -> Mapping[Variable, Float[np.ndarray, " row"]]:
        """Returns the columns by variable, as expressions take them."""
        return dict(zip(self.columns, self.values.T, strict=True))

    def column(self, variable: Variable) -> Float[np.ndarray, " row"]:
        """Returns one column.

        Raises:
            ValueError: if there is none of this name and lag.
        """
        if variable not in self.columns:
            known = ", ".join(map(str, self.columns))
            raise ValueError(f"The table has no column {variable}; it has {known}.")
        return self.values[:, self.columns.index(variable)]

    def select(self, *names: str) -> "Table":
        """Returns the table with some columns only.

        Args:
            names: `m[t-2]` is a column, and `m` that feature with all its lags.

        Raises:
            ValueError: if there is no such column.
        """
        columns = named(self.columns, names)
        kept = [self.columns.index(column) for column in columns]
        return dataclasses.replace(self, columns=columns, values=self.values[:, kept])

    def take(self, rows: np.ndarray) -> "Table":
        """Returns some of its rows, given by numbers or a mask."""
        fields = {name: getattr(self, name)[rows] for name in ("values", "output", *IDS)}
        return dataclasses.replace(self, **fields)


def named(columns: Sequence[Variable], names: Sequence[str]) -> tuple[Variable, ...]:
    """Returns the columns of some names, with their lags or for all lags.

    Raises:
        ValueError: if there is no such column.
    """
    known = {text for column in columns for text in (column.name, str(column))}
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"There is no column {', '.join(unknown)}; there are {', '.join(map(str, columns))}."
        )
    return tuple(column for column in columns if {column.name, str(column)} & set(names))


def _check_finite(what: str, values: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise ValueError(
            f"Table: {what} is {values[wrong[0]]} in row {wrong[0]} ({wrong.size} of {len(values)} "
            "are not finite); leave those rows out, or record a run that does not diverge."
        )
