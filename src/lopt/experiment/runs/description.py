"""Configuration objects as JSON, and back, without evaluating anything.

An optimizer is described by the names of lopt's own classes and of functions of Optax and JAX
that are looked up, never executed, when it is read back.
"""

import dataclasses
import functools
import importlib
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
    name = type(thing).__name__
    if dataclasses.is_dataclass(thing) and _look_up(name, _CLASSES) is type(thing):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"class": name, "fields": fields}
    if isinstance(thing, functools.partial) and not thing.args:
        arguments = {key: describe(value) for key, value in thing.keywords.items()}
        return {**describe(thing.func), "arguments": arguments}
    name = getattr(thing, "__name__", "_")
    for module in _FUNCTIONS:
        if callable(thing) and _look_up(name, (module,)) is thing:
            return {"function": f"{module}.{name}"}
    raise TypeError(
        f"{thing!r} cannot be saved: only classes of {', '.join(_CLASSES)} and functions of "
        f"{', '.join(_FUNCTIONS)}, with arguments given by name, can be found again."
    )


def restore(description: Any) -> Any:
    """Returns the object that `describe` described.

    Raises:
        ValueError: if the description names something unknown, or does not fit it.
    """
    if isinstance(description, list):
        return tuple(restore(item) for item in description)
    if not isinstance(description, dict):
        return description
    kind, of = ("class", "fields") if "class" in description else ("function", "arguments")
    name, given = description.get(kind), description.get(of, {})
    if not (isinstance(name, str) and isinstance(given, dict)):
        raise ValueError(f"Not a description: {description!r}.")
    if kind == "class":
        found = _look_up(name, _CLASSES)
        known = isinstance(found, type) and dataclasses.is_dataclass(found)
    else:
        module, _, last = name.rpartition(".")
        found = _look_up(last, (module,) if module in _FUNCTIONS else ())
        known = callable(found)
    if not known:
        raise ValueError(f"There is no {kind} {name!r} in this version of lopt.")
    arguments = {key: restore(value) for key, value in given.items()}
    if kind == "function":
        return functools.partial(found, **arguments) if arguments else found
    try:
        return found(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not fit this version of lopt: {error}") from error


def _look_up(name: str, modules: tuple[str, ...]) -> Any:
    found = (getattr(importlib.import_module(module), name, None) for module in modules)
    return None if name.startswith("_") else next((one for one in found if one is not None), None)
