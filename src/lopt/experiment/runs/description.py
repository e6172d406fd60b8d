"""Configuration objects as JSON, and back, without evaluating anything.

An optimizer is described by the names of lopt's own classes and of functions of Optax and JAX
that are looked up, never executed, when it is read back.
"""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
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
    if isinstance(thing, functools.partial) and not thing.args:
        arguments = {key: describe(value) for key, value in thing.keywords.items()}
        return describe(thing.func) | {"arguments": arguments}
    kind = type(thing).__name__
    if dataclasses.is_dataclass(thing) and _look_up(kind, _CLASSES) is type(thing):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"class": kind, "fields": fields}
    name = getattr(thing, "__name__", "_")
    for module in _FUNCTIONS:
        if callable(thing) and _look_up(name, [module]) is thing:
            return {"function": f"{module}.{name}"}
    raise TypeError(
        f"{thing!r} cannot be saved: only classes of {', '.join(_CLASSES)} and functions of "
        f"{', '.join(_FUNCTIONS)}, with arguments given by name, can be found again."
    )


def restore(description: Any) -> Any:
    """Returns the object that `describe` described; fails anyhow where it described none."""
    if isinstance(description, list):
        return tuple(restore(item) for item in description)
    if not isinstance(description, dict):
        return description
    kind, of = ("class", "fields") if "class" in description else ("function", "arguments")
    name, arguments = description[kind], description.get(of, {})
    if kind == "class":
        found = _look_up(name, _CLASSES)
        known = dataclasses.is_dataclass(found)
    else:
        module, _, last = name.rpartition(".")
        found = _look_up(last, [module] if module in _FUNCTIONS else [])
        known = callable(found)
    if not known:
        raise ValueError(f"there is no {kind} {name!r}")
    arguments = {key: restore(value) for key, value in arguments.items()}
    if kind == "class":
        return found(**arguments)
    return functools.partial(found, **arguments) if arguments else found


def _look_up(name: str, modules: Sequence[str]) -> Any:
    found = (getattr(importlib.import_module(module), name, None) for module in modules)
    return None if name.startswith("_") else next((one for one in found if one is not None), None)
