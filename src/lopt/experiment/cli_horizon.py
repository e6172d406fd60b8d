"""The command `lopt horizon`. JAX is imported by the commands, not by their help."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from lopt.experiment.cli_options import finish, options, say
from lopt.experiment.horizon_settings import DescentSettings, OnlineSettings, SurfaceSettings
from lopt.experiment.runs.environment import prepare_jax

horizon = tyro.extras.SubcommandApp()


@horizon.command
def quadratic(*, out: Path = Path("horizon/quadratic")) -> None:
    """Solve the noisy quadratic: greedy, fixed and optimised schedules, against the published.

    Args:
        out: the folder of the results.
    """
    prepare_jax()
    from lopt.experiment.studies.noisy_quadratic import quadratic_report

    finish(quadratic_report(), out, "quadratic")


@horizon.command
@options(SurfaceSettings)
def surface(*, settings: SurfaceSettings, out: Path | None = None) -> None:
    """Map the loss after each horizon over learning rate and decay, on a real network.

    Args:
        out: the folder of the study; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.studies.offline import compute_surface
    from lopt.experiment.studies.report import check_study, show_surface

    settings = dataclasses.replace(settings, time_constant=settings.decay_time)
    folder = _study(out, settings.dataset)
    check_study(folder, settings.dataset, settings.decay_time)
    show_surface(compute_surface(settings, folder), folder, Console())
    say(f"Wrote surface.json, surface.png in {folder}.")


@horizon.command
@options(DescentSettings)
def smd(*, settings: DescentSettings, out: Path | None = None) -> None:
    """Descend on learning rate and decay by the gradient of the loss after each horizon.

    Every outer step begins again from the same weights. Killed, it goes on where it was.

    Args:
        out: the folder of the study; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.studies.report import descend_all

    descend_all(_study(out, settings.dataset), settings, Console())


@horizon.command
def best(
    *, dataset: str = "digits", steps: int | None = None, seeds: int = 3, out: Path | None = None
) -> None:
    """Train to the end with what each horizon chose, from several initialisations.

    Args:
        dataset: digits, mnist, fashion_mnist or cifar10.
        steps: inner steps; the longest horizon of the surface by default.
        seeds: initialisations.
        out: the folder of the study, which holds a surface; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.studies.report import best_report

    folder = _study(out, dataset)
    finish(best_report(folder, dataset, steps, seeds), folder, "best")


@horizon.command
@options(OnlineSettings)
def online(*, settings: OnlineSettings, out: Path | None = None) -> None:
    """Tune the learning rate while training, by looking ahead, against a tuned schedule.

    Args:
        out: the folder of the results; horizon/DATASET by default.
    """
    prepare_jax()
    from lopt.experiment.studies.online import online_report

    folder = _study(out, settings.dataset)
    finish(online_report(folder, settings), folder, "online")


def _study(out: Path | None, dataset: str) -> Path:
    return Path("horizon") / dataset if out is None else out
