"""Recording a trained run: fresh tasks of its own inner training, and the table cut from them."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt.core.checks import check_integer, check_length
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.devices import num_devices, round_up
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Theta
from lopt.experiment import storage
from lopt.experiment.experiment import Experiment
from lopt.experiment.report import progress
from lopt.experiment.train import reopen
from lopt.experiment.trainings import over_devices, stream
from lopt.learned import MomentFeatures, with_features
from lopt.learned.averages import check_decays
from lopt.symbolic.expression import Variable
from lopt.symbolic.record import RAW_GRADIENT, Recorded, record_episode
from lopt.symbolic.series import (
    Series,
    check_columns,
    check_output,
    lagged,
    make_table,
    to_series,
    usable_rows,
)
from lopt.symbolic.table import Table

# Of neighbouring rows, which are nearly the same, a table takes one of so many.
SPACING = 10


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """What is recorded.

    Attributes:
        rows: wanted in the table.
        steps: of each run.
        features: names, each with its lag behind it as in "gradient[t-2]"; by default all that the
            rule gets.
        lags: if given, raw gradients of so many steps instead.
        output: as for `lopt.symbolic.make_table`.
        per_tensor: coordinates of each tensor.
        padded: whether gradients before the first step count as zeros; otherwise rows that would
            need them are left out.
        keep_dead: whether coordinates without a gradient for 20 steps are kept.
        at_once: runs side by side.
        also: names of `lopt.learned.MomentFeatures` to record besides what the rule sees.
        decays: of exponential averages of what the rule sees, to record besides.
    """

    rows: int = 50_000
    steps: int = 300
    features: tuple[str, ...] = ()
    lags: int | None = None
    output: str | None = None
    per_tensor: int = 10
    padded: bool = False
    keep_dead: bool = False
    at_once: int = 8
    also: tuple[str, ...] = ()
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, hint in (("rows", 50_000), ("steps", 300), ("per_tensor", 10), ("at_once", 8)):
            check_integer("RecordSettings", name, getattr(self, name), hint=hint)
        if self.lags is not None:
            check_integer("RecordSettings", "lags", self.lags, most=self.steps, hint=20)
            if self.features or self.also or self.decays:
                raise ValueError(
                    f"RecordSettings(features={self.features}, also={self.also}, "
                    f"decays={self.decays}, lags={self.lags}): lags stand for raw gradients and "
                    "features for themselves; give one of the two."
                )
        check_decays("RecordSettings(decays)", self.decays)
        for feature in self.features:
            parse_variable(feature)

    def columns(self, series: Series) -> tuple[Variable, ...] | None:
        """Returns the columns of the table; None for all that the rule gets."""
        if self.lags is not None:
            # Rules that get the gradient as it is know it by its name.
            named, raw = series.features.get("gradient"), series.features[RAW_GRADIENT]
            plain = named is not None and np.array_equal(named, raw)
            return lagged("gradient" if plain else RAW_GRADIENT, self.lags)
        return tuple(map(parse_variable, self.features)) or None


def parse_variable(text: str) -> Variable:
    """Reads a feature's name as it is printed.

    Raises:
        ValueError: if what stands in its brackets is not t minus a number of steps.

    Example:
        >>> parse_variable("gradient[t-2]")
        Variable(name='gradient', lag=2)
    """
    name, bracket, rest = text.partition("[")
    lag = rest.removeprefix("t-").removesuffix("]")
    if not name or (bracket and (f"t-{lag}]" != rest or not lag.isdecimal())):
        raise ValueError(f"{text!r} is no feature; write it as gradient, or as gradient[t-2].")
    return Variable(name, int(lag) if bracket else 0)


def record_run(
    folder: Path, settings: RecordSettings, seed: int = 0, *, show_progress: bool = True
) -> Table:
    """Records the latest weights of a run on tasks that its meta-training never drew.

    Args:
        folder: of the run.
        settings: what is recorded.
        seed: of tasks, initial parameters, batches, coordinates and rows.
        show_progress: whether to draw a progress bar.

    Raises:
        FileNotFoundError: if the folder holds no run, or no weights.
        ValueError: if the run cannot be recorded, or there is no such feature or output.
    """
    experiment = reopen(folder)
    learned, theta = storage.load(folder, experiment.learned)
    if settings.also or settings.decays:
        if not isinstance(learned, Coordinatewise):
            raise ValueError(
                f"{folder} trained {type(learned).__name__}: only a lopt.Coordinatewise can be "
                "seen through other features than its own."
            )
        more = MomentFeatures(settings.also) if settings.also else None
        learned, theta = with_features(learned, theta, more, settings.decays)
    inner = dataclasses.replace(inner_training(experiment, folder), learned=learned)
    check_length(f"lopt record --steps {settings.steps}", settings.steps, learned.max_steps)
    key = stream("record", seed)
    series, dropped = record_series(inner, theta, key, settings, show_progress=show_progress)
    table = make_table(
        series,
        settings.columns(series),
        settings.output,
        settings.rows,
        padded=settings.padded,
        drop_dead=not settings.keep_dead,
        seed=seed,
    )
    about = {
        **table.about,
        "run": folder.name,
        "runs": series.shape[0],
        "steps": settings.steps,
        "seed": seed,
        "diverged_runs": dropped,
    }
    return dataclasses.replace(table, about=about)


def inner_training(experiment: Experiment, folder: Path) -> InnerTraining:
    """Returns the inner training of a run: the first in its meta-gradient estimator."""
    inner = experiment.inner_training()
    if inner is None:
        raise ValueError(f"The estimator of the run {folder} has no InnerTraining to record.")
    return inner


def record_series(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    settings: RecordSettings,
    *,
    show_progress: bool = True,
) -> tuple[Series, int]:
    """Records runs until a table can take one of ten of their rows.

    Args:
        inner: tasks and optimizer.
        theta: its weights.
        key: of all runs.
        settings: what is recorded.
        show_progress: whether to draw a progress bar.

    Returns:
        The runs that stayed finite, and how many did not.

    Raises:
        ValueError: if none stayed finite, they have no row that can be used, or there is no such
            feature or output.
    """
    recorded: list[Recorded] = []
    found, runs, wanted = 0, 0, settings.rows * SPACING
    with progress("recording rows", wanted, show=show_progress) as at:
        for some in _recordings(inner, theta, key, settings):
            recorded.append(some)
            part = to_series([some])
            runs += part.shape[0]
            found += _count_rows(part.take(part.finite()), settings)
            if not found:
                stayed = int(part.finite().sum())
                raise ValueError(
                    f"No row of {runs} recorded runs of {settings.steps} steps can be used: "
                    f"{stayed} of them stayed finite, and those have no coordinate with a "
                    "gradient, or are no longer than the lags; try more steps or fewer."
                )
            at(min(found, wanted), f"{runs} runs")
            if found >= wanted:
                break
    series = to_series(recorded)
    finite = series.finite()
    return series.take(finite), int((~finite).sum())


def _recordings(
    inner: InnerTraining, theta: Theta, key: Key, settings: RecordSettings
) -> Iterator[Recorded]:
    """Yields recorded runs, some at once, without an end; compiled once."""
    batch = round_up(settings.at_once, num_devices())

    def one(shared: Any, key: Key) -> Recorded:
        tasks, learned, theta = shared
        return record_episode(tasks, learned, theta, key, settings.steps, settings.per_tensor)

    run = over_devices(one, (inner.tasks, inner.learned, theta), batch)
    for first in itertools.count(0, batch):
        numbers = jnp.arange(first, first + batch, dtype=jnp.uint32)
        yield run(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))


def _count_rows(part: Series, settings: RecordSettings) -> int:
    """Returns how many rows a recording has, having checked that it has what is asked for."""
    columns = settings.columns(part) or (Variable(RAW_GRADIENT),)
    check_columns(part, columns)
    if settings.output is not None:
        check_output(part, settings.output)
    usable = usable_rows(part, columns, settings.padded, drop_dead=not settings.keep_dead)
    return int(usable.sum())
