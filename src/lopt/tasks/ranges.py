"""What several tasks share: random numbers, and checks of numbers at construction."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.types import Key


def log_uniform(
    key: Key, low: float, high: float, shape: tuple[int, ...] = ()
) -> Float[Array, "..."]:
    """Returns exp(u), u uniform between log(low) and log(high)."""
    uniform = jax.random.uniform(key, shape)
    return jnp.exp(math.log(low) + (math.log(high) - math.log(low)) * uniform)


def random_index(key: Key, count: Int[Array, ""], shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
    """Returns random integers from 0 to count - 1.

    Random bits modulo `count` compile faster than `jax.random.randint`, and are uniform up to a
    relative error of count / 2^32.
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    return jax.lax.rem(bits, jnp.broadcast_to(count.astype(jnp.uint32), shape)).astype(jnp.int32)


def check_range(owner: str, low: float, high: float) -> None:
    """Refuses a log-uniform range unless 0 < low <= high < infinity."""
    if not 0 < low <= high < math.inf:
        raise ValueError(
            f"{owner}(low={low!r}, high={high!r}) must satisfy 0 < low <= high < infinity; "
            "try low=0.1, high=10.0."
        )


def check_scale(owner: str, field: str, value: float) -> None:
    """Refuses a standard deviation unless 0 <= value < infinity."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{owner}({field}={value!r}) must be finite and not negative; try 1.0.")
