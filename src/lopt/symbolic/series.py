"""Series: recorded runs step by step, and the tables that are cut from them.

A table row is a coordinate at a step: features there and some steps before, and the output. Of
millions of neighbouring rows a table takes some thousands, spread evenly over tensors, steps and
tasks.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lopt.symbolic.expression import Variable
from lopt.symbolic.record import RAW_GRADIENT, RAW_PARAMETER, UPDATE, Recorded
from lopt.symbolic.table import Table

# Coordinates whose gradient was zero for so long count as dead: the published history.
HISTORY = 20
PARTS_OF_RUN = 10

Values = Float[np.ndarray, "run step coordinate"]
Alive = Bool[np.ndarray, "run step coordinate"]


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Recorded runs of equal length, on the host.

    Attributes:
        features, outputs: by name, as in `Seen`.
        task: which runs trained the same task: those of equal numbers.
        tensor: of each recorded coordinate.
        coordinate: its number in the network, for each run.
    """

    features: Mapping[str, Values]
    outputs: Mapping[str, Values]
    task: Int[np.ndarray, " run"]
    tensor: Int[np.ndarray, " coordinate"]
    coordinate: Int[np.ndarray, "run coordinate"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of runs, of steps and of coordinates."""
        runs, steps, coordinates = self.features[RAW_GRADIENT].shape
        return runs, steps, coordinates

    def finite(self) -> Bool[np.ndarray, " run"]:
        """Returns which runs are finite from their first step to their last."""
        every = [*self.features.values(), *self.outputs.values()]
        fine = [np.isfinite(values).all(axis=(1, 2)) for values in every]
        return np.logical_and.reduce(fine)

    def take(self, runs: np.ndarray) -> "Series":
        """Returns some of its runs, given by numbers or a mask."""
        features, outputs = (
            {name: values[runs] for name, values in each.items()}
            for each in (self.features, self.outputs)
        )
        return Series(features, outputs, self.task[runs], self.tensor, self.coordinate[runs])

    def alive(self, window: int) -> Alive:
        """Returns where the gradient was not zero in all of the last `window` steps."""
        moved = np.cumsum(self.features[RAW_GRADIENT] != 0, axis=1)
        before = np.zeros_like(moved)
        before[:, window:] = moved[:, :-window]
        return moved > before


def to_series(recorded: Sequence[Recorded]) -> Series:
    """Joins what was recorded of several runs, each with a leading axis of runs, on the host.

    Args:
        recorded: what `jax.vmap` of `record_episode` returned, call by call.
    """
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *recorded)
    task = np.unique(joined.task, axis=0, return_inverse=True)[1].reshape(-1)
    seen = joined.seen
    return Series(seen.features, seen.outputs, task, joined.tensor[0], joined.coordinate)


def lagged(name: str, lags: int) -> tuple[Variable, ...]:
    """Returns a feature at the present step and before: `lags` variables.

    Example:
        >>> [str(variable) for variable in lagged("gradient", 3)]
        ['gradient', 'gradient[t-1]', 'gradient[t-2]']
    """
    if lags < 1:
        raise ValueError(f"lagged(lags={lags}) must be at least 1; try 20.")
    return tuple(Variable(name, lag) for lag in range(lags))


def make_table(
    series: Series,
    columns: Sequence[Variable] | None = None,
    output: str | None = None,
    rows: int | None = None,
    *,
    padded: bool = False,
    seed: int = 0,
) -> Table:
    """Cuts a table from recorded runs.

    Rows are left out whose gradient was exactly zero for as long as the longest lag reaches, and
    for 20 steps at least, or since the start.

    Args:
        series: the runs.
        columns: features with their lags; by default each that the rule got, at the present step.
        output: "output", "output_0" and so on, or "update"; by default the rule's output if it has
            one, and otherwise the update.
        rows: how many are wanted: as equally many of each tensor, tenth of the run and task as
            there are; all by default.
        padded: whether features before the first step count as zeros, which is what a rule with a
            memory of lags sees; otherwise rows that would need them are left out.
        seed: of the choice of rows.

    Returns:
        The table, ordered by run, coordinate and step.

    Raises:
        ValueError: if a feature or the output is unknown, a value is not finite, or there are fewer
            rows than wanted.
    """
    if columns is None:
        chosen = [name for name in series.features if name not in (RAW_GRADIENT, RAW_PARAMETER)]
        columns = tuple(map(Variable, chosen))
    check_columns(series, columns)
    output = default_output(series) if output is None else output
    check_output(series, output)
    usable = usable_rows(series, columns, padded)
    run, coordinate, step = np.nonzero(usable.transpose(0, 2, 1))
    if rows is not None:
        if not 1 <= rows <= len(run):
            raise ValueError(
                f"make_table(rows={rows}): the recorded runs have {len(run)} rows that can be "
                "used; record more runs or longer ones, or ask for fewer rows."
            )
        part = step * PARTS_OF_RUN // series.shape[1]
        strata = np.stack([series.task[run], series.tensor[coordinate], part])
        kept = choose_rows(strata, rows, np.random.default_rng(seed))
        run, coordinate, step = run[kept], coordinate[kept], step[kept]

    def values(variable: Variable) -> Float[np.ndarray, " row"]:
        past = step - variable.lag
        found = series.features[variable.name][run, np.maximum(past, 0), coordinate]
        return np.where(past < 0, np.zeros_like(found), found)

    return Table(
        tuple(columns),
        np.stack([values(variable) for variable in columns], axis=1),
        series.outputs[output][run, step, coordinate],
        task=series.task[run],
        run=run,
        tensor=series.tensor[coordinate],
        coordinate=series.coordinate[run, coordinate],
        step=step,
        about={"output": output},
    )


def usable_rows(series: Series, columns: Sequence[Variable], padded: bool = False) -> Alive:
    """Returns which steps of which coordinates can be rows of a table of these columns."""
    reach = max(variable.lag for variable in columns)
    usable = series.alive(max(reach + 1, HISTORY))
    if not padded:
        usable[:, :reach] = False
    return usable


def choose_rows(
    strata: Int[np.ndarray, "kind row"], rows: int, generator: np.random.Generator
) -> Int[np.ndarray, " chosen"]:
    """Chooses rows at random, as equally many of each stratum as it has.

    Args:
        strata: rows that agree in all kinds are one stratum.
        rows: how many are chosen, at most as many as there are.
        generator: of random numbers.

    Returns:
        The numbers of the chosen rows, increasing.
    """
    stratum = np.unique(strata, axis=1, return_inverse=True)[1].reshape(-1)
    shuffled = generator.permutation(len(stratum))
    by_stratum = shuffled[np.argsort(stratum[shuffled], kind="stable")]
    counts = np.bincount(stratum)
    # Each row's place in its own stratum: the first of all strata are taken before any second.
    place = np.arange(len(stratum)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((generator.random(len(stratum)), place))
    return np.sort(by_stratum[order[:rows]])


def default_output(series: Series) -> str:
    """Returns what is distilled unless said otherwise: a single output, else the update."""
    return "output" if "output" in series.outputs else UPDATE


def check_output(series: Series, output: str) -> None:
    """Refuses an output that was not recorded."""
    if output not in series.outputs:
        raise ValueError(
            f"There is no output {output!r} in what was recorded; try one of "
            f"{', '.join(series.outputs)}."
        )


def check_columns(series: Series, columns: Sequence[Variable]) -> None:
    """Refuses features that were not recorded, and lags that no run is long enough for."""
    if not columns:
        raise ValueError("make_table(columns=()) must name at least one feature.")
    steps = series.shape[1]
    for variable in columns:
        if variable.name not in series.features:
            raise ValueError(
                f"There is no feature {variable.name!r} in what was recorded; there are "
                f"{', '.join(series.features)}."
            )
        if not 0 <= variable.lag < steps:
            raise ValueError(
                f"The lag of {variable} must be from 0 to {steps - 1}, as the runs have {steps} "
                "steps; record longer runs, or take a shorter lag."
            )
