"""What several tasks share: log-uniform draws, and checks of numbers at construction."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Key


def log_uniform(
    key: Key, low: float, high: float, shape: tuple[int, ...] = ()
) -> Float[Array, "..."]:
    """Returns exp(u), u uniform between log(low) and log(high)."""
    uniform = jax.random.uniform(key, shape)
    return jnp.exp(math.log(low) + (math.log(high) - math.log(low)) * uniform)


def check_range(owner: str, low: float, high: float) -> None:
    """Checks the ends of a log-uniform range.

    Raises:
        ValueError: unless 0 < low <= high < infinity.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(
            f"{owner}(low={low!r}, high={high!r}) must satisfy 0 < low <= high < infinity; "
            "try low=0.1, high=10.0."
        )


def check_count(owner: str, field: str, value: int, least: int, remedy: int) -> None:
    """Checks a number of things.

    Raises:
        ValueError: unless `value` is an integer of at least `least`.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"{owner}({field}={value!r}) must be an integer of at least {least}; "
            f"try {field}={remedy}."
        )


def check_scale(owner: str, field: str, value: float) -> None:
    """Checks a standard deviation.

    Raises:
        ValueError: unless 0 <= value < infinity.
    """
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{owner}({field}={value!r}) must be finite and not negative; try {field}=1.0."
        )
