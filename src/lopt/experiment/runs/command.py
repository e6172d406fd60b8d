"""The commands that meta-train: `lopt train` and `lopt tune`."""

from collections.abc import Sequence
from pathlib import Path

from lopt.experiment.evaluation.compare import evaluate
from lopt.experiment.report import tell
from lopt.experiment.runs.environment import stoppable
from lopt.experiment.runs.run import Run, holds_run
from lopt.experiment.runs.train import train
from lopt.experiment.settings import EvaluateSettings, TrainSettings, TuneSettings


def train_command(settings: TrainSettings) -> None:
    """Meta-trains a new run, or goes on with one, and evaluates it."""
    if settings.resume is not None:
        run = Run(settings.resume, trust=settings.trust)
        if settings.settings:
            run = run.lengthen(settings.settings)
        for change in run.changes():
            tell(f"Note: {change}.")
    elif settings.start is not None:
        run = _transfer(settings.start, str(settings.task), settings.settings, settings.run)
    else:
        run = _created(str(settings.recipe), settings.settings, settings.run)
    _finished(run)


def tune_command(settings: TuneSettings) -> None:
    """Meta-trains a distilled rule on."""
    fields = ("tensor_types=True", *settings.settings)
    _finished(_transfer(settings.rule, settings.task, fields, settings.run, "tune"))


def _finished(run: Run) -> None:
    tell(f"Run {run.folder}")
    with stoppable(f"Continue with: lopt train --resume {run.folder}"):
        train(run)
        if run.experiment.evaluations:
            evaluate(run, EvaluateSettings()).finish(run.folder, "report")
        else:
            tell(f"Trained; weights in {run.folder / 'weights.safetensors'}.")


def _transfer(
    start: Path, task: str, settings: Sequence[str], folder: Path | None, name: str = "transfer"
) -> Run:
    return _created("transfer", (f"start={start}", f"task={task}", *settings), folder, name)


def _created(recipe: str, settings: Sequence[str], folder: Path | None, name: str = "") -> Run:
    if folder is not None:
        return Run.create(folder, recipe, settings)
    base = Path("runs") / Path(name or recipe).stem
    for attempt in range(10):
        folder, number = base, 2
        while holds_run(folder):
            folder, number = base.with_name(f"{base.name}-{number}"), number + 1
        try:
            return Run.create(folder, recipe, settings)
        except FileExistsError:  # taken by a run that began at the same moment
            if attempt == 9:
                raise
    raise AssertionError
