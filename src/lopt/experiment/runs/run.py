"""A run: a folder, opened once, with its experiment, weights and log.

`run.json` says what a run is: recipe and settings, the data that it loads, the versions and devices
that it began with. What the settings name is copied beside it, so that a run can be moved. A recipe
file is code: it is executed only where it was run before, or with `trust`.
"""

import contextlib
import functools
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.data.datasets import data_loaded
from lopt.experiment.runs import storage
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.files import (
    digest,
    locked,
    read_columns,
    read_json,
    write_bytes,
    write_json,
)
from lopt.experiment.runs.registry import (
    experiment_of,
    load_recipe,
    make_recipe,
    parsed,
    values_of,
    weights_fields,
)

FORMAT = 2
LOGGED = ("meta_loss", "finite", "dropped", "seconds")
_TYPES = {"format": int, "recipe": str, "settings": dict, "data": list, "made_with": dict}
_TYPES |= {"experiment": str}


class Run:
    """The folder of a run, which evaluate, record, distill and the probes are given.

    Attributes:
        folder: of the run.
        trust: whether a recipe file is executed that was not run on this machine before.
        config: the content of run.json.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False) -> None:
        """Reads what a run is; nothing of it is executed.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if its run.json is damaged, or of another version.
        """
        self.folder, self.trust = Path(folder), trust
        path = self.folder / "run.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no run (it has no run.json); begin one with "
                f"lopt train RECIPE --run {folder}."
            )
        self.config: dict[str, Any] = read_json(path, sealed=True)
        wrong = [name for name, kind in _TYPES.items() if type(self.config.get(name)) is not kind]
        if wrong or self.config["format"] != FORMAT:
            raise ValueError(
                f"{path} is damaged or of another version of lopt (see {', '.join(wrong)} format); "
                "restore it from a copy, or begin a new run; lopt.load still loads its weights."
            )

    @classmethod
    def create(cls, folder: Path, recipe: str, settings: Sequence[str] = ()) -> "Run":
        """Builds an experiment and makes the folder of a new run of it.

        Args:
            folder: of the run.
            recipe: the name of a recipe of lopt, or the path of a Python file.
            settings: "field=value", each.

        Raises:
            FileExistsError: if the folder already holds a run.
            FileNotFoundError, ValueError: if the recipe, a setting or an evaluation cannot work;
                nothing is written then.
        """
        if holds_run(folder):
            raise FileExistsError(
                f"{folder} already holds a run; continue it with lopt train --resume {folder}, "
                "or give another folder with --run."
            )
        with data_loaded() as data:
            made = make_recipe(recipe, load_recipe(recipe), parsed(settings))
            experiment = experiment_of(recipe, made)
        experiment.check_evaluations()
        is_file = recipe.endswith(".py")
        config = {
            "format": FORMAT,
            "recipe": str(Path(recipe).resolve()) if is_file else recipe,
            "recipe_sha256": digest(Path(recipe)) if is_file else None,
            "settings": values_of(made),
            "data": data,
            "made_with": _surroundings(),
            "experiment": printed(experiment),
        }
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", config, new=True, sealed=True)
        except FileExistsError:
            raise FileExistsError(f"{folder} was taken by another run at this moment.") from None
        except OSError as error:
            raise type(error)(
                f"The folder {folder} cannot be made ({error}); try another."
            ) from error
        if is_file:
            write_bytes(folder / "recipe.py", Path(recipe).read_bytes())
            _trust(config["recipe_sha256"])
        for name in weights_fields(made):
            source = storage.weights_file(getattr(made, name))
            write_bytes(folder / f"{name}.safetensors", source.read_bytes())
        run = cls(folder)
        vars(run)["_built"] = experiment, data
        return run

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def experiment(self) -> Experiment:
        """What is trained, built from its recipe again.

        Raises:
            ValueError: if the recipe fails, was edited, or is not trusted.
        """
        return self._built[0]

    @functools.cached_property
    def _built(self) -> tuple[Experiment, list[dict[str, Any]]]:
        recipe = self._recipe()
        with data_loaded() as data, _naming(self.folder):
            found, values = load_recipe(recipe), dict(self.config["settings"])
            for name in weights_fields(found):
                if (copied := self.folder / f"{name}.safetensors").exists():
                    values[name] = str(copied)
            return experiment_of(recipe, make_recipe(recipe, found, values)), data

    def _recipe(self) -> str:
        """Returns the recipe: its name, or a file whose code is the recorded one."""
        recipe, expected = self.config["recipe"], self.config.get("recipe_sha256")
        if not recipe.endswith(".py"):
            return recipe
        places = [Path(recipe), self.folder / "recipe.py"]
        same = [path for path in places if path.is_file() and digest(path) == expected]
        if not same:
            raise ValueError(
                f"The recipe {recipe} was edited since {self.folder} began, and so was its copy "
                "there; begin a new run instead."
            )
        if self.trust:
            _trust(expected)
        elif not (_trusted() / str(expected)).exists():
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
        """The learned optimizer."""
        return self._weights[0]

    @property
    def theta(self) -> Theta:
        """Its latest weights.

        Raises:
            FileNotFoundError: if there are none yet.
            ValueError: if they are damaged.
        """
        return self._weights[1]

    @functools.cached_property
    def inner(self) -> InnerTraining:
        """The inner training: the first in the estimator of the meta-gradient.

        Raises:
            ValueError: if there is none.
        """
        inner = self.experiment.inner_training()
        if inner is None:
            raise ValueError(f"The estimator of the run {self.folder} has no InnerTraining.")
        return inner

    @functools.cached_property
    def log(self) -> dict[str, Float[np.ndarray, " outer"]]:
        """Numbers of each outer step: "meta_loss", "finite", "dropped", "seconds"."""
        return dict(zip(LOGGED, read_columns(self.folder / "metrics.jsonl", LOGGED), strict=True))

    def changes(self) -> list[str]:
        """Returns what differs from when the run began: versions, devices, data, in words."""
        then, now = self.config["made_with"], _surroundings()
        lines = [
            f"{name} was {then.get(name)} when the run began, and is {now[name]} now"
            for name in now
            if then.get(name) != now[name]
        ]
        if self._built[1] != self.config["data"]:
            lines.append("other data files are found than when the run began")
        return lines

    def check_unchanged(self) -> None:
        """Refuses to continue a run with another experiment than it began with.

        Raises:
            ValueError: if recipe or data give another one.
        """
        same = _squeezed(printed(self.experiment)) == _squeezed(self.config["experiment"])
        if not same or self._built[1] != self.config["data"]:
            raise ValueError(
                f"The recipe {self.config['recipe']} no longer gives the experiment that "
                f"{self.folder} began with (its code or the data files are others); begin a new "
                "run instead."
            )

    def lengthen(self, settings: Sequence[str]) -> "Run":
        """Returns the run with more outer steps: run.json is written again.

        Args:
            settings: "outer_steps=N", N at least as many as were done.

        Raises:
            ValueError: for other settings, or if N steps were done before.
        """
        self.check_unchanged()
        values = parsed(settings)
        if set(values) != {"outer_steps"} or "outer_steps" not in self.config["settings"]:
            raise ValueError(
                f"lopt train --resume {self.folder} --set {' '.join(settings)}: of a run that has "
                "begun, nothing but outer_steps can be set."
            )
        with locked(self.folder):
            done = max(storage.checkpoints(self.folder / "checkpoints"), default=0)
            longer = Run(self.folder, trust=self.trust)
            longer.config["settings"] |= values
            made = longer.experiment
            if made.outer_steps < done:
                raise ValueError(
                    f"--set outer_steps={made.outer_steps}: {self.folder} has done {done}; give "
                    "more."
                )
            longer.config["settings"]["outer_steps"] = made.outer_steps
            longer.config["experiment"] = printed(made)
            write_json(self.folder / "run.json", longer.config, sealed=True)
        return longer


def holds_run(folder: Path) -> bool:
    """Returns whether anything of a run is in a folder."""
    names = ("run.json", "metrics.jsonl", "weights.safetensors")
    return any((folder / name).exists() for name in names) or bool(
        storage.checkpoints(folder / "checkpoints")
    )


def printed(experiment: Experiment) -> str:
    """Returns the experiment as text, without the addresses of functions in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(experiment))


def _squeezed(text: str) -> str:
    """Returns text without its layout, nor a word that tells whether functions are type-checked."""
    return re.sub(r"\s+|wrapped ", "", text)


def _surroundings() -> dict[str, str]:
    devices = jax.devices()
    versions = {name: version(name) for name in ("lopt", "jax", "equinox", "optax")}
    found = f"{len(devices)} x {devices[0].device_kind}"
    return {"python": platform.python_version(), **versions, "devices": found}


def _trusted() -> Path:
    """Returns the folder with an empty file for each recipe file that was run on this machine."""
    return cache_folder() / "trusted"


def _trust(sha256: Any) -> None:
    with contextlib.suppress(OSError):  # without the file, --trust is asked for again
        write_bytes(_trusted() / str(sha256), b"")


@contextlib.contextmanager
def _naming(folder: Path) -> Any:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'}: {error}") from error
