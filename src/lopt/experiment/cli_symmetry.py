"""The command `lopt probe symmetry`. JAX is imported by it, not by its help."""

import time
from pathlib import Path

import tyro
from rich.console import Console

from lopt.experiment.cache import check_seed, prepare_jax
from lopt.experiment.probe_host import folder_of

SYMMETRY_FILES = ("symmetry.json", "symmetry.html")


def symmetry(
    run: tyro.conf.Positional[Path],
    *,
    seeds: int = 3,
    steps: int | None = None,
    outer_steps: int = 40,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """See which symmetries of its networks a run's optimizer breaks, beside SGD, Adam and Lion.

    Args:
        run: the folder of a run.
        seeds: fresh tasks of the run, each with initial params and batches of its own.
        steps: of each training; the run's horizon, but at most 500, by default.
        outer_steps: of the run's meta-training that are done again and watched, from its beginning;
            0 for none.
        seed: of everything random, but for the meta-training, which has the run's.
        out: the folder of the results; probes/RUN, numbered if need be, by default.
    """
    folder = folder_of(run.resolve().name, out, SYMMETRY_FILES)
    check_seed(seed)
    prepare_jax()
    import jax

    from lopt.experiment.probe_symmetry import SymmetrySettings, probe_symmetry
    from lopt.experiment.probe_symmetry_report import symmetry_report

    began = time.perf_counter()
    settings = SymmetrySettings(steps, seeds, seed, outer_steps)
    result = probe_symmetry(run, settings)
    said = {
        "run": run.resolve().name,
        "seeds": seeds,
        "seed": seed,
        "devices": len(jax.local_devices()),
        "platform": jax.default_backend(),
        "seconds": time.perf_counter() - began,
    }
    report, console = symmetry_report(result, said), Console()
    report.show(console)
    names = report.save(folder, "symmetry")
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False, markup=False)
