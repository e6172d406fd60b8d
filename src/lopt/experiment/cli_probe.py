"""The command `lopt probe`. JAX is imported by the commands, not by their help."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lopt.experiment.cache import check_seed, prepare_jax
from lopt.experiment.cli_dynamics import dynamics
from lopt.experiment.cli_symmetry import symmetry
from lopt.experiment.probe_host import folder_of

probe = tyro.extras.SubcommandApp()
probe.command(dynamics)
probe.command(symmetry)


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
        only: an estimator to measure, or how its name begins; may be repeated; all
            that give a gradient by default, so not RankedES and RandomSearch.
        seed: of everything random.
        weights: a file of weights or a run's folder; initial weights by default.
        out: the folder of the results; probes/NAME, numbered if need be, by default.
    """
    folder = folder_of(name, out, ESTIMATOR_FILES)
    check_seed(seed)
    prepare_jax()
    import jax

    from lopt.experiment.probe import ProbeSettings, probe_estimators
    from lopt.experiment.probe_report import estimators_report
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
    report = estimators_report(result, slices, said)
    report.show(console)
    names = report.save(folder, "probe")
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False, markup=False)


@probe.command
def horizon(
    name: tyro.conf.Positional[str],
    *,
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(name="set", metavar="FIELD=VALUE"),
    ] = (),
    horizon: int | None = None,
    truncations: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="STEPS ...")] = None,
    episodes: int = 8,
    positions: int = 13,
    reach: float = 30.0,
    tolerance: float = 0.1,
    seed: int = 0,
    weights: Path | None = None,
    out: Path | None = None,
) -> None:
    """Find out how long a truncation has to be, and what shorter ones would do.

    Args:
        name: a recipe, by name or as a Python file, or a task such as Rosenbrock.
        settings: change a field of the recipe; may be repeated.
        horizon: inner steps that count as the truth; the recipe's, but at most 200, by default.
        truncations: inner steps, increasing, ending with the horizon; chosen by default.
        episodes: over how many the means are.
        positions: of each hyperparameter, or of the scale of a rule's updates, odd.
        reach: the largest factor on each hyperparameter; the smallest is its inverse.
        tolerance: share of the gradient's norm that its bias, and of the meta-loss that its excess,
            may be.
        seed: of everything random.
        weights: a file of weights or a run's folder; initial weights by default.
        out: the folder of the results; probes/NAME, numbered if need be, by default.
    """
    folder = folder_of(name, out, HORIZON_FILES)
    check_seed(seed)
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"--tolerance {tolerance} must be positive; try 0.1.")
    prepare_jax()
    import jax

    from lopt.experiment.probe_horizon import probe_horizon
    from lopt.experiment.probe_horizon_report import horizon_report
    from lopt.experiment.probe_subject import subject

    began = time.perf_counter()
    inner, theta = subject(name, settings, horizon, weights, seed, longest=200)
    console = Console()
    with console.status("tracing") as status:
        result = probe_horizon(
            inner,
            theta,
            jax.random.key(seed),
            truncations,
            episodes,
            positions,
            reach,
            status.update,
        )
    said = {
        "name": name,
        "set": list(settings),
        "horizon": inner.horizon,
        "episodes": episodes,
        "tolerance": tolerance,
        "seed": seed,
        "weights": None if weights is None else str(weights),
        "seconds": time.perf_counter() - began,
    }
    report = horizon_report(result, said)
    report.show(console)
    names = report.save(folder, "horizon")
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False, markup=False)


ESTIMATOR_FILES = ("probe.json", "probe.html")
HORIZON_FILES = ("horizon.json", "horizon.html")
