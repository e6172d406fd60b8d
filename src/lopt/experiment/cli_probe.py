"""The command `lopt probe`. JAX is imported by the commands, not by their help."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from lopt.experiment.cli_options import finish, options
from lopt.experiment.runs.environment import prepare_jax
from lopt.experiment.runs.files import check_writable
from lopt.experiment.settings import (
    DynamicsSettings,
    HorizonSettings,
    ProbeSettings,
    SymmetrySettings,
)

probe = tyro.extras.SubcommandApp()
# What tells that a folder holds a probe.
PROBE_FILES = {
    "estimators": "probe.json",
    "horizon": "horizon.json",
    "dynamics": "dynamics.json",
    "symmetry": "symmetry.json",
}


@probe.command
@options(ProbeSettings)
def estimators(
    name: Positional[str],
    *,
    settings: ProbeSettings,
    out: Path | None = None,
) -> None:
    """Measure bias, noise and cost of every estimator, and draw slices of the meta-loss.

    Args:
        name: a recipe, by name or as a Python file, a run, or a task such as Rosenbrock.
        out: the folder of the results; probes/NAME, numbered if need be, by default.
    """
    folder = _probe_folder(name, out, "estimators")
    prepare_jax()
    from lopt.experiment.probes.estimators import probe_estimators

    finish(probe_estimators(name, settings), folder, "probe")


@probe.command(name="horizon")
@options(HorizonSettings)
def probe_horizon(
    name: Positional[str],
    *,
    settings: HorizonSettings,
    out: Path | None = None,
) -> None:
    """Find out how long a truncation has to be, and what shorter ones would do.

    Args:
        name: a recipe, by name or as a Python file, a run, or a task such as Rosenbrock.
        out: the folder of the results; probes/NAME, numbered if need be, by default.
    """
    folder = _probe_folder(name, out, "horizon")
    prepare_jax()
    from lopt.experiment.probes.truncation import probe_truncation

    finish(probe_truncation(name, settings), folder, "horizon")


@probe.command
@options(DynamicsSettings)
def dynamics(
    run: Positional[Path],
    *,
    settings: DynamicsSettings,
    out: Path | None = None,
) -> None:
    """Watch a run's optimizer from inside, beside SGD, momentum, Adam and Lion.

    Args:
        run: the folder of a run.
        out: the folder of the results; probes/RUN, numbered if need be, by default.
    """
    folder = _probe_folder(run.resolve().name, out, "dynamics")
    prepare_jax()
    from lopt.experiment.probes.dynamics import probe_dynamics
    from lopt.experiment.probes.dynamics_report import dynamics_report

    result, head = _timed(run, settings, probe_dynamics)
    finish(dynamics_report(result, head | {"steps": result.steps}), folder, "dynamics")


@probe.command
@options(SymmetrySettings)
def symmetry(
    run: Positional[Path],
    *,
    settings: SymmetrySettings,
    out: Path | None = None,
) -> None:
    """See which symmetries of its networks a run's optimizer breaks, beside SGD, Adam and Lion.

    Args:
        run: the folder of a run.
        out: the folder of the results; probes/RUN, numbered if need be, by default.
    """
    folder = _probe_folder(run.resolve().name, out, "symmetry")
    prepare_jax()
    from lopt.experiment.probes.symmetry import probe_symmetry
    from lopt.experiment.probes.symmetry_report import symmetry_report

    result, head = _timed(run, settings, probe_symmetry)
    finish(symmetry_report(result, head), folder, "symmetry")


def _timed(run: Path, settings: Any, measure: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what was measured of a run, and the head of its report."""
    import jax

    began = time.perf_counter()
    result = measure(run, settings)
    head = {
        "run": run.resolve().name,
        **dataclasses.asdict(settings),
        "devices": len(jax.local_devices()),
        "platform": jax.default_backend(),
        "seconds": time.perf_counter() - began,
    }
    return result, head


def _probe_folder(name: str, out: Path | None, kind: str) -> Path:
    """Returns where the results of a probe go: a folder given, or one that holds none yet."""
    file = PROBE_FILES[kind]
    if out is not None:
        if out.is_file():
            raise FileExistsError(f"{out} is a file; give a folder with --out.")
        if (out / "run.json").exists():
            raise FileExistsError(
                f"{out} holds a run, whose figures a probe would replace; give another folder "
                "with --out."
            )
        if (out / file).exists():
            raise FileExistsError(f"{out} already holds a probe; give another folder with --out.")
        check_writable(out / file)
        return out
    base = Path("probes") / Path(name).stem
    folder, number = base, 2
    while (folder / file).exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    check_writable(folder / file)
    return folder
