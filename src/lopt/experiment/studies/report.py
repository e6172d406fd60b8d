"""The offline study of short horizons: descents, runs to the end, tables, and what they say."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lopt.experiment.horizon_settings import DescentSettings
from lopt.experiment.report import Cell, Figure, Report, Table, measured
from lopt.experiment.runs.files import read_json, read_lines, write_bytes
from lopt.experiment.runs.train import create, reopen, train
from lopt.experiment.studies.figures import best_figure, surface_figure
from lopt.experiment.studies.offline import Choice, Surface, read_surface, train_to_the_end

# A descent's answer is the mean of its last steps, as in the paper.
LAST = 20


def show_surface(surface: Surface, folder: Path, console: Console) -> None:
    """Prints what each horizon prefers, and what that costs at the longest, and draws it."""
    rows: list[dict[str, Cell]] = []
    for horizon, losses in zip(surface.settings.horizons, surface.losses, strict=True):
        best = surface.best(horizon)
        near = np.argmin(np.sum((np.log(best) - surface.places) ** 2, axis=1))
        rows.append(
            {
                "horizon": horizon,
                "learning rate": best[0],
                "power of decay": best[1],
                "lowest loss": float(np.nanmin(losses)),
                "at the longest": float(surface.losses[-1][near]),
            }
        )
    Table(f"What each horizon prefers on {surface.settings.dataset}", rows).print(console)
    diverged = int(np.isnan(surface.losses[-1]).sum())
    if diverged:
        console.print(f"{diverged} of {len(surface.places)} runs diverged.")
    _draw_surface(surface, folder)


def _draw_surface(surface: Surface, folder: Path) -> None:
    size = (4.6 * len(surface.settings.horizons), 3.9)
    draw = partial(surface_figure, surface=surface, paths=descents(folder))
    write_bytes(folder / "surface.png", Figure("surface", draw, size).png)


def descend_all(folder: Path, settings: DescentSettings, console: Console) -> None:
    """Runs, or goes on with, one meta-descent for each horizon and each beginning.

    Raises:
        FileExistsError: if the folder holds a study of another problem, or other descents.
    """
    surface = read_surface(folder) if (folder / "surface.json").exists() else None
    constant = settings.time_constant
    if constant is None:
        constant = surface.settings.decay_time if surface else max(settings.horizons) / 4
    check_study(folder, settings.dataset, constant)
    beginnings = (settings.horizons, settings.learning_rate, settings.power)
    for horizon, rate, power in itertools.product(*beginnings):
        run = folder / "smd" / f"horizon-{horizon}-rate-{rate:g}-power-{power:g}"
        fields = {
            "horizon": horizon,
            "learning_rate": float(rate),
            "power": float(power),
            "dataset": settings.dataset,
            "time_constant": float(constant),
            "outer_steps": settings.num_meta_steps,
            "meta_learning_rate": float(settings.meta_learning_rate),
            "particles": settings.particles,
            "seed": settings.seed,
        }
        console.print(f"Horizon {horizon}, from rate {rate:g} and power {power:g}")
        said = [f"{name}={value}" for name, value in fields.items()]
        train(open_experiment(run, "horizon_smd", said), run)
    rows: list[dict[str, Cell]] = [
        {
            "horizon": path["horizon"],
            "from": f"{path['rates'][0]:.3g}, {path['powers'][0]:.3g}",
            "to learning rate": path["answer"][0],
            "to power": path["answer"][1],
            "last meta-loss": path["loss"],
        }
        for path in descents(folder)
    ]
    Table("Meta-descents", rows).print(console)
    if surface is not None:
        _draw_surface(surface, folder)
        console.print(f"Drew the paths on {folder / 'surface.png'}.", highlight=False)


def open_experiment(run: Path, recipe: str, settings: list[str]) -> Any:
    """Returns the experiment of a run's folder, which is made if it is not there."""
    if not (run / "run.json").exists():
        return create(run, recipe, settings)
    if read_json(run / "run.json").get("settings") != settings:
        raise FileExistsError(f"{run} has other settings; give another --out, or delete it.")
    return reopen(run)


def check_study(folder: Path, dataset: str, time_constant: float) -> None:
    """Refuses a folder that holds the study of another problem.

    Raises:
        FileExistsError: if a surface or descent in it has another data set or time constant.
    """
    found = {
        run.parent: (path["dataset"], path["time_constant"])
        for run in sorted((folder / "smd").glob("*/run.json"))
        for path in [_said(run)]
    }
    if (folder / "surface.json").exists():
        settings = read_surface(folder).settings
        found[folder / "surface.json"] = (settings.dataset, settings.decay_time)
    for path, (name, constant) in found.items():
        if name != dataset or not math.isclose(constant, time_constant):
            raise FileExistsError(
                f"{path} is of {name} with --time-constant {constant:g}, this is of {dataset} with "
                f"{time_constant:g}; give another --out, or the same."
            )


def _said(run: Path) -> dict[str, Any]:
    """Reads the settings of a descent."""
    content = read_json(run)
    try:
        said = dict(line.split("=", 1) for line in content["settings"])
        return {
            "dataset": said["dataset"],
            "horizon": int(said["horizon"]),
            "time_constant": float(said["time_constant"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run} is not that of a meta-descent ({error}); delete it.") from error


def descents(folder: Path) -> list[dict[str, Any]]:
    """Returns the paths of the meta-descents of a study, as far as they got."""
    found = []
    for run in sorted((folder / "smd").glob("*/run.json")):
        lines = read_lines(run.parent / "metrics.jsonl")
        if not lines:
            continue
        rates, powers = (np.array([line[k] for line in lines]) for k in ("learning_rate", "power"))
        found.append(
            {
                "horizon": _said(run)["horizon"],
                "rates": rates,
                "powers": powers,
                "answer": smd_answer(run.parent),
                "loss": float(np.mean([_number(line["meta_loss"]) for line in lines[-LAST:]])),
            }
        )
    return sorted(found, key=lambda path: path["horizon"])


def smd_answer(run: Path, last: int = LAST) -> tuple[float, float]:
    """Returns the learning rate and power that a meta-descent arrived at."""
    lines = read_lines(run / "metrics.jsonl")[-last:]
    rate, power = (
        float(np.exp(np.mean(np.log([line[name] for line in lines]))))
        for name in ("learning_rate", "power")
    )
    return rate, power


def best_report(folder: Path, dataset: str, steps: int | None, seeds: int) -> Report:
    """Trains to the end with what surface and descents chose."""
    surface = read_surface(folder)
    settings = surface.settings
    check_study(folder, dataset, settings.decay_time)
    steps = settings.horizons[-1] if steps is None else steps
    choices = [
        Choice(f"surface, horizon {horizon}", horizon, *surface.best(horizon))
        for horizon in settings.horizons
    ]
    choices += [
        Choice(
            f"descent, horizon {path['horizon']}, from power {path['powers'][0]:.3g}",
            path["horizon"],
            *path["answer"],
        )
        for path in descents(folder)
    ]
    runs = train_to_the_end(choices, settings.dataset, settings.decay_time, steps, seeds)
    final = runs["train_loss"][:, :, -1]
    reference = len(settings.horizons) - 1
    report = Report(f"{settings.dataset} after {steps} steps, {seeds} initialisations")
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Cell]] = []
    for i, choice in enumerate(choices):
        ratios = final[i] / final[reference]
        accuracy = runs["test_accuracy"][i, :, -1]
        rows.append(
            {
                "choice": choice.name,
                "horizon": choice.horizon,
                "learning_rate": choice.learning_rate,
                "power": choice.power,
                "train_loss": final[i].tolist(),
                "test_loss": runs["test_loss"][i, :, -1].tolist(),
                "test_accuracy": accuracy.tolist(),
                "loss_over_that_of_longest_horizon": ratios.tolist(),
            }
        )
        shown.append(
            {
                "chosen by": choice.name,
                "learning rate": choice.learning_rate,
                "power": choice.power,
                "training loss": measured(final[i]),
                "test accuracy": measured(accuracy),
                "ratio": float(np.exp(np.mean(np.log(ratios)))),
            }
        )
    report.data |= {"steps": steps, "seeds": seeds, "dataset": settings.dataset, "rows": rows}
    report.table(report.title, shown)
    report.text(
        "ratio: training loss over that of the longest horizon's choice, geometric mean over "
        "initialisations."
    )
    draw = partial(best_figure, choices=choices, runs=runs, time_constant=settings.decay_time)
    report.figure("best", draw, (13.8, 3.9))
    return report


def _number(value: float | None) -> float:
    return np.nan if value is None else value
