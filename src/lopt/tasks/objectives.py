"""Outer objectives, beside those of the core: what inner training is to be good at.

Each is (task, step, num_steps) to the scalar that is to become small, as a mean over steps. The
mean training loss is `lopt.train_loss`, the last is `lopt.FinalLoss`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.inner import Objective, train_loss
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split, as_pytree
from lopt.core.unroll import Step


def _floats(value: Any) -> Float[Array, "..."]:
    return jnp.asarray(value, float)


def best_loss(task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
    """The least training loss so far, of tasks in `lopt.tasks.WithBestLoss`."""
    return step.extra["best_loss"]


def own_objective(task: Any, step: Step, num_steps: Int[Array, ""]) -> Scalar:
    """The objective that each task has of its own, of tasks in `lopt.tasks.WithObjective`."""
    return task.objective(task, step, num_steps)


class MetricObjective(eqx.Module):
    """A metric of the task after each step's update, in inference mode, on a fresh batch.

    Robustness is a metric on batches that `change` has changed. An accuracy has no derivative:
    evolution strategies take it, backpropagation does not.

    Attributes:
        metric: which, of `task.metrics`.
        factor: what it is multiplied by; -1 for what is to become large.
        split: where batches come from; the other two never reach an update of theta.
        change: (key, batch) to the batch that is used, such as `lopt.tasks.InputNoise(0.3)` or
            `lambda key, batch: other.batch(key)` for another distribution.

    Example:
        >>> import lopt
        >>> accuracy = lopt.tasks.MetricObjective("accuracy", -1.0)
        >>> noise = lopt.tasks.InputNoise(0.3)
        >>> robustness = lopt.tasks.MetricObjective("accuracy", -1.0, change=noise)
    """

    metric: str = eqx.field(static=True, default="loss")
    factor: float = 1.0
    split: Split = eqx.field(static=True, default="valid_inner")
    change: Callable[[Key, Batch], Batch] | None = None

    def __check_init__(self) -> None:
        if self.split not in ("train", "valid_inner"):
            raise ValueError(
                f'MetricObjective(split={self.split!r}) must be "train" or "valid_inner": the '
                "other two never reach an update of theta."
            )

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the metric, times factor."""
        batch_key, change_key = jax.random.split(jax.random.fold_in(step.key, 1))
        batch = task.batch(batch_key, self.split)
        if self.change is not None:
            batch = self.change(change_key, batch)
        params = jax.tree.map(jnp.add, step.params, step.updates)
        found = task.metrics(params, step.estimator_state, batch)
        if self.metric not in found:
            raise ValueError(
                f"MetricObjective(metric={self.metric!r}) must be one of {', '.join(found)}."
            )
        return jnp.asarray(self.factor, found[self.metric].dtype) * found[self.metric]


class NormalizedLoss(eqx.Module):
    """A loss between that of the start and the best known one.

        n(l) = clip((l - best) / (initial - best), -2, 2),    2 where l is not finite

    Tasks of different scales then count alike, and those that diverge count no more than others.

    Attributes:
        best: the least loss that is known, n = 0.
        initial: the loss at the start, n = 1.
        objective: gives l.
    """

    best: Float[Any, ""] = eqx.field(converter=_floats, kw_only=True)
    initial: Float[Any, ""] = eqx.field(converter=_floats, kw_only=True)
    objective: Objective = eqx.field(default=train_loss, converter=as_pytree)

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns n of the loss of this step."""
        loss = self.objective(task, step, num_steps)
        best, initial = self.best.astype(loss.dtype), self.initial.astype(loss.dtype)
        is_finite = jnp.isfinite(loss)
        # A loss that is not finite is replaced before it is used, so that gradients are finite.
        scaled = (jnp.where(is_finite, loss, 0) - best) / (initial - best)
        return jnp.where(is_finite, jnp.clip(scaled, -2, 2), 2)


class AdamSteps(eqx.Module):
    """Minus the number of steps after which Adam reaches a loss; 0 where the loss is not finite.

    It is linear between the known losses of Adam, and constant beyond them.

    Attributes:
        losses, steps: losses of Adam, none above the one before, and when they are reached.
        objective: gives the loss.
    """

    losses: Float[Any, " point"] = eqx.field(converter=_floats)
    steps: Float[Any, " point"] = eqx.field(converter=_floats)
    objective: Objective = eqx.field(default=train_loss, converter=as_pytree)

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns minus the steps of Adam."""
        loss = self.objective(task, step, num_steps)
        losses, steps = (x[::-1].astype(loss.dtype) for x in (self.losses, self.steps))
        is_finite = jnp.isfinite(loss)
        return -jnp.where(is_finite, jnp.interp(jnp.where(is_finite, loss, 0), losses, steps), 0)
