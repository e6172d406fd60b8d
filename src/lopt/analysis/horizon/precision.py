"""Double precision for sums that single precision cannot hold.

Moments of a noisy quadratic pass through cancellations (a component may grow by 1e40 and shrink
again), so that what studies them runs in 64 bits, whatever the session is set to.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def in_double(function: Callable[P, R]) -> Callable[P, R]:
    """Returns `function`, computed in 64 bits: arrays go in as float64 and come out of NumPy."""

    @functools.wraps(function)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(True):
            args, kwargs = jax.tree.map(_widened, (args, kwargs))
            return jax.tree.map(_on_host, function(*args, **kwargs))

    return wide


def _widened(leaf: Any) -> Any:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    if is_array and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(np.asarray(leaf), jnp.float64)
    return leaf


def _on_host(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf
