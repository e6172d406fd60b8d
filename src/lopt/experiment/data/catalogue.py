"""What tasks by name cost: measured once, kept, listed, and drawn by.

Costs are kept as JSON with checksums under `cache_folder()/tasks`, for each machine, version of
lopt and set of data at hand.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from lopt.core.unroll import start, unroll
from lopt.experiment.data.datasets import data_loaded
from lopt.experiment.data.named_tasks import at_hand, is_task, named_task, nearest_task, task_names
from lopt.experiment.report import Report, stages
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.files import one_line, read_json, write_json
from lopt.experiment.settings import ShowTaskSettings, TasksSettings
from lopt.tasks.taskset import FAMILIES, parse, sample, to_json
from lopt.tasks.taskset.config import known

STEPS, CALLS, ENOUGH = 5, 7, 2.0  # steps of a program, its calls, and seconds after which no more


@dataclasses.dataclass(frozen=True)
class Cost:
    """What is measured of a task, or why it cannot be built."""

    params: int | None = None  # how many numbers are trained
    step_time: float | None = None  # milliseconds of a step of SGD, the median
    initial_loss: float | None = None  # the mean over some batches
    data: tuple[dict[str, Any], ...] = ()  # what `data_loaded` tells of
    error: str = ""  # why there is none of these


def measure(name: str) -> Cost:
    """Builds a task, and takes compiled steps of SGD at rate zero."""
    keys, still = jax.random.split(jax.random.key(0), 3), optax.sgd(0.0)
    with data_loaded() as data:
        try:
            task = named_task(name).draw(keys[0])
            params = task.init(keys[1])
            state, losses = unroll(task, still, start(task, still, params, keys[2]), STEPS)
        except Exception as error:
            return Cost(data=tuple(data), error=one_line(error))
    jax.block_until_ready(losses)
    times: list[float] = []
    while len(times) < CALLS and sum(times) < ENOUGH:
        begun = time.perf_counter()
        jax.block_until_ready(unroll(task, still, state, STEPS))
        times.append(time.perf_counter() - begun)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    step_time = 1000 * float(np.median(times)) / STEPS
    return Cost(size, step_time, float(np.mean(losses)), tuple(data))


def _path(name: str) -> Path:
    machine = platform.node(), os.cpu_count(), jax.devices()[0].device_kind
    where = *machine, version("lopt"), jax.__version__, at_hand()
    key = hashlib.sha256(json.dumps(where).encode()).hexdigest()
    return cache_folder() / "tasks" / key[:16] / f"{name}.json"


def known_cost(name: str) -> Cost | None:
    """Returns the cost of a task if it is kept."""
    try:
        kept = read_json(_path(name), sealed=True)
        return Cost(**{**kept, "data": tuple(kept["data"])})
    except (OSError, ValueError, TypeError, KeyError):  # not there, damaged, or of another form
        return None


def cost(name: str) -> Cost:
    """Returns the cost of a task, which is measured if it is not kept yet."""
    if not is_task(name):
        raise ValueError(f"There is no task {name!r}; try {nearest_task(name)!r}.")
    found = known_cost(name)
    if found is None:
        found = measure(name)
        # What is missing may be installed.
        if not found.error:
            write_json(_path(name), dataclasses.asdict(found), sealed=True)
    return found


def draw_tasks(
    count: int, budget: float, seed: int = 0, families: Sequence[str] = ()
) -> tuple[str, ...]:
    """Draws names of tasks of TaskSet, families in turn, whose steps take at most `budget` ms here.

    Keep the names, rather than the seed, of what is to be done again. Of twenty times as many tasks
    enough have to be as fast. All families are drawn from by default.
    """
    names = [known("family", name, FAMILIES) for name in families or FAMILIES]
    generator, found = np.random.default_rng(seed), list[str]()
    for attempt in range(20 * count):
        if len(found) == count:
            break
        name = f"{names[attempt % len(names)]}_seed{generator.integers(2**31)}"
        one = cost(name)
        if one.step_time is not None and one.step_time <= budget and name not in found:
            found.append(name)
    if len(found) < count:
        raise ValueError(
            f"draw_tasks(count={count}, budget={budget}) found {len(found)} tasks whose steps take "
            f"at most {budget} ms; try budget={10 * budget}."
        )
    return tuple(found)


def list_tasks(settings: TasksSettings) -> Report:
    """Returns tasks by name that match, and what is known of their costs."""
    for family in settings.family:
        known("family", family, FAMILIES)
    table, limit = task_names(), settings.max_step_time
    seeds = [f"{one}_seed{n}" for one in settings.family for n in range(settings.count)]
    names = seeds or [*table, *(f"{one}_seed0" for one in FAMILIES)]
    names = fnmatch.filter(names, settings.pattern or "*")
    here = ("", *at_hand())
    there = {name for name in names if table.get(name, ("",))[0] in here}
    rows = []
    with stages("measuring", len(names) if limit else 0) as announce:
        for name in names:
            if limit:
                announce(name)
            found = (cost if limit and name in there else known_cost)(name) or Cost()
            if limit and not (found.step_time is not None and found.step_time <= limit):
                continue
            rows.append(
                {
                    "task": name,
                    "params": found.params,
                    "ms per step": found.step_time,
                    "initial loss": found.initial_loss,
                    "data": "at hand" if name in there else "to be downloaded",
                }
            )
    report = Report("Tasks by name")
    report.table(f"{len(rows)} tasks", rows)
    report.text("" if rows else "There is no such task.")
    report.text(
        "Of TaskSet there is a task for each seed: see lopt tasks --family mlp_family. Families "
        f"are {', '.join(FAMILIES)}. Costs are shown once they are measured: by lopt tasks show "
        "NAME, or with --max-step-time."
    )
    return report


def show_task(settings: ShowTaskSettings) -> Report:
    """Returns what there is to say of one task."""
    name = settings.name
    found = cost(name)
    report = Report(f"The task {name}")
    if name in task_names():
        task = named_task(name) if not found.error else None
        report.text(str(task), code=True)
    else:
        report.text(json.dumps(to_json(sample(*parse(name))), indent=2), code=True)
    if found.error:
        report.text(f"It cannot be built: {found.error}")
        return report
    loss, step = found.initial_loss, found.step_time
    report.table("Measured", [{"params": found.params, "ms per step": step, "initial loss": loss}])
    for one in found.data:
        name, other = one["name"], one.get("instead_of")
        rest = ", ".join(f"{k} {v}" for k, v in one.items() if k in ("size", "tokens", "length"))
        report.text(f"Data: {name} ({rest}){f', in place of {other}' if other else ''}.")
    return report
