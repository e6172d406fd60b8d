"""The offline study of short horizons: descents, runs to the end, tables, and what they say."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lopt.experiment.files import read_json, read_lines, write_json
from lopt.experiment.horizon_figures import best_figure, surface_figure
from lopt.experiment.horizon_offline import Choice, Surface, read_surface, train_to_the_end
from lopt.experiment.train import create, reopen, train

# A descent's answer is the mean of its last steps, as in the paper.
LAST = 20


def print_surface(surface: Surface, console: Console) -> None:
    """Prints what each horizon prefers, and what that costs at the longest."""
    horizons = surface.settings.horizons
    table = Table(title=f"What each horizon prefers on {surface.settings.dataset}")
    for heading in ("horizon", "learning rate", "power of decay", "lowest loss", "at the longest"):
        table.add_column(heading, justify="right")
    places = np.exp(surface.places)
    for i, horizon in enumerate(horizons):
        rate, power = surface.best(horizon)
        near = np.argmin(np.sum((np.log([rate, power]) - surface.places) ** 2, axis=1))
        table.add_row(
            str(horizon),
            f"{rate:.3g}",
            f"{power:.3g}",
            f"{np.nanmin(surface.losses[i]):.4g}",
            f"{surface.losses[-1][near]:.4g}",
        )
    console.print(table)
    diverged = int(np.isnan(surface.losses[-1]).sum())
    if diverged:
        console.print(f"{diverged} of {len(places)} runs diverged.")


def descend_all(
    folder: Path,
    dataset: str,
    horizons: Sequence[int],
    rates: Sequence[float],
    powers: Sequence[float],
    time_constant: float | None,
    fields: dict[str, Any],
    console: Console,
) -> None:
    """Runs, or goes on with, one meta-descent for each horizon and each beginning.

    Raises:
        ValueError: if a number is out of range; FileExistsError if other descents are there.
    """
    surface = read_surface(folder) if (folder / "surface.json").exists() else None
    if time_constant is None:
        time_constant = surface.settings.time_constant if surface else max(horizons) / 4
    if surface is not None and surface.settings.dataset != dataset:
        raise ValueError(
            f"--dataset {dataset}: the surface in {folder} is of {surface.settings.dataset}; "
            "give another --out."
        )
    for horizon, rate, power in itertools.product(horizons, rates, powers):
        run = folder / "smd" / f"horizon-{horizon}-rate-{rate:g}-power-{power:g}"
        own: dict[str, Any] = {"horizon": horizon, "learning_rate": rate, "power": power}
        own |= {"dataset": dataset, "time_constant": float(time_constant), **fields}
        settings = [f"{name}={value}" for name, value in own.items()]
        console.print(f"Horizon {horizon}, from rate {rate:g} and power {power:g}")
        train(open_experiment(run, "horizon_smd", settings), run)
    paths = descents(folder)
    table = Table(title="Meta-descents")
    for heading in ("horizon", "from", "to learning rate", "to power", "last meta-loss"):
        table.add_column(heading, justify="right")
    for path in paths:
        rate, power = path["answer"]
        table.add_row(
            str(path["horizon"]),
            f"{path['rates'][0]:.3g}, {path['powers'][0]:.3g}",
            f"{rate:.3g}",
            f"{power:.3g}",
            f"{path['loss']:.4g}",
        )
    console.print(table)
    if surface is not None:
        surface_figure(surface, paths, folder / "surface.png")
        console.print(f"Drew the paths on {folder / 'surface.png'}.", highlight=False)


def open_experiment(run: Path, recipe: str, settings: list[str]) -> Any:
    """Returns the experiment of a run's folder, which is made if it is not there."""
    if not (run / "run.json").exists():
        return create(run, recipe, settings)
    if read_json(run / "run.json").get("settings") != settings:
        raise FileExistsError(f"{run} has other settings; give another --out, or delete it.")
    return reopen(run)


def descents(folder: Path) -> list[dict[str, Any]]:
    """Returns the paths of the meta-descents of a study, as far as they got."""
    found = []
    for run in sorted((folder / "smd").glob("*/run.json")):
        settings = dict(line.split("=", 1) for line in read_json(run)["settings"])
        lines = read_lines(run.parent / "metrics.jsonl")
        if not lines:
            continue
        rates, powers = (np.array([line[k] for line in lines]) for k in ("learning_rate", "power"))
        found.append(
            {
                "horizon": int(settings["horizon"]),
                "rates": rates,
                "powers": powers,
                "answer": smd_answer(run.parent),
                "loss": float(np.mean([line["meta_loss"] or np.nan for line in lines[-LAST:]])),
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


def best_report(folder: Path, steps: int | None, seeds: int, console: Console) -> dict[str, Any]:
    """Trains to the end with what surface and descents chose; writes best.json and best.png."""
    surface = read_surface(folder)
    settings = surface.settings
    steps = settings.horizons[-1] if steps is None else steps
    choices = [
        Choice(f"surface, horizon {horizon}", horizon, *surface.best(horizon))
        for horizon in settings.horizons
    ]
    choices += [
        Choice(f"descent, horizon {path['horizon']}", path["horizon"], *path["answer"])
        for path in descents(folder)
    ]
    runs = train_to_the_end(choices, settings.dataset, settings.time_constant, steps, seeds)
    final = runs["train_loss"][:, :, -1]
    reference = len(settings.horizons) - 1
    rows = []
    table = Table(title=f"{settings.dataset} after {steps} steps, {seeds} initialisations")
    headings = ("chosen by", "learning rate", "power", "training loss", "test accuracy", "ratio")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "chosen by" else "right")
    for i, choice in enumerate(choices):
        ratios = final[i] / final[reference]
        row: dict[str, Any] = {
            "choice": choice.name,
            "horizon": choice.horizon,
            "learning_rate": choice.learning_rate,
            "power": choice.power,
            "train_loss": final[i].tolist(),
            "test_loss": runs["test_loss"][i, :, -1].tolist(),
            "test_accuracy": runs["test_accuracy"][i, :, -1].tolist(),
            "loss_over_that_of_longest_horizon": ratios.tolist(),
        }
        rows.append(row)
        table.add_row(
            choice.name,
            f"{choice.learning_rate:.3g}",
            f"{choice.power:.3g}",
            f"{final[i].mean():.4g} ± {_error(final[i]):.2g}",
            f"{np.mean(row['test_accuracy']):.4f}",
            f"{np.exp(np.mean(np.log(ratios))):.3g}",
        )
    console.print(table)
    console.print(
        "ratio: training loss over that of the longest horizon's choice, geometric mean over "
        "initialisations."
    )
    report = {"steps": steps, "seeds": seeds, "dataset": settings.dataset, "rows": rows}
    write_json(folder / "best.json", report)
    best_figure(choices, runs, settings.time_constant, folder / "best.png")
    console.print(f"Wrote best.json and best.png in {folder}.", highlight=False)
    return report


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
