"""Configuration objects as JSON, and back, without evaluating anything.

An optimizer is described by the names of lopt's own classes, of functions of Optax and JAX, and of
what was registered: names that are looked up, never executed, when it is read back.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

# Where named things may come from: classes of lopt, functions of these modules.
_CLASSES = ("lopt.core", "lopt.learned", "lopt.symbolic")
_FUNCTIONS = ("optax", "jax.nn", "lopt.learned")
# What users registered, by the name that files have for it.
_REGISTERED: dict[str, Any] = {}
_Own = TypeVar("_Own", bound=Callable[..., Any])


def register(own: _Own) -> _Own:
    """Lets files of `lopt.save` name a class or function of one's own; a decorator.

    Whoever loads such a file imports the module first: no file can make lopt import anything.

    Args:
        own: a dataclass or Equinox module, or a function; it keeps its name in files.

    Raises:
        ValueError: if something else has the name already, in lopt or registered.
    """
    name, other = own.__name__, _REGISTERED.get(own.__name__, own)
    # A cell of a notebook that is run again defines its class again.
    again = (other.__module__, other.__qualname__) == (own.__module__, own.__qualname__)
    if _look_up(name, _CLASSES) or not again:
        raise ValueError(f"register({name}): something else has this name; try My{name}.")
    _REGISTERED[name] = own
    return own


def describe(thing: Any) -> Any:
    """Returns a JSON description of a learned optimizer; a TypeError names what has no name."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, jax.Array) and not thing.shape:
        return thing.item()
    if isinstance(thing, tuple | list):
        return [describe(item) for item in thing]
    if isinstance(thing, functools.partial) and not thing.args:
        arguments = {key: describe(value) for key, value in thing.keywords.items()}
        return describe(thing.func) | {"arguments": arguments}
    kind = type(thing).__name__
    if dataclasses.is_dataclass(thing) and _class(kind) is type(thing):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"class": kind, "fields": fields}
    name = getattr(thing, "__name__", "_")
    if callable(thing) and _REGISTERED.get(name) is thing:
        return {"function": name}
    for module in _FUNCTIONS:
        if callable(thing) and _look_up(name, [module]) is thing:
            return {"function": f"{module}.{name}"}
    raise TypeError(
        f"{thing!r} cannot be saved: only classes of {', '.join(_CLASSES)}, functions of "
        f"{', '.join(_FUNCTIONS)}, such as functools.partial(optax.adam, learning_rate=1e-3), and "
        "what is registered with @lopt.register can be found again."
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
        found = _class(name)
        known = dataclasses.is_dataclass(found)
    else:
        module, _, last = name.rpartition(".")
        found = _look_up(last, [module]) if module in _FUNCTIONS else _REGISTERED.get(name)
        known = callable(found)
    if not known:
        raise ValueError(f"there is no {kind} {name!r}; import what registers it")
    arguments = {key: restore(value) for key, value in arguments.items()}
    if kind == "class":
        return found(**arguments)
    return functools.partial(found, **arguments) if arguments else found


def _class(name: str) -> Any:
    return _look_up(name, _CLASSES) or _REGISTERED.get(name)


def _look_up(name: str, modules: Sequence[str]) -> Any:
    found = (getattr(importlib.import_module(module), name, None) for module in modules)
    return None if name.startswith("_") else next((one for one in found if one is not None), None)
