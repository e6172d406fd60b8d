"""Configuration objects as JSON, and back, without evaluating anything.

An optimizer is described by the names of lopt's own classes and of functions of Optax and JAX
that are looked up, never executed, when it is read back.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

# Where named things may come from: classes of lopt, functions of these modules.
_CLASSES = ("lopt.core", "lopt.learned", "lopt.symbolic")
_FUNCTIONS = ("optax", "jax.nn", "lopt.learned")


def describe(thing: Any) -> Any:
    """Returns a JSON description of a learned optimizer.

    Raises:
        TypeError: if it holds something that has no name in lopt, Optax or JAX.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, tuple | list):
        return [describe(item) for item in thing]
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        name = type(thing).__name__
        if _look_up(name, _CLASSES) is not type(thing):
            raise TypeError(
                f"{name} cannot be saved: it is not a class of {' or '.join(_CLASSES)}."
            )
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"class": name, "fields": fields}
    if isinstance(thing, functools.partial):
        if thing.args:
            raise TypeError(f"{thing} cannot be saved: give its arguments by name.")
        keywords = {name: describe(value) for name, value in thing.keywords.items()}
        return {"function": _name_of(thing.func), "arguments": keywords}
    if callable(thing):
        return {"function": _name_of(thing)}
    raise TypeError(f"{thing!r} cannot be saved: only configuration of lopt can.")


def restore(description: Any) -> Any:
    """Returns the object that `describe` described.

    Raises:
        ValueError: if the description names something unknown, or does not fit it.
    """
    if isinstance(description, list):
        return tuple(restore(item) for item in description)
    if not isinstance(description, dict):
        return description
    if "class" in description:
        name = description["class"]
        found = _look_up(name, _CLASSES)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise ValueError(f"There is no class {name!r} in this version of lopt.")
        fields = {key: restore(value) for key, value in description.get("fields", {}).items()}
        try:
            return found(**fields)
        except TypeError as error:
            raise ValueError(f"{name} does not fit this version of lopt: {error}") from error
    if "function" in description:
        function = _function(description["function"])
        arguments = {key: restore(value) for key, value in description.get("arguments", {}).items()}
        return functools.partial(function, **arguments) if arguments else function
    raise ValueError(f"Not a description: {description!r}.")


def _look_up(name: str, modules: tuple[str, ...]) -> Any:
    for module in modules:
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found
    return None


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", "")
    for module in _FUNCTIONS:
        if getattr(importlib.import_module(module), name, None) is function:
            return f"{module}.{name}"
    raise TypeError(
        f"{function} cannot be saved: only functions of {' or '.join(_FUNCTIONS)} can be found "
        "again by name."
    )


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found = _look_up(name, (module,)) if module in _FUNCTIONS else None
    if not callable(found) or name.startswith("_"):
        raise ValueError(f"There is no function {path!r}; known are those of {_FUNCTIONS}.")
    return found
