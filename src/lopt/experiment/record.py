"""Recording a trained run: fresh tasks of its own inner training, and the table cut from them."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt.core.checks import check_length
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.devices import num_devices, round_up
from lopt.core.inner import InnerTraining
from lopt.core.types import Theta
from lopt.experiment.data.tables import check_path, save_table
from lopt.experiment.report import progress, tell
from lopt.experiment.runs.files import check_writable
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import RecordSettings, split_lag
from lopt.experiment.trainings import OverDevices, stream
from lopt.learned import MomentFeatures, with_features
from lopt.symbolic import series
from lopt.symbolic.expression import Variable
from lopt.symbolic.record import RAW_GRADIENT, Recorded, record_episode
from lopt.symbolic.table import Table

# Of neighbouring rows, which are nearly the same, a table takes one of so many.
SPACING = 10


def record(run: Run, settings: RecordSettings) -> None:
    """Records a run, and writes the table to a file that is not there yet."""
    path = run.folder / "table.npz" if settings.output is None else settings.output
    check_path(path)
    check_writable(path)
    if path.exists():
        raise FileExistsError(f"{path} already exists; give another file with --output.")
    began = time.perf_counter()
    table = record_run(run, settings)
    save_table(path, table)
    about, dropped = table.about, table.about["diverged_runs"]
    left_out = f" {dropped} runs became not finite and were left out." * (dropped > 0)
    tell(
        f"Wrote {path}: {len(table)} rows, {len(table.columns)} columns, output {about['output']}, "
        f"from {about['runs']} runs of {settings.steps} steps on {len(set(table.task.tolist()))} "
        f"tasks, in {time.perf_counter() - began:.0f} s.{left_out}"
    )


def with_columns(run: Run, settings: RecordSettings) -> tuple[InnerTraining, Theta]:
    """Returns the inner training and the weights of a run, with further features to record."""
    learned, theta = run.learned, run.theta
    if settings.also or settings.decays:
        if not isinstance(learned, Coordinatewise):
            raise ValueError(
                f"{run.folder} trained {type(learned).__name__}: only of a lopt.Coordinatewise "
                "can other features than its own be recorded."
            )
        more = MomentFeatures(settings.also) if settings.also else None
        learned, theta = with_features(learned, theta, more, settings.decays)
    return dataclasses.replace(run.inner, learned=learned), theta


def record_run(run: Run, settings: RecordSettings) -> Table:
    """Records the latest weights of a run on tasks that its meta-training never drew.

    Trainings are recorded until the table can take one of ten of their rows.
    """
    inner, theta = with_columns(run, settings)
    steps, wanted = settings.steps, settings.rows * SPACING
    check_length(f"lopt record --steps {steps}", steps, inner.learned.max_steps)
    parts: list[Recorded] = []
    found, count = 0, 0
    with progress("recording rows", wanted) as at:
        for part in _recordings(inner, theta, settings):
            parts.append(part)
            some = series.to_series([part])
            stayed = some.finite()
            count, found = count + len(stayed), found + _num_rows(some.take(stayed), settings)
            if not found:
                raise ValueError(
                    f"No row of {count} recorded runs of {steps} steps can be used: "
                    f"{stayed.sum()} of them stayed finite, and those have no coordinate with a "
                    "gradient, or are no longer than the lags; try more steps or fewer."
                )
            at(min(found, wanted), f"{count} runs")
            if found >= wanted:
                break
    every = series.to_series(parts)
    stayed = every.finite()
    every = every.take(stayed)
    columns, target, rows = _columns(settings, every), settings.target, settings.rows
    options: Any = {"padded": settings.padded, "seed": settings.seed}
    table = series.make_table(every, columns, target, rows, **options)
    about = {"run": run.name, "runs": int(stayed.sum()), "steps": steps, "seed": settings.seed}
    about["diverged_runs"] = int((~stayed).sum())
    return dataclasses.replace(table, about={**table.about, **about})


def _recordings(inner: InnerTraining, theta: Theta, settings: RecordSettings) -> Iterator[Recorded]:
    """Yields recorded runs, some at once, without an end; compiled once."""
    batch, key = round_up(settings.at_once, num_devices()), stream("record", settings.seed)

    def one(shared: Any, number: Any) -> Recorded:
        tasks, learned, theta = shared
        own = jax.random.fold_in(key, number)
        return record_episode(tasks, learned, theta, own, settings.steps, settings.per_tensor)

    run = OverDevices(one, (inner.tasks, inner.learned, theta), batch)
    for first in itertools.count(0, batch):
        yield run(jnp.arange(first, first + batch, dtype=jnp.uint32))


def _columns(settings: RecordSettings, part: series.Series) -> tuple[Variable, ...] | None:
    """Returns the columns of the table; None for all that the rule gets."""
    if settings.lags is None:
        return tuple(Variable(*split_lag(feature)) for feature in settings.features) or None
    # Rules that get the gradient as it is know it by its name.
    named, raw = part.features.get("gradient"), part.features[RAW_GRADIENT]
    plain = named is not None and np.array_equal(named, raw)
    return series.lagged("gradient" if plain else RAW_GRADIENT, settings.lags)


def _num_rows(part: series.Series, settings: RecordSettings) -> int:
    """Returns how many rows a recording has, having checked that it has what is asked for."""
    columns = _columns(settings, part) or (Variable(RAW_GRADIENT),)
    series.check_columns(part, columns)
    if settings.target is not None:
        series.check_output(part, settings.target)
    return int(series.usable_rows(part, columns, settings.padded).sum())
