"""Checks of what things are built from: errors name class, field, value and remedy."""

from typing import Any

# Steps are counted in 32 bits, and lengths are rounded to whole windows: half of what would fit.
LONGEST = 2**30


def check_integer(
    owner: str, field: str, value: Any, least: int = 1, most: int | None = None, hint: object = 16
) -> None:
    """Refuses what is not a Python integer from `least` to `most`.

    Those of numpy are refused too, and so are booleans.

    Raises:
        ValueError: with `hint` as the remedy.
    """
    said = f"{owner}({field}={value!r}) must be"
    plain = isinstance(value, int) and not isinstance(value, bool)
    if not plain or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        not_that = "" if plain else f", of Python's int and not {type(value).__name__}"
        raise ValueError(f"{said} {kind}{not_that}; try {hint}.")
    if most is not None and value > most:
        raise ValueError(f"{said} at most {most}, as steps are counted in 32 bits; try {most}.")
