"""The command `lopt horizon`. JAX is imported by the commands, not by their help."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from lopt.experiment.cache import prepare_jax

horizon = tyro.extras.SubcommandApp()

Horizons = Annotated[tuple[int, ...], tyro.conf.arg(metavar="STEPS ...")]


@horizon.command
def quadratic(*, out: Path = Path("horizon/quadratic")) -> None:
    """Solve the noisy quadratic: greedy, fixed and optimised schedules, against the published.

    Args:
        out: the folder of the results.
    """
    prepare_jax()
    from lopt.experiment.horizon_quadratic import quadratic_report

    _finish(quadratic_report(), out, "quadratic")


@horizon.command
def surface(
    *,
    dataset: str = "digits",
    horizons: Horizons = (10, 100, 1000),
    points: int = 400,
    sample: str = "grid",
    time_constant: float | None = None,
    batches: int = 20,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Map the loss after each horizon over learning rate and decay, on a real network.

    Args:
        dataset: digits, mnist, fashion_mnist or cifar10.
        horizons: inner steps, increasing.
        points: pairs of learning rate and power of the decay; a square number for a grid.
        sample: grid or random.
        time_constant: of the decay, in inner steps; a quarter of the longest horizon by default.
        batches: training batches that each loss is averaged over.
        seed: of everything random.
        out: the folder of the study; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.horizon_offline import SurfaceSettings, compute_surface
    from lopt.experiment.horizon_report import check_study, show_surface

    constant = max(horizons, default=4) / 4 if time_constant is None else time_constant
    settings = SurfaceSettings(dataset, horizons, points, sample, constant, batches, seed)
    folder = _study(out, dataset)
    check_study(folder, dataset, constant)
    computed = compute_surface(settings, folder)
    console = Console()
    show_surface(computed, folder, console)
    console.print(f"Wrote surface.json and surface.png in {folder}.", highlight=False)


@horizon.command
def smd(
    *,
    dataset: str = "digits",
    horizons: Horizons = (10, 100),
    learning_rate: tuple[float, ...] = (0.01,),
    power: tuple[float, ...] = (0.1, 10.0),
    time_constant: float | None = None,
    num_meta_steps: int = 200,
    meta_learning_rate: float = 0.05,
    particles: int = 1,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Descend on learning rate and decay by the gradient of the loss after each horizon.

    Every outer step begins again from the same weights. Killed, it goes on where it was.

    Args:
        dataset: digits, mnist, fashion_mnist or cifar10.
        horizons: inner steps, one descent for each.
        learning_rate: where descents begin.
        power: of the decay, where descents begin; all pairs are tried.
        time_constant: of the decay, in inner steps; that of the folder's surface, or a quarter of
            the longest horizon, by default.
        num_meta_steps: outer steps of each descent.
        meta_learning_rate: of the outer Adam, per unit of the logarithms.
        particles: runs per outer step, on minibatches of their own.
        seed: of everything random.
        out: the folder of the study; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.horizon_report import DescentSettings, descend_all

    settings = DescentSettings(
        dataset,
        horizons,
        learning_rate,
        power,
        time_constant,
        num_meta_steps,
        meta_learning_rate,
        particles,
        seed,
    )
    descend_all(_study(out, dataset), settings, Console())


@horizon.command
def best(
    *,
    dataset: str = "digits",
    steps: int | None = None,
    seeds: int = 3,
    out: Path | None = None,
) -> None:
    """Train to the end with what each horizon chose, from several initialisations.

    Args:
        dataset: digits, mnist, fashion_mnist or cifar10.
        steps: inner steps; the longest horizon of the surface by default.
        seeds: initialisations.
        out: the folder of the study, which holds a surface; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.horizon_report import best_report

    folder = _study(out, dataset)
    _finish(best_report(folder, dataset, steps, seeds), folder, "best")


@horizon.command
def online(
    *,
    dataset: str = "digits",
    steps: int = 5000,
    num_meta_steps: int = 10,
    steps_per_update: int = 100,
    look_ahead: int = 5,
    learning_rate: tuple[float, ...] = (0.001, 0.01, 0.1),
    seeds: int = 3,
    out: Path | None = None,
) -> None:
    """Tune the learning rate while training, by looking ahead, against a tuned schedule.

    Args:
        dataset: digits, mnist, fashion_mnist or cifar10.
        steps: of training.
        num_meta_steps: outer steps between two stretches of training.
        steps_per_update: inner steps of each stretch of training.
        look_ahead: inner steps.
        learning_rate: where runs begin.
        seeds: initialisations of each.
        out: the folder of the results; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.horizon_online import OnlineSettings, online_report

    settings = OnlineSettings(
        dataset, steps, num_meta_steps, steps_per_update, look_ahead, learning_rate, seeds
    )
    folder = _study(out, dataset)
    _finish(online_report(folder, settings), folder, "online")


def _finish(report: Any, folder: Path, name: str) -> None:
    console = Console()
    report.show(console)
    names = ", ".join(report.save(folder, name))
    console.print(f"Wrote {names} in {folder}.", highlight=False, markup=False)


def _study(out: Path | None, dataset: str) -> Path:
    return Path("horizon") / dataset if out is None else out
