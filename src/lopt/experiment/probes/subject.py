"""What is probed: a run, or the inner training of a recipe, a run or a task by name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from lopt.core.checks import check_length
from lopt.core.inner import InnerTraining
from lopt.core.types import Theta
from lopt.experiment import settings as s
from lopt.experiment.baselines import Tuned
from lopt.experiment.data.named_tasks import is_task, named_task, nearest_task
from lopt.experiment.report import Cell
from lopt.experiment.runs import storage
from lopt.experiment.runs.registry import build, recipe_names
from lopt.experiment.runs.run import Run
from lopt.learned import LearnableAdam

LONGEST = 500  # default number of steps
Subject = tuple[InnerTraining, Theta]
# The baselines beside which runs are watched.
REFERENCES = ("SGD", "momentum", "Adam", "Lion")


def num_steps(run: Run, settings: s.DynamicsSettings | s.SymmetrySettings, least: int) -> int:
    """Returns how many steps a run's optimizer is watched for."""
    steps = settings.steps or max(least, min(run.inner.horizon, LONGEST))
    check_length(f"lopt probe --steps {steps}", steps, run.learned.max_steps)
    return steps


def rate_cells(tuned: Mapping[str, Tuned], name: str) -> dict[str, Cell]:
    """Returns an optimizer's tuned rate, and whether it is at the edge of its grid."""
    own = tuned.get(name)
    return {"rate": own.values[0] if own else None, "edge": own.at_edge if own else None}


def subject(name: str, settings: s.ProbeSettings | s.HorizonSettings, longest: int = 40) -> Subject:
    """Returns what is probed, and at which theta: a recipe, by name or file, a run, or a task.

    Adam with learned hyperparameters trains tasks. Horizons are at most the longest by default.
    """
    run = None
    if is_task(name):
        inner = InnerTraining(named_task(name), LearnableAdam(0.01), longest)
    elif name.replace("-", "_") in recipe_names() or name.endswith(".py"):
        inner = build(name, settings.settings).inner_training()
    elif Path(name).is_dir():
        run = Run(Path(name))
        inner = run.inner
    else:
        raise FileNotFoundError(
            f"There is no recipe or task {name!r}, nor a run; the nearest task is "
            f"{nearest_task(name)} (lopt tasks lists them), recipes are "
            f"{', '.join(recipe_names())}, or the path of a Python file (ending in .py)."
        )
    if settings.settings and (run or is_task(name)):
        kind = "run" if run else "task"
        raise ValueError(f"--set changes fields of recipes, and {name} is a {kind}.")
    inner = dataclasses.replace(inner, horizon=settings.horizon or min(longest, inner.horizon))
    if settings.weights is not None:
        return inner, storage.load(settings.weights, inner.learned)[1]
    return inner, run.theta if run else inner.learned.init(jax.random.key(settings.seed))
