"""What is probed: the inner training of a recipe, or a task by name."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import lopt.tasks
from lopt.core.inner import InnerTraining
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Theta
from lopt.experiment.runs import storage
from lopt.experiment.runs.registry import build, recipe_names
from lopt.learned import LearnableAdam


def task_names() -> list[str]:
    """Returns the tasks that can be probed by name: those that need no data."""
    return sorted(_tasks())


def _tasks() -> dict[str, Callable[[], AbstractTaskFamily]]:
    found: dict[str, Any] = {"QuadraticFamily": lambda: lopt.tasks.QuadraticFamily(10)}
    for name in lopt.tasks.__all__:
        value = getattr(lopt.tasks, name)
        if inspect.isclass(value) and issubclass(value, AbstractTaskFamily):
            fields = inspect.signature(value).parameters.values()
            if all(field.default is not field.empty for field in fields):
                found[name] = value
    return found


def subject(
    name: str,
    settings: Sequence[str] = (),
    horizon: int | None = None,
    weights: Path | None = None,
    seed: int = 0,
    longest: int = 40,
) -> tuple[InnerTraining, Theta]:
    """Returns what is probed, and where.

    Args:
        name: a recipe, by name or file, or a task, which Adam with learned hyperparameters trains.
        settings: of the recipe, "field=value" each.
        horizon: inner steps per episode; by default the recipe's, at most `longest`.
        weights: a file of `lopt.save` or a run's folder; initial weights by default.
        seed: of the initial weights.
        longest: the longest default horizon, and that of tasks.

    Raises:
        FileNotFoundError: if there is no such recipe or task, or no such weights.
        ValueError: if a setting is wrong, or the weights do not fit.
    """
    tasks = _tasks()
    if name in tasks:
        if settings:
            raise ValueError(f"--set changes fields of recipes, and {name} is a task.")
        inner = InnerTraining(tasks[name](), LearnableAdam(0.01), longest)
    elif name in recipe_names() or name.endswith(".py"):
        found = build(name, settings).inner_training()
        if found is None:
            raise ValueError(f"The estimator of recipe {name} has no InnerTraining to probe.")
        inner = found
    else:
        raise FileNotFoundError(
            f"There is no recipe or task {name!r}; recipes are {', '.join(recipe_names())}, or "
            f"the path of a Python file (ending in .py); tasks are {', '.join(sorted(tasks))}."
        )
    length = min(longest, inner.horizon) if horizon is None else horizon
    inner = dataclasses.replace(inner, horizon=length)
    if weights is not None:
        return inner, storage.load(weights, inner.learned)[1]
    return inner, inner.learned.init(jax.random.key(seed))


def default_truncation(horizon: int) -> int:
    """Returns the largest divisor of the horizon that is at most a quarter of it."""
    return max((d for d in range(1, horizon // 4 + 1) if horizon % d == 0), default=1)
