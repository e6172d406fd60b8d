"""The commands that meta-train: `lopt train` and `lopt tune`."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lopt.experiment.evaluation.contestants import evaluate_run
from lopt.experiment.report import tell
from lopt.experiment.runs import distributed, files, seeds
from lopt.experiment.runs.cluster import connected, here
from lopt.experiment.runs.environment import PATIENCE, asked_to_stop, stoppable
from lopt.experiment.runs.fleets import Here, RayFleet
from lopt.experiment.runs.run import SEEDS, Run, holds_run, surroundings
from lopt.experiment.runs.settings import TrainSettings
from lopt.experiment.runs.train import AbstractEngine, train
from lopt.experiment.runs.workers import Workers, mean_of, split
from lopt.experiment.settings import TuneSettings


def train_command(settings: TrainSettings) -> None:
    """Meta-trains a new run, or goes on with one, and evaluates it."""
    if settings.distributed or settings.coordinator is not None:
        with distributed.joined(settings.coordinator, settings.processes, settings.process):
            code = Path(f"{settings.recipe}")
            digest = files.digest(code) if code.suffix == ".py" and code.is_file() else ""
            alike = dataclasses.replace(settings, coordinator=None, process=None, processes=None)
            # With the devices of each, which may be any for workers.
            own = here() | surroundings() | {"recipe file": digest} | vars(alike)
            distributed.check_same(own)
            _finished(_shared(settings))
    elif settings.seeds > 1 or (settings.resume and (settings.resume / SEEDS).exists()):
        if settings.workers is not None:
            raise ValueError("--resume of several seeds takes no --workers; leave it out.")
        recipe, folder = f"{settings.recipe}", settings.resume
        if folder is not None:
            runs = [_resumed(run, settings) for run in seeds.open_all(folder, settings.trust)]
        else:
            folder = settings.run or _folder(recipe)
            given = settings.settings, settings.logger, settings.seeds
            runs = seeds.create(folder, recipe, *given)
        _finished(*runs, folder=folder)
    elif settings.workers:
        with connected(settings.workers, settings.ray) as ray:
            run = _run(settings)
            actors = RayFleet(ray, run, settings.workers)
            path = run.folder / "windows"
            tally = np.memmap(path, np.int64, "r+" if path.exists() else "w+", shape=(2, 2))
            _finished(run, engine=Workers(run.experiment, actors, settings.stale, tally))
    elif settings.workers == 0:
        run = _run(settings)
        if len(mean_of(run.experiment).shares()) == 1:
            return _finished(run)  # one program is as good
        with contextlib.closing(Here(run.experiment)) as threads:
            _finished(run, engine=Workers(run.experiment, threads))
    else:
        _finished(_run(settings))


def _resumed(run: Run, settings: TrainSettings) -> Run:
    """Returns a run that goes on, changed as far as it can be."""
    if settings.settings:
        run = run.lengthen(settings.settings)
    if settings.logger:
        run.add_loggers(settings.logger)
    for change in run.changes():
        tell(f"Note: {change}.")
    return run


def _run(settings: TrainSettings) -> Run:
    """Returns the run that settings ask for, which may be new."""
    if settings.resume is not None:
        return _resumed(Run(settings.resume, trust=settings.trust), settings)
    options: dict[str, Any] = {"loggers": settings.logger}
    if settings.workers is not None:
        count = settings.workers or 1
        options["check"] = lambda experiment: split(mean_of(experiment), count)
    recipe, fields = f"{settings.recipe}", settings.settings
    if settings.start is not None:
        recipe = "transfer"
        fields = (f"start={settings.start}", f"task={settings.task}", *fields)
    while True:
        folder = settings.run or _folder(recipe)
        try:
            return Run.create(folder, recipe, fields, **options)
        except FileExistsError:  # taken by a run that began at the same moment
            if settings.run or not holds_run(folder):
                raise


def _folder(name: str) -> Path:
    return files.free_folder(Path("runs") / Path(name).stem, holds_run)


def _shared(settings: TrainSettings) -> Run:
    """Returns the run that the first process has made or opened, in each of them."""
    first = distributed.together(lambda: _run(settings) if distributed.is_first() else None)
    folder = distributed.tell_each_other(f"{first.folder.resolve()}" if first else "")[0]
    # Of a recipe that the same command named here.
    trust = settings.trust or settings.resume is None
    run = distributed.together(lambda: first or Run(folder, trust=trust))
    distributed.together(lambda: run.experiment)
    return run


def tune_command(settings: TuneSettings) -> None:
    """Meta-trains a distilled rule on."""
    fields, folder = ("tensor_types=True", *settings.settings), settings.run or _folder("tune")
    start, task = settings.rule, settings.task
    train_command(TrainSettings(start=start, task=task, settings=fields, run=folder))


def _finished(*runs: Run, engine: AbstractEngine | None = None, folder: Path | None = None) -> None:
    """Meta-trains a run, or those of several seeds in a folder, and evaluates what comes of it."""
    run, folder = runs[0], folder or runs[0].folder
    found = run.experiment  # which may be refused
    if distributed.is_first():
        tell(f"Run {folder}")
    with stoppable(f"Continue with: lopt train --resume {folder}", PATIENCE):
        with asked_to_stop() as stop:
            if len(runs) > 1:
                seeds.train_seeds(runs, stop)
            else:
                train(run, engine=engine, stop=stop)
        distributed.leave()
        if distributed.is_first() and (found.evaluations or len(runs) > 1):
            evaluate_run(*runs).finish(folder, "report")
        elif distributed.is_first():
            tell(f"Trained; weights in {folder / 'weights.safetensors'}.")
