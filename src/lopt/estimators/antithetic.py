"""Antithetic pairs: two runs at theta + noise and theta - noise that share all other randomness."""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from lopt.core.types import Key, Scalar, Theta


def check_weights(theta: Theta) -> None:
    """Refuses an empty theta, which is not known at construction."""
    if not optax.tree.size(theta):
        raise ValueError("theta has no weights to change; try lopt.LearnableSGD().")


def perturbation(key: Key, theta: Theta, sigma: float) -> Theta:
    """Returns noise ~ N(0, sigma^2 I) in the shape of theta."""
    check_weights(theta)
    # One draw for all leaves: the generator is most of what a small program takes to compile.
    flat, unravel = ravel_pytree(theta)
    return unravel(sigma * jax.random.normal(key, flat.shape, flat.dtype))


def pair(theta: Theta, noise: Theta) -> Theta:
    """Returns theta + noise and theta - noise, stacked on a new leading axis."""
    check_weights(theta)
    return jax.tree.map(lambda t, e: jnp.stack([t + e, t - e]), theta, noise)


def score(noise: Theta, positive: Scalar, negative: Scalar, sigma: float) -> Theta:
    """Returns noise (positive - negative) / (2 sigma^2)."""
    factor = (positive - negative) / (2 * sigma**2)
    return jax.tree.map(lambda e: e * factor.astype(e.dtype), noise)
