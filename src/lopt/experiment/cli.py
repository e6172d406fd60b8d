"""The command line. JAX is imported by the commands, not by their help."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from lopt.experiment.experiment import Experiment

app = tyro.extras.SubcommandApp()
probe = tyro.extras.SubcommandApp()
app.command(probe, name="probe", help="Measure what happens inside of meta-training.")


@app.command
def train(
    recipe: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(name="set", metavar="FIELD=VALUE"),
    ] = (),
    run: Path | None = None,
    resume: Path | None = None,
) -> None:
    """Meta-train an optimizer, then evaluate it.

    Args:
        recipe: the name of a recipe, such as digits, or a Python file that defines one.
        settings: change a field of the recipe; may be repeated.
        run: the folder of the new run; runs/RECIPE, numbered if need be, by default.
        resume: the folder of a run to continue, instead of a recipe.
    """
    if (recipe is None) == (resume is None):
        raise ValueError("lopt train takes a recipe, or --resume RUN: one of the two.")
    if resume is not None and (settings or run is not None):
        raise ValueError("lopt train --resume RUN takes no --set and no --run: the run has both.")
    _prepare_jax()
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
    _prepare_jax()
    from lopt.experiment.train import reopen

    _evaluate(reopen(run), run, Console())


@probe.command
def estimators(
    name: tyro.conf.Positional[str],
    *,
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(name="set", metavar="FIELD=VALUE"),
    ] = (),
    horizon: int | None = None,
    truncation: int | None = None,
    particles: int = 8,
    sigma: float = 0.01,
    directions: int = 1,
    samples: int = 64,
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seed: int = 0,
    weights: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure bias, noise and cost of every estimator, and draw slices of the meta-loss.

    Args:
        name: a recipe, by name or as a Python file, or a task such as Rosenbrock.
        settings: change a field of the recipe; may be repeated.
        horizon: inner steps per episode; the recipe's, but at most 40, by default.
        truncation: inner steps per window; divides the horizon, a quarter of it by default.
        particles: pairs of episodes that variances are given for; even.
        sigma: perturbation of theta.
        directions: random directions of forward mode, for more than 8 weights.
        samples: pairs of episodes that each estimator is measured on.
        only: an estimator to measure, or how its name begins; may be repeated; all by default.
        seed: of everything random.
        weights: a file of weights or a run's folder; initial weights by default.
        out: the folder of the results; probes/NAME, numbered if need be, by default.
    """
    folder = out if out is not None else _unused_probe(name)
    if out is not None and any((out / file).exists() for file in _PROBE_FILES):
        raise FileExistsError(f"{out} already holds a probe; give another folder with --out.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed} must be between 0 and {2**32 - 1}.")
    _prepare_jax()
    import jax

    from lopt.experiment.probe import ProbeSettings, probe_estimators
    from lopt.experiment.probe_report import write_probe
    from lopt.experiment.probe_slices import loss_slices
    from lopt.experiment.probe_subject import default_truncation, subject

    began = time.perf_counter()
    inner, theta = subject(name, settings, horizon, weights, seed)
    horizon = inner.horizon
    truncation = default_truncation(horizon) if truncation is None else truncation
    chosen = ProbeSettings(truncation, sigma, particles, directions, samples)
    lengths = (truncation, horizon, 3 * horizon)
    key, slices_key = jax.random.split(jax.random.key(seed))
    console = Console()
    with console.status("tracing") as status:
        result = probe_estimators(inner, theta, key, chosen, only, status.update)
        status.update("slices of the meta-loss")
        slices = loss_slices(inner, theta, slices_key, lengths)
    said = {
        "name": name,
        "set": list(settings),
        "horizon": horizon,
        "seed": seed,
        "weights": None if weights is None else str(weights),
        **dataclasses.asdict(chosen),
        "devices": len(jax.local_devices()),
        "platform": jax.default_backend(),
        "seconds": time.perf_counter() - began,
    }
    write_probe(result, slices, said, folder, console)
    console.print(f"Wrote {', '.join(_PROBE_FILES)} in {folder}.", highlight=False)


_PROBE_FILES = ("probe.json", "probe.png")


def _unused_probe(name: str) -> Path:
    base = Path("probes") / Path(name).stem
    folder, number = base, 2
    while any((folder / file).exists() for file in _PROBE_FILES):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _evaluate(experiment: "Experiment", folder: Path, console: Console) -> None:
    import jax
    from rich.progress import track

    from lopt.experiment.evaluate import compare
    from lopt.experiment.report import write_report
    from lopt.experiment.storage import load

    learned, theta = load(folder, experiment.learned)
    if not experiment.evaluations:
        console.print(f"Trained; weights in {folder / 'weights.safetensors'}.", highlight=False)
        return
    # Far from the keys of meta-training: these initialisations and batches were never seen.
    key = jax.random.fold_in(jax.random.key(experiment.seed), 2**32 - 1)
    comparisons = [
        compare(evaluation, learned, theta, jax.random.fold_in(key, i))
        for i, evaluation in enumerate(
            track(experiment.evaluations, "evaluating", transient=True, console=console)
        )
    ]
    write_report(experiment, comparisons, folder, console)
    names = ("report.json", "curves.png", "meta_training.png", "weights.safetensors")
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False)


def _unused_folder(recipe: str) -> Path:
    from lopt.experiment.train import holds_run

    base = Path("runs") / Path(recipe).stem
    folder, number = base, 2
    while holds_run(folder):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _prepare_jax() -> None:
    # A program that asks for a GPU it does not have should say so itself, not through a warning.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from lopt.experiment.cache import use_all_cores, use_compilation_cache

    use_compilation_cache()
    use_all_cores()


def main() -> None:
    """Runs the command line; what a user can mend is said in one line, with exit status 2."""
    try:
        app.cli(prog="lopt", description=_ABOUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        Console(stderr=True).print(Text(f"lopt: {error}", style="red"), soft_wrap=True)
        sys.exit(2)


_ABOUT = """Learned optimizers: meta-train, evaluate, use.

LOPT_DATA_DIR: a folder with mnist/ and fashion_mnist/ in the official file formats.
LOPT_CACHE_DIR: where downloads and compiled programs are kept.
LOPT_TRACEBACK=1: errors with their full traceback."""


if __name__ == "__main__":
    main()
