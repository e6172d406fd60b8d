"""The command line. JAX is imported by the commands, not by their help."""

import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from lopt.experiment.cli_horizon import horizon
from lopt.experiment.cli_options import finish, options, say
from lopt.experiment.cli_probe import probe
from lopt.experiment.runs.environment import prepare_jax
from lopt.experiment.runs.files import check_writable
from lopt.experiment.settings import DistillSettings, Fields, RecordSettings

if TYPE_CHECKING:
    from lopt.experiment.runs.experiment import Experiment

app = tyro.extras.SubcommandApp()
app.command(probe, name="probe", help="Measure what happens inside of meta-training.")
app.command(horizon, name="horizon", help="See what short horizons do to hyperparameters.")


@app.command
def train(
    recipe: Annotated[str | None, Positional] = None,
    *,
    settings: Fields = (),
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
    rule: Positional[Path],
    *,
    task: str = "digits_conv",
    settings: Fields = (),
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
    from lopt.experiment.runs.train import create, reopen
    from lopt.experiment.runs.train import train as meta_train

    if resume is not None:
        folder, experiment = resume, reopen(resume)
    else:
        for attempt in range(10):
            folder = run if run is not None else _unused_folder(str(recipe))
            try:
                experiment = create(folder, str(recipe), settings)
                break
            except FileExistsError:  # by a run that began at the same moment
                if run is not None or attempt == 9:
                    raise
    say(f"Run {folder}")
    try:
        meta_train(experiment, folder)
        _evaluate(experiment, folder)
    except KeyboardInterrupt:
        say(f"Stopped. Continue with: lopt train --resume {folder}")
        raise


@app.command
def recipes() -> None:
    """List the recipes that come with lopt."""
    from lopt.experiment.runs.registry import recipe_names

    for name in recipe_names():
        print(name)


@app.command
def evaluate(run: Positional[Path]) -> None:
    """Evaluate a run's latest weights against tuned SGD, momentum and Adam.

    Args:
        run: the folder of a run.
    """
    prepare_jax()
    from lopt.experiment.runs.train import reopen

    _evaluate(reopen(run), run)


def _evaluate(experiment: "Experiment", folder: Path) -> None:
    import jax

    from lopt.experiment.evaluation.compare import compare, evaluation_report
    from lopt.experiment.report import stages
    from lopt.experiment.runs.storage import load
    from lopt.experiment.trainings import stream

    learned, theta = load(folder, experiment.learned)
    before = None if experiment.initial is None else {"before": (learned, experiment.initial)}
    if not experiment.evaluations:
        say(f"Trained; weights in {folder / 'weights.safetensors'}.")
        return
    key = stream("evaluation", experiment.seed)
    comparisons = []
    with stages("evaluating", len(experiment.evaluations)) as announce:
        for i, evaluation in enumerate(experiment.evaluations):
            announce(evaluation.name)
            own = jax.random.fold_in(key, i)
            comparisons.append(compare(evaluation, learned, theta, own, before))
    finish(evaluation_report(experiment, comparisons, folder), folder, "report")


@app.command
@options(RecordSettings)
def record(
    run: Positional[Path],
    *,
    settings: RecordSettings,
    output: Path | None = None,
) -> None:
    """Record what a run's optimizer sees and does, as a table for symbolic regression.

    Args:
        run: the folder of a run.
        output: the file, ending in .npz or .npy; RUN/table.npz by default.
    """
    from lopt.experiment.data.tables import check_path, save_table

    path = run / "table.npz" if output is None else output
    check_path(path)
    check_writable(path)
    if path.exists():
        raise FileExistsError(f"{path} already exists; give another file with --output.")
    prepare_jax()
    from lopt.experiment.record import record_run
    from lopt.experiment.runs.run import Run

    began = time.perf_counter()
    table = record_run(Run(run), settings)
    save_table(path, table)
    about = table.about
    say(
        f"Wrote {path}: {len(table)} rows, {len(table.columns)} columns, output "
        f"{about['output']}, from {about['runs']} runs of {settings.steps} steps on "
        f"{len(set(table.task.tolist()))} tasks, in {time.perf_counter() - began:.0f} s."
    )
    if about["diverged_runs"]:
        say(f"{about['diverged_runs']} runs became not finite and were left out.")


@app.command
@options(DistillSettings)
def distill(
    run: Annotated[Path | None, Positional] = None,
    *,
    settings: DistillSettings,
    out: Path | None = None,
    sanity: bool = False,
) -> None:
    """Distil a run's optimizer into a short equation, score it, and train with it.

    Killed and started again, it goes on with what it has recorded and found.

    Args:
        run: the folder of a run.
        out: the folder of the results; RUN/distilled by default.
        sanity: distil known optimizers from 20 raw gradients instead of a run.
    """
    if (run is None) != sanity:
        raise ValueError("lopt distill takes a run, or --sanity: one of the two.")
    prepare_jax()
    if run is None:
        from lopt.experiment.distill_report import sanity_table

        sanity_table(settings.seed).print(Console())
        return
    from lopt.experiment.distill import distill_run
    from lopt.experiment.runs.run import Run

    folder = run / "distilled" if out is None else out
    finish(distill_run(Run(run), folder, settings), folder, "report")


def _unused_folder(recipe: str) -> Path:
    from lopt.experiment.runs.train import holds_run

    base = Path("runs") / Path(recipe).stem
    folder, number = base, 2
    while holds_run(folder):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _describe(recipe: str) -> None:
    """Prints the fields of a recipe."""
    from lopt.experiment.report import Table
    from lopt.experiment.runs.registry import fields_of

    title = f"lopt train {recipe}: fields, as in --set FIELD=VALUE"
    Table(title, fields_of(recipe)).print(Console())


def main() -> None:
    """Runs the command line; what a user can mend is said in one line, with exit status 2."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"lopt {version('lopt')}")
        return
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), _interrupt)
    try:
        if arguments[:1] == ["train"] and {"-h", "--help"} & {*arguments[2:]}:
            _describe(arguments[1])
        else:
            app.cli(prog="lopt", description=_ABOUT)
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        Console(stderr=True).print(Text(f"lopt: {error}", style="red"), soft_wrap=True)
        sys.exit(2)


def _interrupt(number: int, frame: object) -> None:
    """Ends a command as Ctrl-C does."""
    raise KeyboardInterrupt(number)


_ABOUT = """Learned optimizers: meta-train, evaluate, use.

LOPT_DATA_DIR: a folder with mnist/, fashion_mnist/, cifar10/ in the official file formats.
LOPT_CACHE_DIR: where downloads and compiled programs are kept.
LOPT_TRACEBACK=1: errors with their full traceback."""


if __name__ == "__main__":
    main()
