"""Splits of a table by run and coordinate, never by shuffled rows.

Neighbouring steps of one coordinate are nearly the same row: a split that shuffles rows measures
memory. Here no coordinate of a run is on two sides, and where there are runs enough, the test and
then the validation side are runs that nothing else is from.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from lopt.core.checks import check_integer, is_real
from lopt.symbolic.search import SPLITS
from lopt.symbolic.table import Table


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """The three sides of a table.

    Attributes:
        train: to search and to fit on.
        validation: to choose by.
        test: to report, used once.
        unseen_runs: which of "validation" and "test" consist of whole runs.
    """

    train: Table
    validation: Table
    test: Table
    unseen_runs: tuple[str, ...]

    def mapping(self) -> Mapping[str, Table]:
        """Returns the sides by name."""
        return {name: getattr(self, name) for name in SPLITS}


def split_table(
    table: Table,
    seed: int = 0,
    validation: float = 0.2,
    test: float = 0.2,
    least: int = 20,
) -> Splits:
    """Splits a table by whole runs as far as there are enough, else by coordinates of runs.

    Args:
        table: at least three coordinates of runs.
        seed: of the choice.
        validation: the fraction of runs, or of coordinates, on that side. Half a run or more is a
            run.
        test: the same for that side.
        least: rows that each side needs.

    Raises:
        ValueError: if a fraction is not between 0 and 1, or a side has too few rows.
    """
    check_integer("split_table", "seed", seed, 0, hint=0)
    check_integer("split_table", "least", least, hint=20)
    for name, fraction in (("validation", validation), ("test", test)):
        if not is_real(fraction) or not 0 < fraction < 1:
            raise ValueError(f"split_table({name}={fraction!r}) must be between 0 and 1; try 0.2.")
    if validation + test >= 1:
        raise ValueError(
            f"split_table(validation={validation}, test={test}) leaves nothing to train on; try "
            "0.2 and 0.2."
        )
    generator = np.random.default_rng(seed)
    runs, pairs = run_groups(table), coordinate_groups(table)
    remaining = np.ones(len(table), bool)
    sides: dict[str, Bool[np.ndarray, " row"]] = {}
    for name, fraction in (("test", test), ("validation", validation)):
        whole = _wanted(runs, np.ones(len(table), bool), fraction)
        # The rest needs a run for each side that follows, and one more to learn from.
        if whole and len(np.unique(runs[remaining])) > whole + len(SPLITS) - 2 - len(sides):
            sides[name] = remaining & _draw(runs, remaining, whole, generator)
        else:
            count = max(_wanted(pairs, remaining, fraction / (1 - test * bool(sides))), 1)
            sides[name] = remaining & _draw(pairs, remaining, count, generator)
        remaining = remaining & ~sides[name]
    return _splits(table, sides | {"train": remaining}, least)


def split_by(table: Table, labels: Sequence[str], least: int = 20) -> Splits:
    """Splits a table as the labels of its rows say: "train", "validation" or "test".

    Raises:
        ValueError: if there is not one of these for each row, or a side has too few rows.
    """
    found = np.asarray(labels)
    if found.shape != (len(table),) or not np.isin(found, SPLITS).all():
        raise ValueError(
            f"split_by(labels) must be {', '.join(SPLITS)} for each of {len(table)} rows; it has "
            f"shape {found.shape} and holds {', '.join(map(str, np.unique(found)[:9]))}."
        )
    return _splits(table, {name: found == name for name in SPLITS}, least)


def _splits(table: Table, sides: Mapping[str, Bool[np.ndarray, " row"]], least: int) -> Splits:
    runs, unseen = run_groups(table), []
    for name in SPLITS:
        rows = sides[name]
        if rows.sum() < least:
            raise ValueError(
                f"split_table: the {name} side of a table of {len(table)} rows, "
                f"{len(np.unique(runs))} runs and {len(np.unique(coordinate_groups(table)))} "
                f"coordinates of runs has {rows.sum()} rows and needs {least}; record more runs, "
                "coordinates or steps."
            )
        if name != "train" and not np.isin(runs[rows], runs[~rows]).any():
            unseen.append(name)
    return Splits(**{name: table.take(sides[name]) for name in SPLITS}, unseen_runs=tuple(unseen))


def run_groups(table: Table) -> Int[np.ndarray, " row"]:
    """Returns a number for each row, the same for rows of one run."""
    return _number(table.task, table.run)


def coordinate_groups(table: Table) -> Int[np.ndarray, " row"]:
    """Returns a number for each row, the same for rows of one coordinate of one run."""
    return _number(table.task, table.run, table.tensor, table.coordinate)


def sample(table: Table, rows: int, seed: int) -> Table:
    """Returns some rows of a table, drawn without replacement, or all of them if they are fewer."""
    if len(table) <= rows:
        return table
    generator = np.random.default_rng(seed)
    return table.take(np.sort(generator.choice(len(table), rows, replace=False)))


def _number(*ids: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    return np.unique(np.stack(ids), axis=1, return_inverse=True)[1].reshape(-1)


def _wanted(
    groups: Int[np.ndarray, " row"], rows: Bool[np.ndarray, " row"], fraction: float
) -> int:
    return math.floor(fraction * len(np.unique(groups[rows])) + 0.5)


def _draw(
    groups: Int[np.ndarray, " row"],
    rows: Bool[np.ndarray, " row"],
    count: int,
    generator: np.random.Generator,
) -> Bool[np.ndarray, " row"]:
    return np.isin(groups, generator.permutation(np.unique(groups[rows]))[:count])
