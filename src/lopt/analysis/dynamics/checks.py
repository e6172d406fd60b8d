"""Checks that the measurements of optimizers share."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from lopt.core.types import Params, State


def check_optimizer(owner: str, field: str, optimizer: Any, extra: bool = False) -> None:
    """Refuses what is not an Optax optimizer, and what needs more than training gives it.

    Args:
        owner: who refuses it.
        field: where it was given.
        optimizer: anything.
        extra: whether it may need more than the loss, as a line search does.

    Raises:
        TypeError: naming the field.
        ValueError: naming the missing arguments.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        if isinstance(optimizer, optax.MultiSteps):
            raise TypeError(
                f"{owner}({field}) must be an Optax optimizer, and is one of MultiSteps; try its "
                "gradient_transformation()."
            )
        said = " ".join(repr(optimizer).split())
        raise TypeError(
            f"{owner}({field}={said}) must be an Optax optimizer; "
            "try optax.adam(1e-3), or learned.optimizer(theta) of a learned one."
        )
    names = () if extra else _missing_besides_value(optimizer)
    if names:
        raise ValueError(
            f"{owner}({field}) is an optimizer that needs {', '.join(names)} in its updates, and "
            "is given the loss as value and no more; try one without a line search, such as "
            "optax.lbfgs(0.1, linesearch=None)."
        )


def missing_arguments(error: TypeError) -> tuple[str, ...]:
    """Returns the names of keyword arguments that a call lacked, by what Python says of it.

    Example:
        >>> missing_arguments(TypeError("f() missing 1 required keyword-only argument: 'value'"))
        ('value',)
    """
    found = re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error))
    return tuple(re.findall(r"'(\w+)'", found[1])) if found else ()


def _missing_besides_value(optimizer: optax.GradientTransformation) -> tuple[str, ...]:
    """Returns what an optimizer needs besides the loss, as far as a trace on zeros tells."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Params) -> Any:
        return optimizer.update(params, optimizer.init(params), params, value=jnp.sum(params))

    try:
        jax.eval_shape(step, jnp.zeros(2))
    except TypeError as error:
        return missing_arguments(error)
    # One that is made for other params says nothing here.
    except Exception:
        return ()
    return ()


def update_or_refuse(
    owner: str,
    optimizer: optax.GradientTransformation,
    updates: Params,
    state: State,
    params: Params | None,
    extra: dict[str, Any],
) -> tuple[Params, State]:
    """Returns what an optimizer makes of an update, refusing if it is not given what it needs.

    Raises:
        ValueError: naming the missing arguments.
    """
    try:
        return optax.with_extra_args_support(optimizer).update(updates, state, params, **extra)
    except TypeError as error:
        missing = missing_arguments(error)
        # Where it is no argument that lacks: arithmetic with a value of None.
        none = params is not None and extra.get("value") is None
        if not missing and none and needs_value(optimizer, params):
            missing = ("value",)
        if not missing:
            raise
        more = ", ".join(f"{name}=..." for name in dict.fromkeys((*missing, *extra)))
        raise ValueError(
            f"{owner}.update needs {', '.join(missing)} for its optimizer; try "
            f"optimizer.update(grads, state, params, {more}), where value is the loss."
        ) from error


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


def check_same_trees(owner: str, one: str, first: PyTree, other: str, second: PyTree) -> None:
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
    if not paths:
        raise ValueError(f"{owner}: {one} and {other} hold no arrays; pass those of a network.")
    for (path, a), b in zip(paths, jax.tree.leaves(second), strict=True):
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"{owner}: {one}{jax.tree_util.keystr(path)} has shape {np.shape(a)}, but in "
                f"{other} it has {np.shape(b)}; pass two of the same params."
            )
