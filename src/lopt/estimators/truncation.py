"""Truncations: the windows in which estimators with a memory walk through an episode."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lopt.core.inner import InnerTraining
from lopt.core.types import Key


def check_truncation(estimator: object, inner: InnerTraining, truncation: int) -> None:
    """Refuses a window that is not positive or that does not divide the horizon."""
    name, horizon = type(estimator).__name__, inner.horizon
    if not isinstance(truncation, int) or truncation < 1:
        raise ValueError(f"{name}(truncation={truncation!r}) must be a positive integer.")
    if horizon % truncation:
        divisors = [d for d in range(1, horizon + 1) if horizon % d == 0]
        near = [
            max(d for d in divisors if d < truncation),
            *(d for d in divisors if d > truncation),
        ]
        raise ValueError(
            f"{name}(truncation={truncation}) must divide InnerTraining(horizon={horizon}); "
            f"try {' or '.join(map(str, near[:2]))}."
        )


def initial_age(key: Key, inner: InnerTraining, truncation: int, stagger: bool) -> Int[Array, ""]:
    """Returns the age, in inner steps, that a particle's first episode is said to have.

    Staggered particles begin at random windows, so that they do not all restart at once; only
    their first episodes are cut short by it.
    """
    if not stagger:
        return jnp.zeros((), jnp.int32)
    return truncation * jax.random.randint(key, (), 0, inner.horizon // truncation, jnp.int32)


def next_age(
    age: Int[Array, ""], losses: Array, inner: InnerTraining, truncation: int
) -> Int[Array, ""]:
    """Returns the age after a window; an episode whose losses are not finite is over."""
    healthy = jnp.all(jnp.isfinite(losses))
    return jnp.where(healthy, age + truncation, inner.horizon)
