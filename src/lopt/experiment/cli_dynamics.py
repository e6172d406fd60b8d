"""The command `lopt probe dynamics`. JAX is imported by it, not by its help."""

import dataclasses
import time
from pathlib import Path

import tyro
from rich.console import Console

from lopt.experiment.cache import check_seed, prepare_jax
from lopt.experiment.probe_host import folder_of

DYNAMICS_FILES = ("dynamics.json", "dynamics.html")


def dynamics(
    run: tyro.conf.Positional[Path],
    *,
    seeds: int = 3,
    steps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Watch a run's optimizer from inside, beside SGD, momentum, Adam and Lion.

    Args:
        run: the folder of a run.
        seeds: fresh tasks of the run, each with initial params and batches of its own.
        steps: of each training; the run's horizon, but at most 500, by default.
        seed: of everything random.
        out: the folder of the results; probes/RUN, numbered if need be, by default.
    """
    folder = folder_of(run.resolve().name, out, DYNAMICS_FILES)
    check_seed(seed)
    prepare_jax()
    import jax

    from lopt.experiment.probe_dynamics import DynamicsSettings, probe_dynamics
    from lopt.experiment.probe_dynamics_report import dynamics_report

    began = time.perf_counter()
    settings = DynamicsSettings(steps, seeds, seed)
    result = probe_dynamics(run, settings)
    said = {
        "run": run.resolve().name,
        **dataclasses.asdict(settings),
        "steps": result.steps,
        "devices": len(jax.local_devices()),
        "platform": jax.default_backend(),
        "seconds": time.perf_counter() - began,
    }
    report, console = dynamics_report(result, said), Console()
    report.show(console)
    names = report.save(folder, "dynamics")
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False, markup=False)
