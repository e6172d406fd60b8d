"""The command `lopt horizon`. JAX is imported by the commands, not by their help."""

from pathlib import Path
from typing import Any

import tyro

from lopt.experiment.cli_options import finish, options
from lopt.experiment.horizon_settings import (
    BestSettings,
    DescentSettings,
    OnlineSettings,
    SurfaceSettings,
)
from lopt.experiment.runs.environment import prepare_jax

horizon = tyro.extras.SubcommandApp()


@horizon.command
def quadratic(*, out: Path = Path("horizon/quadratic")) -> None:
    """Solve the noisy quadratic: greedy, fixed and optimised schedules, against the published.

    Args:
        out: the folder of the results.
    """
    prepare_jax()
    from lopt.experiment.studies import noisy_quadratic

    finish(noisy_quadratic.quadratic(), out, "quadratic")


@horizon.command
@options(SurfaceSettings)
def surface(*, settings: SurfaceSettings, out: Path | None = None) -> None:
    """Map the loss after each horizon over learning rate and decay, on a real network.

    Killed, it goes on where it was.

    Args:
        out: the folder of the study; horizon/DATASET by default.
    """
    _study("surface", settings, out)


@horizon.command
@options(DescentSettings)
def smd(*, settings: DescentSettings, out: Path | None = None) -> None:
    """Descend on learning rate and decay by the gradient of the loss after each horizon.

    Every outer step begins again from the same weights. Killed, it goes on where it was.

    Args:
        out: the folder of the study; horizon/DATASET by default.
    """
    _study("smd", settings, out)


@horizon.command
@options(BestSettings)
def best(*, settings: BestSettings, out: Path | None = None) -> None:
    """Train to the end with what each horizon chose, from several initialisations.

    Args:
        out: the folder of the study, which holds a surface; horizon/DATASET by default.
    """
    _study("best", settings, out)


@horizon.command
@options(OnlineSettings)
def online(*, settings: OnlineSettings, out: Path | None = None) -> None:
    """Tune the learning rate while training, by looking ahead, against a tuned schedule.

    Args:
        out: the folder of the results; horizon/DATASET by default.
    """
    _study("online", settings, out)


def _study(name: str, settings: Any, out: Path | None) -> None:
    """Runs a part of the study of short horizons, shows and saves its report."""
    prepare_jax()
    from lopt.experiment.studies import short_horizon

    folder = Path("horizon") / settings.dataset if out is None else out
    finish(getattr(short_horizon, name)(settings, folder), folder, name)
