"""Checks that the measurements of optimizers share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.core.types import Params


def check_optimizer(owner: str, field: str, optimizer: Any) -> None:
    """Refuses what is not an Optax optimizer.

    Raises:
        TypeError: naming the field.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{owner}({field}={optimizer!r}) must be an Optax optimizer; "
            "try optax.adam(1e-3), or learned.optimizer(theta) of a learned one."
        )


def needs_value(optimizer: optax.GradientTransformation, params: Params) -> bool:
    """Whether an optimizer cannot make a step unless it is given the loss as `value`.

    It is traced, not run: what an optimizer asks for shows in whether its program can be written.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(value: Any) -> Any:
        extra = {} if value is None else {"value": value}
        return optimizer.update(params, optimizer.init(params), params, **extra)

    try:
        jax.eval_shape(step, None)
    # Whatever it raises: a missing argument, or arithmetic with None.
    except Exception:
        jax.eval_shape(step, jnp.zeros((), jax.tree.leaves(params)[0].dtype))
        return True
    return False


def check_same_trees(owner: str, one: str, first: Params, other: str, second: Params) -> None:
    """Refuses two pytrees of arrays that differ in structure or shapes.

    Raises:
        ValueError: naming the first difference.
    """
    found: Any = jax.tree.structure(first)
    if found != jax.tree.structure(second):
        raise ValueError(
            f"{owner}: {one} has structure {found}, but {other} has "
            f"{jax.tree.structure(second)}; pass two of the same params."
        )
    paths = jax.tree_util.tree_leaves_with_path(first)
    for (path, a), b in zip(paths, jax.tree.leaves(second), strict=True):
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"{owner}: {one}{jax.tree_util.keystr(path)} has shape {np.shape(a)}, but in "
                f"{other} it has {np.shape(b)}; pass two of the same params."
            )
