"""Online: what tuning the learning rate while training does, and how a longer horizon escapes it.

A folder gets one run per initial learning rate and seed below `online/`, a meta-descent over a
longer horizon that costs as much as all initial rates together, and `online.json` about all.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt.analysis.surface import losses_after
from lopt.core.types import Scalar, Theta
from lopt.experiment.baselines import tune
from lopt.experiment.horizon_settings import OnlineSettings
from lopt.experiment.report import Report, measured
from lopt.experiment.runs.files import read_lines
from lopt.experiment.runs.train import train
from lopt.experiment.studies.figures import online_figure
from lopt.experiment.studies.offline import Choice, train_to_the_end
from lopt.experiment.studies.report import open_experiment, smd_answer
from lopt.experiment.studies.setting import (
    LEARNING_RATES,
    setting,
    theta_at,
)

# The outer Adam of the escape steps this far.
LONG_RATE = 0.3


def online_report(folder: Path, settings: OnlineSettings) -> Report:
    """Runs everything that is not there yet, and compares it."""
    runs = {
        rate: [_online_run(folder, settings, rate, seed) for seed in range(settings.seeds)]
        for rate in settings.learning_rate
    }
    choices = (_tuned(settings), _escape(folder, settings))
    constant = settings.steps / 4
    trained = train_to_the_end(choices, settings.dataset, constant, settings.steps, settings.seeds)
    title = f"{settings.dataset} after {settings.steps} steps, {settings.seeds} initialisations"
    report = Report(title, data=_numbers(settings, runs, choices, trained))
    report.table(
        title,
        [
            {
                "optimizer": row["name"],
                "last learning rate": float(np.mean(row["learning_rate"])),
                "training loss": measured(row["train_loss"]),
                "test accuracy": measured(row["test_accuracy"]),
            }
            for row in report.data["rows"]
        ],
    )
    report.text(report.data["verdict"])
    draw = partial(
        online_figure, runs=runs, choices=choices, trained=trained, time_constant=constant
    )
    report.figure("online", draw, (9.2, 3.9))
    return report


def _online_run(folder: Path, settings: OnlineSettings, rate: float, seed: int) -> dict[str, Any]:
    """Returns what one run logged after each stretch of training."""
    run = folder / "online" / f"rate-{rate:g}-seed-{seed}"
    fields = {
        "dataset": settings.dataset,
        "steps": settings.steps,
        "num_meta_steps": settings.num_meta_steps,
        "steps_per_update": settings.steps_per_update,
        "look_ahead": settings.look_ahead,
        "learning_rate": float(rate),
        "seed": seed,
    }
    said = [f"{name}={value}" for name, value in fields.items()]
    train(open_experiment(run, "horizon_online", said), run)
    lines = read_lines(run / "metrics.jsonl")[:: settings.num_meta_steps]
    names = ("learning_rate", "momentum", "train_loss", "test_loss", "test_accuracy")
    found = {
        name: np.array([np.nan if line[name] is None else line[name] for line in lines], float)
        for name in names
    }
    return {"steps": settings.steps_per_update * np.arange(len(lines)), **found}


def _escape(folder: Path, settings: OnlineSettings) -> Choice:
    """Returns what meta-descent over the long horizon arrives at, on the same budget."""
    horizon = settings.long_horizon
    run = folder / "online" / f"horizon-{horizon}"
    fields = {
        "dataset": settings.dataset,
        "horizon": horizon,
        "time_constant": settings.steps / 4,
        "outer_steps": settings.long_outer_steps,
        "meta_learning_rate": LONG_RATE,
    }
    said = [f"{name}={value}" for name, value in fields.items()]
    train(open_experiment(run, "horizon_smd", said), run)
    return Choice(f"horizon {horizon}, same budget", horizon, *smd_answer(run, last=3))


def _tuned(settings: OnlineSettings) -> Choice:
    """Returns the best of a grid of schedules, tried for the whole run."""
    chosen = setting(settings.dataset, settings.steps / 4)
    rates, powers = np.geomspace(*LEARNING_RATES, 6), np.geomspace(0.1, 10, 5)
    places = np.stack(np.meshgrid(rates, powers, indexing="ij"), -1).reshape(-1, 2)
    key = jax.random.fold_in(jax.random.key(0), 3)
    inner = chosen.inner(settings.steps)

    def train(theta: Theta) -> tuple[Scalar, tuple[()]]:
        return losses_after(inner, theta, key, (settings.steps,), 20)[0], ()

    tuned = tune(lambda place: theta_at(*jnp.log(place)), places.astype(np.float32), train)
    return Choice("tuned schedule", settings.steps, *map(float, tuned.value))


def _numbers(
    settings: OnlineSettings,
    runs: dict[float, list[dict[str, Any]]],
    choices: tuple[Choice, ...],
    trained: dict[str, Any],
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for rate, several in runs.items():
        last = {k: [float(run[k][-1]) for run in several] for k in several[0] if k != "steps"}
        rows.append({"name": f"online, from {rate:g}", "from": rate, **last})
    for i, choice in enumerate(choices):
        names = ("train_loss", "test_loss", "test_accuracy")
        last = {name: trained[name][i, :, -1].tolist() for name in names}
        final = float(choice.rates(np.array([settings.steps]), settings.steps / 4)[0])
        rows.append({"name": choice.name, "learning_rate": [final] * settings.seeds, **last})
        rows[-1]["schedule"] = [choice.learning_rate, choice.power]

    def mean(row: dict[str, Any], name: str = "train_loss") -> float:
        return float(np.mean(row[name]))

    online = [row for row in rows if "from" in row]
    best, largest = min(online, key=mean), max(online, key=lambda row: row["from"])
    final = mean(largest, "learning_rate")
    over_tuned, over_long = mean(best) / mean(rows[-2]), mean(best) / mean(rows[-1])
    verdict = (
        f"Looking {settings.look_ahead} steps ahead turned the largest learning rate from "
        f"{largest['from']:g} to {final:.3g}, and left the training loss of the best run "
        f"{over_tuned:.3g} times that of the tuned schedule and {over_long:.3g} times that of a "
        f"horizon of {settings.long_horizon} on the same budget of {settings.budget:,} inner steps."
    )
    said = dataclasses.asdict(settings) | {"budget": settings.budget}
    return {**said, "rows": rows, "verdict": verdict}
