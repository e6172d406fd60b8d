"""Finding recipes, and setting their fields from the command line.

A recipe is a Python file that defines `experiment(field=default, ...) -> Experiment`. Its
parameters are what `--set field=value` may change, converted to the type of their defaults.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lopt.experiment.runs.experiment import Experiment

_PACKAGE = "lopt.experiment.recipes"


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with lopt."""
    package = importlib.import_module(_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def build(recipe: str, settings: Sequence[str] = ()) -> Experiment:
    """Builds the experiment of a recipe.

    Args:
        recipe: the name of a recipe of lopt, or the path of a Python file.
        settings: "field=value", each.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if it defines no experiment, or a setting is not one of its fields.
    """
    function = _load(recipe)
    fields = inspect.signature(function).parameters
    values = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: write it as field=value.")
        if name not in fields:
            raise ValueError(
                f"--set {setting}: recipe {recipe} has no field {name!r}; "
                f"its fields are {', '.join(fields) or 'none'}."
            )
        values[name] = _convert(setting, text, fields[name].default)
    missing = [n for n, p in fields.items() if p.default is p.empty and n not in values]
    if missing:
        raise ValueError(f"Recipe {recipe} needs {missing[0]}: give --set {missing[0]}=VALUE.")
    with _naming(recipe):
        experiment = function(**values)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"Recipe {recipe} returned {type(experiment)}, not a lopt.Experiment.")
    return experiment


def fields_of(recipe: str) -> list[dict[str, str]]:
    """Returns name, type, default and meaning of each field of a recipe.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if it defines no experiment.
    """
    function = _load(recipe)
    _, _, texts = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    meanings = dict(re.findall(r"^ {4}(\w+): (.*)$", re.sub(r"\n {8}", " ", texts), re.MULTILINE))
    return [
        {
            "field": name,
            "type": getattr(field.annotation, "__name__", str(field.annotation)),
            "default": "" if field.default is field.empty else repr(field.default),
            "meaning": meanings.get(name, ""),
        }
        for name, field in inspect.signature(function).parameters.items()
    ]


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


def _load(recipe: str) -> Callable[..., Any]:
    path = Path(recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"There is no recipe file {path}.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} cannot be read as Python.")
        module = importlib.util.module_from_spec(spec)
        with _naming(recipe):
            spec.loader.exec_module(module)
    elif recipe in recipe_names():
        module = importlib.import_module(f"{_PACKAGE}.{recipe}")
    else:
        raise FileNotFoundError(
            f"There is no recipe {recipe!r}; known are {', '.join(recipe_names())}, "
            "or the path of a Python file (ending in .py)."
        )
    function = getattr(module, "experiment", None)
    if not callable(function):
        raise ValueError(f"Recipe {recipe} defines no function experiment(...).")
    return function


def _convert(setting: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"--set {setting}: {text!r} is not a value like {default!r}.") from None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not inspect.Parameter.empty and default is not None:
        expected = type(default)
        if type(value) is not expected:
            raise ValueError(
                f"--set {setting}: {text!r} is {type(value).__name__}, but the field takes "
                f"{expected.__name__}, as in {default!r}."
            )
    return value
