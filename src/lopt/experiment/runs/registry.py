"""Recipes: finding them, setting their fields, and building their experiments.

A recipe is a Python file with a dataclass `Recipe`, whose fields are what `--set field=value` may
change, and whose `build()` returns an `Experiment`.
"""

import ast
import contextlib
import dataclasses
import importlib
import math
import pkgutil
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.experiment.report import Cell, Interval, Measured, Report
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.files import read_json
from lopt.experiment.runs.storage import pretrained_file, pretrained_names
from lopt.experiment.settings import PretrainedSettings, help_of

_PACKAGE = "lopt.experiment.recipes"
# What the list has of each card.
SHOWN = ("weights", "largest params", "longest horizon", "hours", "licence", "verdict")


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with lopt."""
    package = importlib.import_module(_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def list_recipes(settings: Any) -> Report:
    """Returns a list of the recipes, each with what it says of itself."""
    report = Report("Recipes")
    texts = {name: help_of(load_recipe(name))[0].partition("\n")[0] for name in recipe_names()}
    report.table("Recipes", [{"recipe": name, "what": text} for name, text in texts.items()])
    return report


def list_pretrained(settings: PretrainedSettings) -> Report:
    """Returns a list of what comes with lopt, or the card of one."""
    names = pretrained_names() if settings.name is None else (settings.name,)
    cards = {name: read_json(pretrained_file(name).with_suffix(".json")) for name in names}
    report = Report("Pretrained optimizers")
    if settings.name is None:
        rows = [{"name": name, **{key: card[key] for key in SHOWN}} for name, card in cards.items()]
        report.table("lopt.pretrained(NAME); more of each: lopt pretrained NAME", rows)
        report.text("" if rows else "No pretrained optimizer comes with this lopt.")
        return report
    (name, card), *_ = cards.items()
    tables = card.pop("evaluation")
    report.table("", [{"": key, name: _cell(value)} for key, value in card.items()])
    for one in tables:
        report.table(one["table"], [{k: _cell(v) for k, v in row.items()} for row in one["rows"]])
    return report


def _cell(value: Any) -> Cell:
    """Returns what JSON has as a cell of a table."""
    if not isinstance(value, dict):
        return value
    if not {"mean", "low"} & {*value}:
        return ", ".join(f"{key}={one}" for key, one in value.items())
    numbers = {key: float("nan" if one is None else one) for key, one in value.items()}
    return Measured(**numbers) if "mean" in numbers else Interval(**numbers)


def describe_recipe(recipe: str) -> Report:
    """Returns name, type, default and meaning of each field of a recipe."""
    found = load_recipe(recipe)
    about, meanings = help_of(found)
    rows = [
        {
            "field": field.name,
            "type": getattr(field.type, "__name__", str(field.type)),
            "default": "-" if _default(field) is None else repr(_default(field)),
            "meaning": meanings.get(field.name, ""),
        }
        for field in dataclasses.fields(found)
    ]
    report = Report(f"The recipe {recipe}")
    report.text(about)
    report.table(f"lopt train {recipe}: fields, as in --set FIELD=VALUE", rows)
    return report


def build(recipe: str, settings: Sequence[str] = ()) -> Experiment:
    """Builds the experiment of a recipe, a name or a Python file, with settings "field=value"."""
    return make(recipe, parsed(settings))[1]


def seed_of(recipe: str, values: Mapping[str, str], seeds: int) -> int:
    """Returns the seed of a recipe with some fields set; a ValueError if it takes none."""
    fields = {field.name: field for field in dataclasses.fields(load_recipe(recipe))}
    if "seed" not in fields:
        raise ValueError(
            f"--seeds {seeds}: the recipe {recipe} has no field seed; leave --seeds out, or add "
            "the field and give it to lopt.Experiment."
        )
    default = _default(fields["seed"])
    return _convert("seed", values.get("seed", default), default)


def parsed(settings: Sequence[str]) -> dict[str, str]:
    """Returns values as text, by field, of settings such as "horizon=100"."""
    values = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: write it as field=value.")
        values[name] = text
    return values


def make(
    recipe: str, values: Mapping[str, Any], copies: Path | None = None
) -> tuple[Any, Experiment]:
    """Returns a recipe with some fields set, and its experiment.

    Values are text or as JSON has them. Where a folder of copies has one of the weights that a
    field names, as FIELD.safetensors, that is taken.
    """
    found = load_recipe(recipe)
    fields, given = {field.name: field for field in dataclasses.fields(found)}, {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"--set {name}={value}: recipe {recipe} has no field {name!r}; "
                f"its fields are {', '.join(fields) or 'none'}."
            )
        given[name] = _convert(name, value, _default(fields[name]))
        copied = copies and copies / f"{name}.safetensors"
        if copied and isinstance(given[name], Path) and copied.exists():
            given[name] = copied
    with _naming(recipe):
        made = found(**given)
        experiment = made.build()
    if not isinstance(experiment, Experiment):
        raise ValueError(f"Recipe {recipe} returned {type(experiment)}, not a lopt.Experiment.")
    return made, experiment


def run_file(path: Path, kind: str) -> types.ModuleType:
    """Returns the module that a Python file is; its code is executed."""
    module = types.ModuleType(f"{kind} {path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look up names in annotations
    # Not by import, which would take a compiled file beside it for it.
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
    return module


def load_recipe(recipe: str) -> Any:
    """Returns the dataclass of a recipe; the code of a file is executed."""
    path = Path(recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"There is no recipe file {path}.")
        with _naming(recipe):
            module = run_file(path, "recipe")
    elif (name := recipe.replace("-", "_")) in recipe_names():
        module = importlib.import_module(f"{_PACKAGE}.{name}")
    else:
        raise FileNotFoundError(
            f"There is no recipe {recipe!r}; known are {', '.join(recipe_names())}, "
            "or the path of a Python file (ending in .py)."
        )
    found = getattr(module, "Recipe", None)
    if not (dataclasses.is_dataclass(found) and callable(getattr(found, "build", None))):
        raise ValueError(f"Recipe {recipe} defines no dataclass Recipe with a method build().")
    return found


@contextlib.contextmanager
def _naming(recipe: str) -> Iterator[None]:
    """Turns what goes wrong inside of a recipe into an error that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Recipe {recipe} failed with {type(error).__name__}: {error} "
            "(LOPT_TRACEBACK=1 shows where)"
        ) from error


def _default(field: Any) -> Any:
    """Returns the default of a field; None if it has none, or none in this environment."""
    if field.default_factory is not dataclasses.MISSING:
        with contextlib.suppress(Exception):
            return field.default_factory()
        return None
    return None if field.default is dataclasses.MISSING else field.default


def _convert(name: str, value: Any, default: Any) -> Any:
    """Returns a value of a field as one of the type of its default."""
    if isinstance(default, str | Path) and isinstance(value, str):
        return type(default)(value)
    wrong = f"--set {name}={value}: {value!r} is not a value like {default!r}"
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{wrong}.") from None
    if isinstance(value, list):
        value = tuple(value)
    if type(default) is float and type(value) is int:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{wrong}: it must be finite.")
    if default is not None and type(value) is not type(default):
        kinds = type(value).__name__, type(default).__name__
        raise ValueError(f"{wrong}: it is {kinds[0]}, but the field takes {kinds[1]}.")
    return value
