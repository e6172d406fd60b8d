"""Inner training: how a learned optimizer is judged.

`InnerTraining` says which tasks it trains, for how long, and what counts; an `Episode` is one such
run in progress. `MetaTask` makes of it a task whose parameters are theta, so that anything that
trains a network can train an optimizer.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import LONGEST, check_integer, check_length
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractStatefulTask, AbstractTask, AbstractTaskFamily
from lopt.core.types import SPLITS, Batch, Key, Params, Scalar, Split, State, Theta
from lopt.core.unroll import Step, TrainState, check_segments, start, unroll


def train_loss(task: AbstractStatefulTask, step: Step) -> Scalar:
    """The training loss that this step found, before its update."""
    return step.loss


def validation_loss(task: AbstractStatefulTask, step: Step) -> Scalar:
    """The loss after this step's update, on a fresh batch of the split "valid_inner"."""
    batch = task.batch(jax.random.fold_in(step.key, 1), "valid_inner")
    params = jax.tree.map(jnp.add, step.params, step.updates)
    return task.loss_and_state(params, step.estimator_state, batch)[0]


class RampedLoss(eqx.Module):
    """The training loss, weighted more the later: 2 (t + 1) / horizon times that of step t.

    The plain mean over an episode is ruled by its first steps, in which losses are large; with
    this one, what counts is more nearly where training arrives. It does not follow a schedule of
    lengths: episodes shorter or longer than `horizon` weigh less or more.
    """

    horizon: int = eqx.field(static=True)

    def __call__(self, task: AbstractStatefulTask, step: Step) -> Scalar:
        """Returns the weighted loss."""
        return step.loss * (2 * (step.step + 1) / self.horizon).astype(step.loss.dtype)


class FinalLoss(eqx.Module):
    """The loss that training ends with: that after step `horizon`, on fresh batches.

    It is `horizon` times that loss at the last step of an episode and zero at the others, so that
    the meta-loss, a mean over steps, is the final loss itself.

    Attributes:
        horizon: that of the episodes, inner steps.
        batches: over how many batches the loss is averaged.
        split: where they come from.
    """

    horizon: int = eqx.field(static=True)
    batches: int = eqx.field(static=True, default=1)
    split: Split = eqx.field(static=True, default="train")

    def __check_init__(self) -> None:
        for name, value in (("horizon", self.horizon), ("batches", self.batches)):
            check_integer("FinalLoss", name, value, hint=10)
        if self.split not in SPLITS:
            raise ValueError(f"FinalLoss(split={self.split!r}) must be one of {', '.join(SPLITS)}.")

    def __call__(self, task: AbstractStatefulTask, step: Step) -> Scalar:
        """Returns the loss after this step if it is the last, and zero otherwise."""
        params = jax.tree.map(jnp.add, step.params, step.updates)

        def measure() -> Scalar:
            key = jax.random.fold_in(step.key, 1)
            return self.horizon * mean_loss(
                task, params, step.estimator_state, key, self.batches, self.split
            )

        last = step.step == self.horizon - 1
        return jax.lax.cond(last, measure, lambda: jnp.zeros_like(step.loss))


def mean_loss(
    task: AbstractStatefulTask,
    params: Params,
    state: State,
    key: Key,
    batches: int,
    split: Split = "train",
) -> Scalar:
    """Returns the mean loss over some batches, one computed after another."""

    def loss(key: Key) -> Scalar:
        return task.loss_and_state(params, state, task.batch(key, split))[0]

    return jnp.mean(jax.lax.map(loss, jax.random.split(key, batches)))


class Episode(eqx.Module):
    """One inner training run in progress. It remembers its task's key, not the task's data."""

    task_key: Key
    train: TrainState


class InnerTraining(eqx.Module):
    """Trains tasks of a family with a learned optimizer, and says how well that went.

    The meta-loss of an episode is the mean of `objective` over its `horizon` steps.

    Attributes:
        tasks: the tasks to train.
        learned: the optimizer that trains them.
        horizon: inner steps per episode, at most 2**30.
        objective: (task, step) to the scalar that is to become small; `train_loss` by default.
    """

    tasks: AbstractTaskFamily
    learned: AbstractLearnedOptimizer
    horizon: int = eqx.field(static=True)
    objective: Callable[[AbstractStatefulTask, Step], Scalar] = eqx.field(
        static=True, default=train_loss
    )

    def __check_init__(self) -> None:
        check_integer("InnerTraining", "horizon", self.horizon, most=LONGEST, hint=100)
        most = self.learned.made_for()
        check_length(
            f"InnerTraining(horizon={self.horizon})", self.horizon, most, f"horizon={most}"
        )
        final = self.objective
        if isinstance(final, FinalLoss) and final.horizon != self.horizon:
            raise ValueError(
                f"InnerTraining(horizon={self.horizon}, objective=FinalLoss("
                f"horizon={final.horizon})) must have one horizon in both places, or the last step "
                f"is missed; try FinalLoss({self.horizon})."
            )

    def begin(self, theta: Theta, key: Key) -> Episode:
        """Draws a task and its initial parameters; returns the episode before its first step."""
        task_key, init_key, run_key = jax.random.split(key, 3)
        task = self.tasks.draw(task_key)
        optimizer = self.learned.optimizer(theta)
        return Episode(task_key, start(task, optimizer, task.init(init_key), run_key))

    def advance(
        self, theta: Theta, episode: Episode, num_steps: int, segments: int = 1
    ) -> tuple[Float[Array, " {num_steps}"], Episode]:
        """Takes `num_steps` inner steps; returns the objective at each, and the episode.

        `segments` bounds the memory of reverse-mode differentiation, see `lopt.unroll`.
        """
        task = self.tasks.draw(episode.task_key)
        optimizer = self.learned.optimizer(theta)
        train, losses = unroll(
            task,
            optimizer,
            episode.train,
            num_steps,
            record=lambda step: self.objective(task, step),
            segments=segments,
        )
        return losses, Episode(episode.task_key, train)

    def meta_loss(self, theta: Theta, key: Key, segments: int = 1) -> Scalar:
        """Returns the meta-loss of a whole episode."""
        losses, _ = self.advance(theta, self.begin(theta, key), self.horizon, segments)
        return jnp.mean(losses)


class MetaTask(AbstractTask):
    """Inner training as a task: parameters are theta, a batch is the key of an episode.

    `unroll(MetaTask(inner), optax.adam(1e-3), state, n)` therefore meta-trains by full
    backpropagation through the whole horizon. An episode that is not finite makes theta not finite:
    train `lopt.Mean(MetaTask(inner), 1)`, which leaves it out.

    Attributes:
        inner: what is measured.
        segments: checkpoint segments of the horizon, which they divide, see `lopt.unroll`: with
            about the square root of the horizon, memory grows like that root.
    """

    inner: InnerTraining
    segments: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        check_segments("MetaTask", self.segments, "horizon", self.inner.horizon)

    def init(self, key: Key) -> Theta:
        """Returns initial theta."""
        return self.inner.learned.init(key)

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns the key of an episode. Splits differ in nothing: episodes are never repeated."""
        return key

    def loss(self, params: Theta, batch: Batch) -> Scalar:
        """Returns the meta-loss of the episode with key `batch`."""
        return self.inner.meta_loss(params, batch, self.segments)
