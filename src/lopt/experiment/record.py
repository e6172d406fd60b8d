"""Recording a trained run: fresh tasks of its own inner training, and the table cut from them."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt.core.checks import check_length
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.devices import num_devices, round_up
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Theta
from lopt.experiment.report import progress
from lopt.experiment.runs import storage
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.train import reopen
from lopt.experiment.settings import RecordSettings, split_lag
from lopt.experiment.trainings import OverDevices, stream
from lopt.learned import MomentFeatures, with_features
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


def columns_asked(settings: RecordSettings, series: Series) -> tuple[Variable, ...] | None:
    """Returns the columns of the table; None for all that the rule gets."""
    if settings.lags is not None:
        # Rules that get the gradient as it is know it by its name.
        named, raw = series.features.get("gradient"), series.features[RAW_GRADIENT]
        plain = named is not None and np.array_equal(named, raw)
        return lagged("gradient" if plain else RAW_GRADIENT, settings.lags)
    return tuple(Variable(*split_lag(feature)) for feature in settings.features) or None


def record_run(folder: Path, settings: RecordSettings, *, show_progress: bool = True) -> Table:
    """Records the latest weights of a run on tasks that its meta-training never drew.

    Args:
        folder: of the run.
        settings: what is recorded.
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
    key = stream("record", settings.seed)
    series, dropped = record_series(inner, theta, key, settings, show_progress=show_progress)
    table = make_table(
        series,
        columns_asked(settings, series),
        settings.target,
        settings.rows,
        padded=settings.padded,
        drop_dead=not settings.keep_dead,
        seed=settings.seed,
    )
    about = {
        **table.about,
        "run": folder.name,
        "runs": series.shape[0],
        "steps": settings.steps,
        "seed": settings.seed,
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

    run = OverDevices(one, (inner.tasks, inner.learned, theta), batch)
    for first in itertools.count(0, batch):
        numbers = jnp.arange(first, first + batch, dtype=jnp.uint32)
        yield run(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))


def _count_rows(part: Series, settings: RecordSettings) -> int:
    """Returns how many rows a recording has, having checked that it has what is asked for."""
    columns = columns_asked(settings, part) or (Variable(RAW_GRADIENT),)
    check_columns(part, columns)
    if settings.target is not None:
        check_output(part, settings.target)
    usable = usable_rows(part, columns, settings.padded, drop_dead=not settings.keep_dead)
    return int(usable.sum())
