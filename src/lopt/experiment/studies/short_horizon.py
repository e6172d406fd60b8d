"""The study of short horizons on a network: surfaces, meta-descents, runs to the end, and online.

Each command goes on with what its folder holds: a surface; below `smd/` a run per meta-descent;
below `online/` a run per initial learning rate and seed, and a meta-descent over a longer horizon
that costs as much as all initial rates together. Wu et al. 2018, arXiv:1803.02021, section 4.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import lopt
from lopt.analysis.surface import losses_after, measure_after
from lopt.core.types import Scalar, Theta
from lopt.experiment.baselines import tune
from lopt.experiment.report import Report, curves, measured, progress, shown_steps, tell
from lopt.experiment.runs.files import read_columns
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train
from lopt.experiment.studies import setting as study
from lopt.experiment.studies import settings as s

# Logged of descents, whose answer is the mean of their last steps, as in the paper.
DESCENT, LAST = ("learning_rate", "power", "meta_loss"), 20
# The rate of the outer Adam over the long horizon, which has few steps.
LONG_RATE = 0.3
# What is drawn of runs: its name in reports, and whether its axis is logarithmic.
PANELS = {
    "train_loss": ("training loss", "y"),
    "test_loss": ("test loss", "y"),
    "test_accuracy": ("test accuracy", ""),
    "learning_rate": ("learning rate", "y"),
}
Pair = tuple[float, float]
Runs = dict[str, dict[str, Float[np.ndarray, "seed step"]]]


def surface(folder: Path, settings: s.SurfaceSettings) -> Report:
    """Maps the loss after each horizon over learning rate and decay."""
    settings = dataclasses.replace(settings, time_constant=settings.decay_time)
    check_study(folder, settings.dataset, settings.decay_time)
    found, rows = study.compute_surface(settings, folder), []
    for horizon, losses in zip(settings.horizons, found.losses, strict=True):
        rate, power = found.best(horizon)
        near = np.argmin(np.sum((np.log([rate, power]) - found.places) ** 2, axis=1))
        row = {"horizon": horizon, "learning rate": rate, "power of decay": power}
        row |= {"lowest loss": float(np.nanmin(losses))}
        rows.append(row | {"at the longest": float(found.losses[-1][near])})
    arrays = {k: v.tolist() for k, v in vars(found).items() if isinstance(v, np.ndarray)}
    title = f"What each horizon prefers on {settings.dataset}"
    report = Report(title, dataclasses.asdict(settings), arrays)
    report.table(title, rows)
    if diverged := int(np.isnan(found.losses[-1]).sum()):
        report.text(f"{diverged} of {len(found.places)} runs diverged.")
    _add_surface(report, folder)
    return report


def _add_surface(report: Report, folder: Path) -> None:
    if found := study.read_surface(folder):
        size, paths = (4.6 * len(found.settings.horizons), 3.9), descents(folder)
        report.figure("surface", lambda figure: study.draw_surface(figure, found, paths), size)


def smd(folder: Path, settings: s.DescentSettings) -> Report:
    """Runs, or goes on with, one meta-descent for each horizon and each beginning."""
    own = study.surface_settings(folder)
    constant = settings.time_constant or (own.decay_time if own else max(settings.horizons) / 4)
    check_study(folder, settings.dataset, constant)
    names = ("dataset", "meta_learning_rate", "particles", "seed")
    shared: dict[str, Any] = {name: getattr(settings, name) for name in names}
    shared |= {"time_constant": constant, "outer_steps": settings.num_meta_steps}
    for horizon, rate, power in itertools.product(
        settings.horizons, settings.learning_rate, settings.power
    ):
        run = folder / "smd" / f"horizon-{horizon}-rate-{rate:g}-power-{power:g}"
        begin = {"horizon": horizon, "learning_rate": rate, "power": power}
        _trained(run, "horizon_smd", shared | begin)
    report = Report("Meta-descents", dataclasses.asdict(settings) | {"time_constant": constant})
    rows: list[dict[str, Any]] = []
    for horizon, path in descents(folder):
        (rate, power), loss = answer(path), float(path[-LAST:, 2].mean())
        row = {"horizon": horizon, "from": f"{path[0, 0]:.3g}, {path[0, 1]:.3g}"}
        rows.append(row | {"to learning rate": rate, "to power": power, "last meta-loss": loss})
    report.table(report.title, rows)
    _add_surface(report, folder)
    return report


def descents(folder: Path) -> list[tuple[int, Float[np.ndarray, "step 3"]]]:
    """Returns of each meta-descent its horizon, and learning rates, powers and meta-losses."""
    found = []
    for run in _descent_runs(folder):
        path = read_columns(run.folder / "metrics.jsonl", DESCENT).T
        if len(path):
            found.append((run.config["settings"]["horizon"], path))
    return sorted(found, key=lambda one: one[0])


def _descent_runs(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted((folder / "smd").glob("*/run.json"))]


def answer(path: Float[np.ndarray, "step 3"], last: int = LAST) -> Pair:
    """Returns the learning rate and power that a meta-descent arrived at, geometric means."""
    rate, power = np.exp(np.log(path[-last:, :2]).mean(axis=0))
    return float(rate), float(power)


def best(folder: Path, settings: s.BestSettings) -> Report:
    """Trains to the end with what surface and descents chose."""
    found = study.read_surface(folder)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no surface; make one with lopt horizon surface.")
    horizons, constant = found.settings.horizons, found.settings.decay_time
    check_study(folder, settings.dataset, constant)
    last = settings.steps or horizons[-1]
    choices = {f"surface, horizon {horizon}": found.best(horizon) for horizon in horizons}
    reference = f"surface, horizon {horizons[-1]}"
    for horizon, path in descents(folder):
        choices[f"descent, horizon {horizon}, from power {path[0, 1]:.3g}"] = answer(path)
    steps = np.unique(np.geomspace(1, last, 50).round().astype(int)).tolist()
    runs = _to_the_end(choices, settings, constant, steps)
    logs = {name: np.log(run["train_loss"][:, -1]) for name, run in runs.items()}
    rows = {
        name: {
            "chosen by": name,
            "learning rate": rate,
            "power": power,
            "ratio": float(np.exp(np.mean(logs[name] - logs[reference]))),
        }
        for name, (rate, power) in choices.items()
    }
    explained = (
        "ratio: training loss over that of the longest horizon's choice, geometric mean over "
        "initialisations."
    )
    return _compared("best", settings, rows, explained, runs, steps)


def online(folder: Path, settings: s.OnlineSettings) -> Report:
    """Tunes the learning rate while training, as far as that is not done, against schedules."""
    names = ("dataset", "steps", "num_meta_steps", "steps_per_update", "look_ahead")
    shared: dict[str, Any] = {name: getattr(settings, name) for name in names}
    # What is logged when training halts, after so many updates.
    updates = np.array(shown_steps(settings.steps // settings.steps_per_update, 50))
    runs: Runs = {}
    for rate in settings.learning_rate:
        found = []
        for seed in range(settings.seeds):
            run = folder / "online" / f"rate-{rate:g}-seed-{seed}"
            begin = {"learning_rate": rate, "seed": seed}
            logged = _trained(run, "horizon_online", shared | begin, tuple(PANELS))
            found.append(logged[:, :: settings.num_meta_steps][:, updates])
        by_panel = np.stack(found, axis=1)
        runs[f"online, from {rate:g}"] = dict(zip(PANELS, by_panel, strict=True))
    horizon, constant = settings.long_horizon, settings.steps / 4
    shared = {"dataset": settings.dataset, "time_constant": constant, "horizon": horizon}
    shared |= {"outer_steps": settings.long_outer_steps, "meta_learning_rate": LONG_RATE}
    run = folder / "online" / f"horizon-{horizon}"
    path = _trained(run, "horizon_smd", shared).T
    tuned, long = "tuned schedule", f"horizon {horizon}, same budget"
    choices = {tuned: _tuned(settings), long: answer(path, last=3)}
    steps = (settings.steps_per_update * updates).tolist()
    runs |= _to_the_end(choices, settings, constant, steps)
    last, loss = (
        {name: float(np.mean(run[which][:, -1])) for name, run in runs.items()}
        for which in ("learning_rate", "train_loss")
    )
    rows = {name: {"optimizer": name, "last learning rate": last[name]} for name in runs}
    least = min(loss[name] for name in loss if name not in choices)
    largest = max(settings.learning_rate)
    verdict = (
        f"Looking {settings.look_ahead} steps ahead turned the largest learning rate from "
        f"{largest:g} to {last[f'online, from {largest:g}']:.3g}, and left the training loss of "
        f"the best run {least / loss[tuned]:.3g} times that of the tuned schedule and "
        f"{least / loss[long]:.3g} times that of a horizon of {horizon} on the same budget of "
        f"{settings.budget:,} inner steps."
    )
    return _compared("online", settings, rows, verdict, runs, steps)


def _tuned(settings: s.OnlineSettings) -> Pair:
    """Returns the best of a grid of schedules, tried for the whole run."""
    steps = settings.steps
    inner = study.decayed_training(study.warm_task(settings.dataset), steps, steps / 4)
    rates, powers = np.geomspace(*study.LEARNING_RATES, 6), np.geomspace(0.1, 10, 5)
    places = np.array([*itertools.product(rates, powers)], np.float32)
    key = jax.random.fold_in(jax.random.key(0), 3)

    def loss(place: Array) -> Scalar:
        return losses_after(inner, study.theta_at(*jnp.log(place)), key, (steps,), 20)[0]

    rate, power = tune(places, jax.jit(jax.vmap(loss))).values
    return rate, power


def _to_the_end(
    choices: Mapping[str, Pair],
    settings: s.BestSettings | s.OnlineSettings,
    time_constant: float,
    steps: Sequence[int],
) -> Runs:
    """Trains with learning rates and powers, by name, from several warm starts."""
    rates, powers = jnp.asarray(list(choices.values()), jnp.float32).T
    thetas, found = jax.vmap(study.theta_at)(jnp.log(rates), jnp.log(powers)), []

    def one(theta: Theta, inner: lopt.InnerTraining, key: Array) -> dict[str, Array]:
        return measure_after(inner, theta, key, tuple(steps), study.measure)

    # Not by `trainings`: where steps are counted for each key apart, every step measures.
    every = eqx.filter_jit(jax.vmap(one, (0, None, None)))
    with progress("training to the end", settings.seeds) as at:
        for seed in range(settings.seeds):
            task = study.warm_task(settings.dataset, seed)
            inner = study.decayed_training(task, steps[-1], time_constant)
            key = jax.random.fold_in(jax.random.key(seed), 2)
            found.append(jax.device_get(every(thetas, inner, key)))
            at(seed + 1, "")
    runs: Runs = {}
    for i, (name, (rate, power)) in enumerate(choices.items()):
        schedule = rate / (1 + np.array(steps) / time_constant) ** power
        runs[name] = {k: np.array([each[k][i] for each in found], float) for k in found[0]}
        runs[name]["learning_rate"] = np.tile(schedule, (settings.seeds, 1))
    return runs


def _compared(
    name: str,
    settings: s.BestSettings | s.OnlineSettings,
    rows: Mapping[str, dict[str, Any]],
    text: str,
    runs: Runs,
    steps: list[int],
) -> Report:
    """Returns a report of runs: a table of cells and how each run ended, a sentence, and curves."""
    title = f"{settings.dataset} after {steps[-1]} steps, {settings.seeds} initialisations"
    report = Report(title, dataclasses.asdict(settings) | {"steps": steps[-1]})
    ends = {"train_loss": "training loss", "test_accuracy": "test accuracy"}
    report.table(
        title,
        [
            cells | {shown: measured(runs[run][which][:, -1]) for which, shown in ends.items()}
            for run, cells in rows.items()
        ],
    )
    report.text(text)
    found = {title: {run: runs[run][which] for run in runs} for which, (title, _) in PANELS.items()}
    x = "x" if isinstance(settings, s.BestSettings) else ""  # steps are geometric, or even
    log = {title: x + y for title, y in PANELS.values()}
    report.add(curves(name, found, steps=steps, columns=2, log=log, xlabel="step"))
    return report


def check_study(folder: Path, dataset: str, time_constant: float) -> None:
    """Refuses a folder whose surface or descents have another data set or time constant."""
    found = {run.folder: run.config["settings"] for run in _descent_runs(folder)}
    if own := study.surface_settings(folder):
        found[folder] = {"dataset": own.dataset, "time_constant": own.decay_time}
    for path, of in found.items():
        if of["dataset"] != dataset or not math.isclose(of["time_constant"], time_constant):
            raise FileExistsError(
                f"{path} is of {of['dataset']} with --time-constant {of['time_constant']:g}, this "
                f"is of {dataset} with {time_constant:g}; give another --out, or the same."
            )


def _trained(
    run: Path, recipe: str, settings: dict[str, Any], names: Sequence[str] = DESCENT
) -> Float[np.ndarray, "name step"]:
    """Begins, or goes on with, a run of a recipe; returns what it logged."""
    if not (run / "run.json").exists():
        found = Run.create(run, recipe, [f"{name}={value}" for name, value in settings.items()])
    elif (found := Run(run)).config["settings"] | settings != found.config["settings"]:
        raise FileExistsError(f"{run} has other settings; give another --out, or delete it.")
    tell(f"Run {run}")
    train(found)
    return read_columns(run / "metrics.jsonl", names)
