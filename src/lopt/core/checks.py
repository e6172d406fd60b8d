"""Checks of values: errors name class, field, value and remedy."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

# Steps are counted in 32 bits, and lengths are rounded to whole windows: half of what would fit.
LONGEST = 2**30


def check_integer(
    owner: str, field: str, value: Any, least: int = 1, most: int | None = None, hint: object = 16
) -> None:
    """Refuses what is not a Python integer from `least` to `most`; `hint` is the remedy."""
    said = f"{owner}({field}={value!r}) must be"
    if type(value) is not int or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        types = "" if type(value) is int else f", of Python's int and not {type(value).__name__}"
        raise ValueError(f"{said} {kind}{types}; try {hint}.")
    if most is not None and value > most:
        reason = ", as steps are counted in 32 bits" if most == LONGEST else ""
        raise ValueError(f"{said} at most {most}{reason}; try {most}.")


def check_positive(owner: str, field: str, value: Any, hint: object) -> None:
    """Refuses what is not a positive and finite number; `hint` is the remedy."""
    if not is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"{owner}({field}={value!r}) must be positive and finite; try {hint}.")


def check_length(run: str, steps: int | None, max_steps: int | None, remedy: str = "") -> None:
    """Refuses a run, in words, of more steps (None: without end) than its learned optimizer has."""
    if max_steps is None or (steps is not None and steps <= max_steps):
        return
    raise ValueError(
        f"{run} is longer than a schedule of its learned optimizer, which has values for "
        f"{max_steps} steps; try {remedy or f'at most {max_steps} steps'}, or "
        f"{'a schedule without an end' if steps is None else 'a longer schedule'}."
    )


def check_key(owner: str, key: Any) -> None:
    """Refuses what is not one typed key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape:
        raise TypeError(f"{owner}(key={key!r}) needs a single typed key; try jax.random.key(0).")


def not_floats(params: Any) -> str | None:
    """Returns path and type of the first leaf that is no float, such as "['n'] is int32"."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(kind, jnp.floating):
            return f"{jax.tree_util.keystr(path)} is {getattr(kind, '__name__', kind)}"
    return None


def is_real(value: Any) -> bool:
    """Returns whether something is a real number and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
