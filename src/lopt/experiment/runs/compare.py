"""`lopt compare`: designs of learned optimizers, meta-trained alike, side by side.

Each design and seed is a run of its own, so that a comparison goes on where it was stopped.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lopt.experiment.report import Report, curves, measured, stages
from lopt.experiment.runs.registry import make, parsed
from lopt.experiment.runs.run import Run, holds_run
from lopt.experiment.runs.train import train
from lopt.experiment.settings import CompareSettings
from lopt.experiment.trainings import bytes_per_param

# The share of outer steps whose mean is the final outer loss.
END = 0.1


def compare_designs(folder: Path, settings: CompareSettings) -> Report:
    """Meta-trains designs on the tasks of a recipe, each from so many seeds."""
    # All are made first, so that what is refused is refused before anything is trained.
    runs = {
        (design, seed): _run(
            folder / f"{design}-{seed}",
            settings.recipe,
            (*settings.settings, f"optimizer={design}", f"seed={seed}"),
        )
        for seed in range(settings.seeds)
        for design in settings.designs
    }
    with stages("comparing", len(runs)) as announce:
        for (design, seed), run in runs.items():
            announce(f"{design}, seed {seed}")
            train(run, show_progress=False)
    every = [[runs[design, seed] for seed in range(settings.seeds)] for design in settings.designs]
    losses = {
        name: np.stack([run.log["meta_loss"] for run in some])
        for name, some in zip(settings.designs, every, strict=True)
    }
    rows = []
    for (name, found), some in zip(losses.items(), every, strict=True):
        last = max(1, round(END * found.shape[1]))
        seconds, theta = [run.log["seconds"] for run in some], some[0].theta
        learned, inner = some[0].learned, some[0].inner
        row = {"design": name, "weights": sum(leaf.size for leaf in jax.tree.leaves(theta))}
        size = bytes_per_param(inner.tasks, partial(learned.optimizer, theta, inner.horizon))
        row["state bytes per parameter"] = size
        row["outer loss at first"] = measured(found[:, :last].mean(axis=1))
        row["outer loss at the end"] = measured(found[:, -last:].mean(axis=1))
        rows.append(row | {"ms per outer step": 1e3 * float(np.median(seconds))})
    report = Report(f"Designs on {settings.recipe}", vars(settings))
    report.table(f"Meta-training of {settings.seeds} seeds each", rows)
    style: Any = {"smooth": max(1, found.shape[1] // 50), "xlabel": "outer step"}
    # A few diverged episodes would hide all others.
    most = 10 * float(np.nanmedian(np.stack(list(losses.values()))))
    shown = {"": {name: np.minimum(values, most) for name, values in losses.items()}}
    caption = f"Outer losses, mean and standard error over seeds; what is above {most:.3g} is cut."
    report.add(curves("designs", shown, caption, ylabel="outer loss, running mean", **style))
    return report


def _run(folder: Path, recipe: str, settings: Sequence[str]) -> Run:
    """Returns a new run, or the one that is there already with the same settings."""
    if not holds_run(folder):
        return Run.create(folder, recipe, settings)
    run, made = Run(folder), make(recipe, parsed(settings))[0]
    if run.config["settings"] != json.loads(json.dumps(vars(made), default=str)):
        raise ValueError(f"{folder} holds a run with other settings; give another with --out.")
    return run
