"""`lopt sweep` and `lopt compare`: one recipe in several settings, meta-trained alike.

Each setting and seed is a run of its own, so that a sweep goes on where it was stopped.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np

from lopt.experiment.report import Report, curves, measured, progress
from lopt.experiment.runs.cluster import be_like, map_on_workers
from lopt.experiment.runs.files import digest
from lopt.experiment.runs.registry import load_recipe, make, parsed, seed_of
from lopt.experiment.runs.run import Run, holds_run, printed
from lopt.experiment.runs.settings import CompareSettings, SweepSettings
from lopt.experiment.runs.storage import checkpoints
from lopt.experiment.runs.train import program, train
from lopt.experiment.trainings import bytes_per_param

# The share of outer steps whose mean is the final outer loss.
END = 0.1
# Longer names of folders are cut: file systems take 255 bytes.
LONGEST_NAME = 180

Point = Mapping[str, str]  # the value of each field, as text


def sweep(folder: Path, settings: SweepSettings) -> Report:
    """Meta-trains a recipe in all combinations of values of its fields, each from so many seeds."""
    if not settings.settings and settings.seeds == 1:
        raise ValueError("lopt sweep has nothing to sweep over; try --set outer_steps=100,200.")
    points = grid(settings.settings)
    varied = [name for name in points[0] if len({point[name] for point in points}) > 1]
    heads = [{name: point[name] for name in varied or point} for point in points]
    labels = (", ".join(f"{name}={text}" for name, text in head.items()) for head in heads)
    settled = {label or settings.recipe: point for label, point in zip(labels, points, strict=True)}
    return _trained_alike("Settings of", folder, settings, settled, heads, _folder_name)


def compare_designs(folder: Path, settings: CompareSettings) -> Report:
    """Meta-trains designs on the tasks of a recipe, each from so many seeds."""
    given = parsed(settings.settings)
    points = {design: given | {"optimizer": design} for design in settings.designs}
    heads = [{"design": design} for design in points]
    name = "{optimizer}-{seed}".format_map
    return _trained_alike(
        "Designs on", folder, settings, points, heads, lambda point: name({"seed": 0, **point})
    )


def grid(settings: Sequence[str]) -> list[dict[str, str]]:
    """Returns all combinations of the values of settings such as "horizon=50,100".

    Example:
        >>> grid(["depths=(1,2),(3,)", "rate=0.1"])
        [{'depths': '(1,2)', 'rate': '0.1'}, {'depths': '(3,)', 'rate': '0.1'}]
    """
    fields = {name: _values(text) for name, text in parsed(settings).items()}
    for name, values in fields.items():
        said = f"--set {name}={','.join(values)}"
        if sum(setting.partition("=")[0] == name for setting in settings) > 1:
            raise ValueError(f"{said}: {name} is set twice; write all its values as {name}=a,b.")
        if len(values) > 1 and ("" in values or len({*values}) < len(values)):
            raise ValueError(f"{said} has a value that is empty or there twice; leave it out.")
    return [dict(zip(fields, some, strict=True)) for some in itertools.product(*fields.values())]


def _values(text: str) -> list[str]:
    """Splits text at its commas, but for those within brackets or quotes."""
    values, depth, quoted = [""], 0, ""
    for letter in text:
        if letter in "'\"" and quoted in ("", letter):
            quoted = "" if quoted else letter
        elif not quoted:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not quoted and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values] if len(values) > 1 else [text]


def _folder_name(point: Point) -> str:
    """Returns a name that a file system takes; the order of fields does not matter, seeds last."""
    names = sorted(point, key=lambda name: (name == "seed", name))
    text = quote(",".join(f"{name}={point[name]}" for name in names), safe="=,()")
    if len(text) <= LONGEST_NAME:
        return text
    return f"{text[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _trained_alike(
    what: str,
    folder: Path,
    settings: SweepSettings | CompareSettings,
    points: Mapping[str, Point],
    heads: Sequence[dict[str, str]],
    name: Callable[[Point], str],
) -> Report:
    """Meta-trains runs of all points, by label, and reports on each in a row with a head."""
    recipe, runs = settings.recipe, {label: list[Run]() for label in points}
    seeded = {label: _seeded(settings, point) for label, point in points.items()}
    order = [(label, some[i]) for i in range(settings.seeds) for label, some in seeded.items()]
    # All are checked, then all are made, so that what is refused is so before anything is written.
    for label, values in order:
        try:
            _check(folder / name(values), recipe, values, trace=values is seeded[label][0])
        except Exception as error:  # also of tracing, which has many kinds
            raise ValueError(f"{label}: {error}") from error
    for label, values in order:
        place, given = folder / name(values), [f"{field}={text}" for field, text in values.items()]
        there = holds_run(place)
        runs[label].append(Run(place, trust=True) if there else Run.create(place, recipe, given))
    _train([run for some in runs.values() for run in some], settings)
    return _report(f"{what} {recipe}", settings, runs, heads)


def _seeded(settings: SweepSettings | CompareSettings, point: Point) -> list[Point]:
    """Returns a point for each seed, with the field `seed` set if the recipe has it."""
    fields, seeds = dataclasses.fields(load_recipe(settings.recipe)), settings.seeds
    if seeds > 1 and "seed" in point:
        raise ValueError(f"--seeds {seeds} and --set seed={point['seed']}: give one of the two.")
    if "seed" in point or (seeds == 1 and all(field.name != "seed" for field in fields)):
        return [point]
    seed_of(settings.recipe, point, seeds)
    return [{**point, "seed": f"{seed}"} for seed in range(seeds)]


def _check(folder: Path, recipe: str, values: Point, *, trace: bool) -> None:
    """Refuses what cannot be trained, and a run that is there with another experiment."""
    made, experiment = make(recipe, values)
    if not holds_run(folder):
        if trace:  # which finds what only training would
            program(experiment)
        return
    full = {k: v.resolve() if isinstance(v, Path) and v.name else v for k, v in vars(made).items()}
    settings = json.loads(json.dumps(full, default=str))  # as in run.json
    code = digest(Path(recipe)) if Path(recipe).suffix == ".py" else None
    there = Run(folder).config
    found = there["settings"], there["recipe_sha256"], there["experiment"]
    if found != (settings, code, printed(experiment)):
        raise ValueError(
            f"{folder} holds a run of other code or other settings; give another with --out."
        )


def _train(runs: Sequence[Run], settings: SweepSettings | CompareSettings) -> None:
    """Trains runs to their ends, one after another here, or several at a time by Ray."""
    kept = {run: checkpoints(run.folder / "checkpoints") for run in runs}
    left = [run for run in runs if run.experiment.outer_steps not in kept[run]]
    with progress("training", len(runs), done=len(runs) - len(left)) as at:
        if settings.workers is None:
            for done, run in enumerate(left, len(runs) - len(left)):
                at(done, run.name)
                train(run, show_progress=False)
                maps = Path("/proc/self/maps")  # of which a process can have 65,530 in Linux
                if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
                    jax.clear_caches()
            return
        folders = [str(run.folder.resolve()) for run in left]
        names = map_on_workers(train_folder, folders, settings.workers, settings.ray)
        for done, name in enumerate(names, len(runs) - len(left) + 1):
            at(done, f"{name} is done")


def train_folder(folder: str, there: dict[str, Any]) -> str:
    """Trains the run in a folder to its end, in a worker's process; returns the run's name."""
    jax.config.update("jax_platforms", "cpu")
    be_like(there)
    run = Run(folder, trust=True)  # its code is that of the recipe that was given
    train(run, show_progress=False)
    return run.name


def _report(
    title: str,
    settings: SweepSettings | CompareSettings,
    runs: Mapping[str, Sequence[Run]],
    heads: Sequence[dict[str, str]],
) -> Report:
    logs = {label: [run.log for run in some] for label, some in runs.items()}
    losses = {label: np.stack([log["meta_loss"] for log in some]) for label, some in logs.items()}
    rows = list[dict[str, Any]]()
    for (label, found), head in zip(losses.items(), heads, strict=True):
        last, one, own = max(1, round(END * found.shape[1])), runs[label][0], logs[label]
        optimizer = partial(one.learned.optimizer, one.theta, one.inner.horizon)
        size = bytes_per_param(one.inner.tasks.architectures()[0], optimizer)
        cells = {
            "weights": sum(x.size for x in jax.tree.leaves(one.theta)),
            "state bytes per parameter": size,
            "outer loss at first": measured(found[:, :last].mean(axis=1)),
            "outer loss at the end": measured(found[:, -last:].mean(axis=1)),
            "ms per outer step": 1e3 * float(np.median([log["seconds"] for log in own])),
            "dropped particles": int(sum(np.nansum(log["dropped"]) for log in own)),
            "skipped steps": int(sum(np.sum(log["finite"] == 0) for log in own)),
        }
        rows.append({**head, **cells})
    none = {n for n in ("dropped particles", "skipped steps") if not any(row[n] for row in rows)}
    rows = [{name: cell for name, cell in row.items() if name not in none} for row in rows]
    report = Report(title, vars(settings))
    report.table(f"Meta-training, seeds of each: {settings.seeds}", rows)
    every = np.concatenate([found[np.isfinite(found)] for found in losses.values()])
    longest = max(found.shape[1] for found in losses.values())
    style: Any = {"smooth": max(1, longest // 50), "xlabel": "outer step"}
    # A few diverged episodes would hide all others.
    most = 10 * abs(float(np.median(every))) if every.size else 0.0
    shown = {"": {label: np.minimum(found, most) for label, found in losses.items()}}
    caption = f"Outer losses, mean and standard error over seeds; what is above {most:.3g} is cut."
    report.add(curves("outer_losses", shown, caption, ylabel="outer loss, running mean", **style))
    return report
