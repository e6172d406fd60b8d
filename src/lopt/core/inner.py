"""Inner training: how a learned optimizer is judged, and the same as a task.

`InnerTraining` says which tasks it trains, for how long, and what counts; an `Episode` is one such
run in progress. The parameters of a `MetaTask` are theta.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import LONGEST, check_integer, check_length
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Batch, Key, Params, Scalar, Split, State, Theta, as_pytree
from lopt.core.unroll import Step, TrainState, check_segments, start, unroll

# Task, step and the length of the run to the scalar that is to become small, as a mean over steps.
Objective: TypeAlias = Callable[[AbstractTask, Step, Int[Array, ""]], Scalar]


def train_loss(task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
    """The training loss that this step found, before its update."""
    return step.loss


def validation_loss(task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
    """The loss after this step's update, on a fresh batch of the split "valid_inner"."""
    batch = task.batch(jax.random.fold_in(step.key, 1), "valid_inner")
    params = jax.tree.map(jnp.add, step.params, step.updates)
    return task.loss_and_state(params, step.estimator_state, batch)[0]


class RampedLoss(eqx.Module):
    """2 (t + 1) / num_steps times the loss of step t: first losses would rule their plain mean."""

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the weighted loss."""
        dtype = step.loss.dtype
        return step.loss * ((2 * (step.step + 1)).astype(dtype) * (1 / num_steps.astype(dtype)))


class FinalLoss(eqx.Module):
    """The loss after the last step, on fresh batches of a split, times `num_steps`; else zero."""

    batches: int = eqx.field(static=True, default=1)
    split: Split = eqx.field(static=True, default="train")

    def __check_init__(self) -> None:
        check_integer("FinalLoss", "batches", self.batches, hint=10)
        if self.split not in ("train", "valid_inner"):
            raise ValueError(f'FinalLoss(split={self.split!r}) must be "train" or "valid_inner".')

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the loss after this step if it is the last, and zero otherwise."""

        def measure() -> Scalar:
            params = jax.tree.map(jnp.add, step.params, step.updates)
            key = jax.random.fold_in(step.key, 1)
            loss = mean_loss(task, params, step.estimator_state, key, self.batches, self.split)
            return num_steps.astype(loss.dtype) * loss

        last = step.step == num_steps - 1
        return jax.lax.cond(last, measure, lambda: jnp.zeros_like(step.loss))


def mean_loss(
    task: AbstractTask, params: Params, state: State, key: Key, batches: int, split: Split = "train"
) -> Scalar:
    """Returns the mean loss over some batches, one computed after another."""

    def loss(key: Key) -> Scalar:
        return task.loss_and_state(params, state, task.batch(key, split))[0]

    return jnp.mean(jax.lax.map(loss, jax.random.split(key, batches)))


class Episode(eqx.Module):
    """An inner training run of `num_steps` in progress; it holds its task's key, not its data."""

    task_key: Key
    train: TrainState
    num_steps: Int[Array, ""]


class _Measured(eqx.Module):
    """A record of the objective. A module, as another function for each call is another program."""

    objective: Objective
    task: AbstractTask
    num_steps: Int[Array, ""]

    def __call__(self, step: Step) -> Scalar:
        return self.objective(self.task, step, self.num_steps)


class InnerTraining(eqx.Module):
    """Trains tasks of a family with a learned optimizer, and says how well that went.

    The meta-loss of an episode is the mean of `objective` over its `horizon` steps.

    Attributes:
        tasks: the tasks to train.
        learned: the optimizer that trains them.
        horizon: inner steps per episode, at most 2**30.
        objective: (task, step, num_steps) to the scalar that is to become small.
    """

    tasks: AbstractTaskFamily
    learned: AbstractLearnedOptimizer
    horizon: int = eqx.field(static=True)
    objective: Objective = eqx.field(default=train_loss, converter=as_pytree)

    def __check_init__(self) -> None:
        check_integer("InnerTraining", "horizon", self.horizon, most=LONGEST, hint=100)
        end = self.learned.max_steps
        check_length(f"InnerTraining(horizon={self.horizon})", self.horizon, end, f"horizon={end}")
        try:
            inspect.signature(self.objective).bind(None, None, None)
        except TypeError as error:
            raise ValueError(
                f"InnerTraining(objective={self.objective}) must take (task, step, num_steps): "
                f"{error}. Try def objective(task, step, num_steps), such as lopt.train_loss."
            ) from error

    def begin(self, theta: Theta, key: Key, num_steps: Int[Array, ""] | None = None) -> Episode:
        """Returns an episode of `num_steps`, `horizon` by default, before its first step."""
        length = jnp.asarray(self.horizon if num_steps is None else num_steps, jnp.int32)
        task_key, init_key, run_key = jax.random.split(key, 3)
        task = self.tasks.draw(task_key)
        optimizer = self.learned.optimizer(theta, length)
        return Episode(task_key, start(task, optimizer, task.init(init_key), run_key), length)

    def advance(
        self, theta: Theta, episode: Episode, num_steps: int, **reverse: Any
    ) -> tuple[Float[Array, " {num_steps}"], Episode]:
        """Takes `num_steps` inner steps; returns the objective at each, and the episode.

        `reverse` may be `segments` and `keep_products` of `lopt.unroll`.
        """
        task = self.tasks.draw(episode.task_key)
        optimizer = self.learned.optimizer(theta, episode.num_steps)
        record = _Measured(self.objective, task, episode.num_steps)
        train, losses = unroll(task, optimizer, episode.train, num_steps, record=record, **reverse)
        return losses, Episode(episode.task_key, train, episode.num_steps)

    def meta_loss(self, theta: Theta, key: Key, **reverse: Any) -> Scalar:
        """Returns the meta-loss of a whole episode; `reverse` as for `advance`."""
        return jnp.mean(self.advance(theta, self.begin(theta, key), self.horizon, **reverse)[0])


class MetaTask(AbstractTask):
    """Inner training as a task: parameters are theta, a batch is the key of an episode.

    `unroll(MetaTask(inner), optax.adam(1e-3), state, n)` therefore meta-trains by full
    backpropagation through the whole horizon. An episode that is not finite makes theta not finite:
    train `lopt.Mean(MetaTask(inner), 1)`, which leaves it out.

    Attributes:
        inner: what is measured.
        segments, keep_products: for reverse mode, see `lopt.unroll`; segments divide the horizon.
    """

    inner: InnerTraining
    segments: int = eqx.field(static=True, default=1)
    keep_products: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_segments("MetaTask", self.segments, "horizon", self.inner.horizon)

    @override
    def init(self, key: Key) -> Theta:
        return self.inner.learned.init(key)

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return key  # splits differ in nothing: episodes are never repeated

    @override
    def loss(self, params: Theta, batch: Batch) -> Scalar:
        reverse = {"segments": self.segments, "keep_products": self.keep_products}
        return self.inner.meta_loss(params, batch, **reverse)
