"""The command line. JAX is imported by the commands, not by their help."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.text import Text

from lopt.experiment.cache import prepare_jax
from lopt.experiment.cli_horizon import horizon
from lopt.experiment.cli_probe import probe
from lopt.experiment.cli_symbolic import distill, record

if TYPE_CHECKING:
    from lopt.experiment.experiment import Experiment

app = tyro.extras.SubcommandApp()
app.command(name="record", help="Record what a run's optimizer sees and does.")(record)
app.command(name="distill", help="Distil a run's optimizer into a short equation.")(distill)
app.command(probe, name="probe", help="Measure what happens inside of meta-training.")
app.command(horizon, name="horizon", help="See what short horizons do to hyperparameters.")


@app.command
def train(
    recipe: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(name="set", metavar="FIELD=VALUE"),
    ] = (),
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    task: str | None = None,
    run: Path | None = None,
    resume: Path | None = None,
) -> None:
    """Meta-train an optimizer, then evaluate it.

    Args:
        recipe: the name of a recipe, such as digits, or a Python file that defines one.
        settings: change a field of the recipe; may be repeated.
        start: train on what a run trained, on --task; instead of a recipe (it is then transfer).
        task: with --from, data set and network, such as digits_conv or fashion_mnist_mlp.
        run: the folder of the new run; runs/RECIPE, numbered if need be, by default.
        resume: the folder of a run to continue, instead of a recipe.
    """
    if sum(option is not None for option in (recipe, resume, start)) != 1:
        raise ValueError(
            "lopt train takes a recipe, or --from RUN --task NAME, or --resume RUN: one of them."
        )
    if resume is not None and (settings or run is not None):
        raise ValueError("lopt train --resume RUN takes no --set and no --run: the run has both.")
    if (task is None) != (start is None):
        raise ValueError("--from RUN and --task NAME go together; try --task digits_conv.")
    if start is not None:
        recipe, settings = "transfer", transfer_settings(start, str(task), settings)
    _train(recipe, settings, run, resume)


@app.command
def tune(
    rule: tyro.conf.Positional[Path],
    *,
    task: str = "digits_conv",
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(name="set", metavar="FIELD=VALUE"),
    ] = (),
    run: Path | None = None,
) -> None:
    """Meta-train the constants of a distilled rule, and a multiplier per type of tensor.

    It is `lopt train --from RULE` with the setting tensor_types=True: it resumes likewise, with
    lopt train --resume RUN.

    Args:
        rule: the folder that lopt distill wrote, or any weights of lopt.
        task: data set and network, such as digits_conv, digits_resnet or cifar10_resnet50.
        settings: change a field of the recipe transfer; may be repeated.
        run: the folder of the new run; runs/tune, numbered if need be, by default.
    """
    settings = transfer_settings(rule, task, ("tensor_types=True", *settings))
    _train("transfer", settings, _unused_folder("tune") if run is None else run, None)


def transfer_settings(start: Path, task: str, settings: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the settings of the recipe transfer."""
    return (f"start={start.resolve()}", f"task={task}", *settings)


def _train(
    recipe: str | None, settings: tuple[str, ...], run: Path | None, resume: Path | None
) -> None:
    prepare_jax()
    from lopt.experiment.train import create, reopen
    from lopt.experiment.train import train as meta_train

    if resume is not None:
        folder, experiment = resume, reopen(resume)
    else:
        folder = run if run is not None else _unused_folder(str(recipe))
        experiment = create(folder, str(recipe), settings)
    console = Console()
    console.print(f"Run {folder}", highlight=False)
    try:
        meta_train(experiment, folder)
    except KeyboardInterrupt:
        console.print(f"Stopped. Continue with: lopt train --resume {folder}", highlight=False)
        raise
    _evaluate(experiment, folder, console)


@app.command
def evaluate(run: tyro.conf.Positional[Path]) -> None:
    """Evaluate a run's latest weights against tuned SGD, momentum and Adam.

    Args:
        run: the folder of a run.
    """
    prepare_jax()
    from lopt.experiment.train import reopen

    _evaluate(reopen(run), run, Console())


def _evaluate(experiment: "Experiment", folder: Path, console: Console) -> None:
    import jax

    from lopt.experiment.evaluate import compare, evaluation_report
    from lopt.experiment.report import stages
    from lopt.experiment.storage import load
    from lopt.experiment.trainings import stream

    learned, theta = load(folder, experiment.learned)
    before = None if experiment.initial is None else {"before": (learned, experiment.initial)}
    if not experiment.evaluations:
        console.print(f"Trained; weights in {folder / 'weights.safetensors'}.", highlight=False)
        return
    key = stream("evaluation", experiment.seed)
    comparisons = []
    with stages("evaluating", len(experiment.evaluations)) as announce:
        for i, evaluation in enumerate(experiment.evaluations):
            announce(evaluation.name)
            own = jax.random.fold_in(key, i)
            comparisons.append(compare(evaluation, learned, theta, own, before))
    report = evaluation_report(experiment, comparisons, folder)
    report.show(console)
    names = [*report.save(folder), "weights.safetensors"]
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False, markup=False)


def _unused_folder(recipe: str) -> Path:
    from lopt.experiment.train import holds_run

    base = Path("runs") / Path(recipe).stem
    folder, number = base, 2
    while holds_run(folder):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def main() -> None:
    """Runs the command line; what a user can mend is said in one line, with exit status 2."""
    try:
        app.cli(prog="lopt", description=_ABOUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        Console(stderr=True).print(Text(f"lopt: {error}", style="red"), soft_wrap=True)
        sys.exit(2)


_ABOUT = """Learned optimizers: meta-train, evaluate, use.

LOPT_DATA_DIR: a folder with mnist/, fashion_mnist/, cifar10/ in the official file formats.
LOPT_CACHE_DIR: where downloads and compiled programs are kept.
LOPT_TRACEBACK=1: errors with their full traceback."""


if __name__ == "__main__":
    main()
