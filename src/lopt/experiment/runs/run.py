"""A run: a folder, opened once, with its experiment, weights and log.

`run.json` says what a run is: recipe and settings, the data that it loads, the versions and devices
that it began with. What the settings name is copied beside it, so that a run can be moved. A recipe
file is code: it is executed only where it was run before, or with `trust`.
"""

import contextlib
import dataclasses
import functools
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import wadler_lindig as wl
from jaxtyping import Float

from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.estimators import particle_mesh
from lopt.experiment.data.datasets import data_loaded
from lopt.experiment.report import Report, curves, running_mean
from lopt.experiment.runs import files, storage
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.loggers import Logger, check_installed
from lopt.experiment.runs.registry import make, parsed

FORMAT = 2
# What says that a folder holds runs of several seeds, and of what.
SEEDS = "seeds.json"
LOGGED = ("meta_loss", "finite", "dropped", "seconds")


class Run:
    """The folder of a run, which evaluate, record, distill and the probes are given.

    Its `config` is the content of run.json; `trust` is whether a recipe file is executed that was
    not run on this machine before.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False) -> None:
        """Reads what a run is; nothing of it is executed."""
        self.folder, self.trust = Path(folder), trust
        path = self.folder / "run.json"
        if not path.exists():
            if seeds := [one.parent for one in sorted(self.folder.glob("seed-*/run.json"))]:
                raise FileNotFoundError(
                    f"{folder} holds runs of several seeds; give that of one, such as {seeds[0]}."
                )
            raise FileNotFoundError(
                f"{folder} holds no run (it has no run.json); begin one with "
                f"lopt train RECIPE --run {folder}."
            )
        self.config: dict[str, Any] = files.read_json(path, sealed=True)
        if self.config.get("format") != FORMAT:
            raise ValueError(
                f"{path} is of another version of lopt; begin a new run; lopt.load still loads its "
                "weights."
            )

    @classmethod
    def create(
        cls,
        folder: Path,
        recipe: str,
        settings: Sequence[str] = (),
        loggers: Sequence[str] = (),
        check: Callable[[Experiment], Any] = lambda experiment: particle_mesh(experiment.meta),
    ) -> "Run":
        """Makes the folder of a new run, of an experiment that is built as `build` does.

        What is refused, also by `check`, leaves nothing written. Loggers are named as those of an
        experiment, and used besides.
        """
        if holds_run(folder):
            raise FileExistsError(
                f"{folder} already holds a run; continue it with lopt train --resume {folder}, "
                "or give another folder with --run."
            )
        with data_loaded() as data:
            made, experiment = make(recipe, parsed(settings))
        experiment.check_evaluations()
        check(experiment)
        check_installed((*experiment.loggers, *loggers))
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        paths = {name: value for name, value in fields.items() if isinstance(value, Path)}
        weights = {name: path for name, path in paths.items() if path.name}
        fields |= dict.fromkeys(paths, ".")  # of what is empty
        code = Path(recipe) if Path(recipe).suffix == ".py" else None
        config = {
            "format": FORMAT,
            "recipe": str(code.resolve()) if code else recipe,
            "recipe_sha256": files.digest(code) if code else None,
            "settings": fields | {name: str(path.resolve()) for name, path in weights.items()},
            "loggers": list(loggers),
            "data": data,
            "made_with": surroundings(),
            "experiment": printed(experiment),
        }
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            files.write_json(folder / "run.json", config, new=True, sealed=True)
        except OSError as error:
            said = f"The folder {folder} cannot be made ({error}); try another."
            raise type(error)(said) from error
        if code:
            files.write_bytes(folder / "recipe.py", code.read_bytes())
            _trust(files.digest(code))
        for name, path in weights.items():
            source = storage.weights_file(path)
            files.write_bytes(folder / f"{name}.safetensors", source.read_bytes())
        run = cls(folder)
        vars(run)["_built"] = experiment, data
        return run

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def experiment(self) -> Experiment:
        """What is trained, built from its recipe again; a ValueError if it is not to be trusted."""
        return self._built[0]

    @functools.cached_property
    def _built(self) -> tuple[Experiment, list[dict[str, Any]]]:
        recipe = self.trust_recipe()
        with data_loaded() as data:
            try:
                return make(recipe, self.config["settings"], self.folder)[1], data
            except ValueError as error:
                raise ValueError(f"{self.folder / 'run.json'}: {error}") from error

    def trust_recipe(self) -> str:
        """Returns the recipe, its name or a file of the recorded code, if it may be executed."""
        recipe, expected = self.config["recipe"], self.config["recipe_sha256"]
        if Path(recipe).suffix != ".py":
            return recipe
        places = [Path(recipe), self.folder / "recipe.py"]
        same = [path for path in places if path.is_file() and files.digest(path) == expected]
        if not same:
            raise ValueError(
                f"The recipe {recipe} and its copy in {self.folder} are gone, or were edited since "
                "the run began; put one back, or begin a new run."
            )
        if self.trust:
            _trust(expected)
        elif not _mark(expected).exists():
            raise ValueError(
                f"{self.folder} was made by the recipe {recipe}, Python code that was not run on "
                f"this machine before; read {same[0]}, and add --trust to run it."
            )
        return str(same[0])

    @functools.cached_property
    def _weights(self) -> tuple[AbstractLearnedOptimizer, Theta]:
        return storage.load(self.folder, self.experiment.learned)

    @property
    def learned(self) -> AbstractLearnedOptimizer:
        """The learned optimizer, as `theta` was saved with it."""
        return self._weights[0]

    @property
    def theta(self) -> Theta:
        """Its latest weights; see `lopt.load` for what is refused."""
        return self._weights[1]

    @property
    def inner(self) -> InnerTraining:
        """The inner training: the first in the estimator."""
        return self.experiment.inner_training()

    @property
    def log(self) -> dict[str, Float[np.ndarray, " outer"]]:
        """Numbers of each outer step: "meta_loss", "finite", "dropped", "seconds"."""
        columns = files.read_columns(self.folder / "metrics.jsonl", LOGGED)
        return dict(zip(LOGGED, columns, strict=True))

    @property
    def loggers(self) -> tuple[str | Logger, ...]:
        """Those of its experiment, and those that were added."""
        return tuple(dict.fromkeys([*self.experiment.loggers, *self.config.get("loggers", ())]))

    def add_loggers(self, names: Sequence[str]) -> None:
        """Adds loggers by name, also in run.json."""
        check_installed(names)
        with files.locked(self.folder):
            self.config["loggers"] = [*self.config.get("loggers", ()), *names]
            files.write_json(self.folder / "run.json", self.config, sealed=True)

    def _repr_html_(self) -> str:
        """Returns the run for a notebook: how far it is, its settings, its meta-loss."""
        report, log = Report(f"Run {self.name}"), self.log
        report.text(f"{log['seconds'].size} outer steps of {self.config['recipe']} are logged.")
        settings = self.config["settings"]
        report.table("Settings", [{"field": k, "value": str(v)} for k, v in settings.items()])
        add_log(report, log)
        return report._repr_html_()

    def changes(self) -> list[str]:
        """Returns what differs from when the run began: versions and devices, in words."""
        then, now = self.config["made_with"], surroundings()
        return [
            f"{name} was {then.get(name)} when the run began, and is {value} now"
            for name, value in now.items()
            if then.get(name) != value
        ]

    def check_unchanged(self) -> None:
        """Refuses to continue a run whose recipe or data no longer give its experiment."""
        same = printed(self.experiment) == self.config["experiment"]
        if not same or self._built[1] != self.config["data"]:
            raise ValueError(
                f"The recipe {self.config['recipe']} no longer gives the experiment that "
                f"{self.folder} began with (its {'data files' if same else 'code'} changed); begin "
                "a new run instead."
            )

    def lengthen(self, settings: Sequence[str]) -> "Run":
        """Returns the run with more outer steps, as `outer_steps=N` says, also in run.json."""
        self.check_unchanged()
        values = parsed(settings)
        if set(values) != {"outer_steps"}:
            raise ValueError(
                f"lopt train --resume {self.folder} --set {' '.join(settings)}: of a run that has "
                "begun, nothing but outer_steps can be set."
            )
        with files.locked(self.folder):
            longer = Run(self.folder, trust=self.trust)
            longer.config["settings"] |= values
            steps = longer.experiment.outer_steps
            done = max(storage.checkpoints(self.folder / "checkpoints"), default=0)
            if steps < done:
                raise ValueError(
                    f"--set outer_steps={steps}: {self.folder} has done {done}; give more."
                )
            longer.config["settings"]["outer_steps"] = steps
            longer.config["experiment"] = printed(longer.experiment)
            files.write_json(self.folder / "run.json", longer.config, sealed=True)
        return longer


def add_log(report: Report, *logs: Mapping[str, Float[np.ndarray, " outer"]]) -> None:
    """Adds to a report how long meta-training took, what was left out, and the meta-loss.

    Of several seeds it has the mean over them, and a band.
    """
    length = min(len(log["seconds"]) for log in logs)
    report.data["outer_steps"] = length
    seconds = max(float(np.nansum(log["seconds"])) for log in logs)  # they are side by side
    report.data["seconds_of_meta_training"] = seconds
    if skipped := sum(int(np.sum(log["finite"] == 0)) for log in logs):
        report.text(f"Skipped outer steps: {skipped}.")
    if dropped := sum(int(np.nansum(log["dropped"])) for log in logs):
        report.text(f"Dropped particles: {dropped}.")
    rows, places = [], np.arange(length)
    for losses in (log["meta_loss"][:length] for log in logs):
        if (seen := np.flatnonzero(np.isfinite(losses))).size:
            rows.append(np.interp(places, seen, losses[seen]))
    if rows:
        filled, width = np.stack(rows), max(1, length // 50)
        lines = {"each outer step": filled} if len(rows) == 1 else {}
        lines["learned"] = running_mean(filled, width)
        style: Any = {"log": False, "xlabel": "outer step", "ylabel": "meta-loss"}
        about = f"The meta-loss, and its mean over {width} outer steps"
        about += f"; mean and standard error over {len(rows)} seeds." if len(rows) > 1 else "."
        report.add(curves("meta_training", {"Meta-training": lines}, about, **style))


def holds_run(folder: Path) -> bool:
    """Returns whether anything of a run, or runs of several seeds, are in a folder."""
    names = ("run.json", "metrics.jsonl", "weights.safetensors", SEEDS)
    found = [name for name in names if (folder / name).exists()]
    return bool(found or storage.checkpoints(folder / "checkpoints"))


def printed(thing: Any) -> str:
    """Returns an experiment, or a part, as one line that is the same in every process."""

    def own(node: Any) -> Any:  # relu, and not what wraps it
        return wl.pdoc(node.fun) if isinstance(node, jax.custom_jvp | jax.custom_vjp) else None

    # What hides defaults takes numbers for them by identity, which those of a file have not.
    return without_addresses(wl.pformat(thing, width=2**30, hide_defaults=False, custom=own))


def without_addresses(text: str) -> str:
    """Returns text in which functions have no addresses, and no type checker around them."""
    return re.sub(r" at 0x[0-9a-f]+|wrapped ", "", text)


def surroundings() -> dict[str, str]:
    """Returns the versions and the devices that there are."""
    versions = {name: version(name) for name in ("lopt", "jax", "equinox", "optax")}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"python": platform.python_version(), **versions, "devices": devices}


def _mark(sha256: str) -> Path:
    """Returns an empty file that is there if a recipe file was run on this machine."""
    return cache_folder() / "trusted" / sha256


def _trust(sha256: str) -> None:
    with contextlib.suppress(OSError):  # without the file, --trust is asked for again
        files.write_bytes(_mark(sha256), b"")
