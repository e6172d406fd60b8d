"""Hyperparameters with a value for each tensor."""

from typing import Any

import equinox as eqx
import jax

from lopt.core.types import Params
from lopt.learned.schedules import AbstractSchedule


class PerTensor(eqx.Module):
    """A value or schedule for each tensor; made by `per_tensor`.

    Attributes:
        values: (name, value or schedule) of each tensor, in tree order.

    Theta is `{name of the tensor: ...}`.
    """

    values: tuple[tuple[str, float | AbstractSchedule], ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        names = [name for name, _ in self.values]
        if not names:
            raise ValueError("per_tensor(): there is no tensor; give the pytree of parameters.")
        if len(set(names)) < len(names):
            raise ValueError(
                f"per_tensor(): two tensors have one name among {', '.join(names)}; "
                "rename keys that contain dots."
            )


def per_tensor(values: Any, like: Params | None = None) -> PerTensor:
    """Gives a hyperparameter of `lopt.learnable` a value for each tensor.

    Each tensor then has an optimizer of its own: a global norm would be the norm of one tensor.

    Args:
        values: a value or schedule for each tensor, in a pytree with the structure of the
            parameters; or with `like`, one for all tensors.
        like: the parameters.

    Raises:
        ValueError: if there is no tensor, or names are not unique.

    Example:
        >>> import jax, optax, lopt
        >>> rates = per_tensor({"weight": 0.1, "bias": 0.01})
        >>> learned = lopt.learnable(optax.sgd, learning_rate=rates)
        >>> sorted(learned.init(jax.random.key(0))["learning_rate"])
        ['bias', 'weight']
    """
    tensors = named_tensors(values if like is None else like)
    given = ((name, leaf if like is None else values) for name, leaf in tensors)
    return PerTensor(
        tuple((n, v if isinstance(v, AbstractSchedule) else float(v)) for n, v in given)
    )


def named_tensors(tree: Any) -> list[tuple[str, Any]]:
    """Returns name and leaf, in tree order; a name is the path, such as `layers.0.weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, AbstractSchedule)
    )
    return [
        (jax.tree_util.keystr(path, simple=True, separator=".") or "params", leaf)
        for path, leaf in leaves
    ]
