"""The commands that meta-train: `lopt train` and `lopt tune`."""

from collections.abc import Sequence
from pathlib import Path

from lopt.experiment.evaluation.command import evaluate_run
from lopt.experiment.report import tell
from lopt.experiment.runs.environment import stoppable
from lopt.experiment.runs.files import free_folder
from lopt.experiment.runs.run import Run, holds_run
from lopt.experiment.runs.train import train
from lopt.experiment.settings import TrainSettings, TuneSettings

Words = Sequence[str]


def train_command(settings: TrainSettings) -> None:
    """Meta-trains a new run, or goes on with one, and evaluates it."""
    if settings.resume is not None:
        run = Run(settings.resume, trust=settings.trust)
        if settings.settings:
            run = run.lengthen(settings.settings)
        if settings.logger:
            run.add_loggers(settings.logger)
        for change in run.changes():
            tell(f"Note: {change}.")
    elif settings.start is not None:
        fields = (f"start={settings.start}", f"task={settings.task}", *settings.settings)
        run = _created("transfer", fields, settings.logger, settings.run)
    else:
        run = _created(str(settings.recipe), settings.settings, settings.logger, settings.run)
    _finished(run)


def tune_command(settings: TuneSettings) -> None:
    """Meta-trains a distilled rule on."""
    fields = (f"start={settings.rule}", f"task={settings.task}", "tensor_types=True")
    _finished(_created("transfer", (*fields, *settings.settings), (), settings.run, "tune"))


def _finished(run: Run) -> None:
    found = run.experiment  # which may be refused
    tell(f"Run {run.folder}")
    with stoppable(f"Continue with: lopt train --resume {run.folder}"):
        train(run)
        if found.evaluations:
            evaluate_run(run).finish(run.folder, "report")
        else:
            tell(f"Trained; weights in {run.folder / 'weights.safetensors'}.")


def _created(
    recipe: str, settings: Words, loggers: Words, folder: Path | None, name: str = ""
) -> Run:
    if folder is not None:
        return Run.create(folder, recipe, settings, loggers)
    while True:
        folder = free_folder(Path("runs") / Path(name or recipe).stem, holds_run)
        try:
            return Run.create(folder, recipe, settings, loggers)
        except FileExistsError:  # taken by a run that began at the same moment
            if not holds_run(folder):
                raise
