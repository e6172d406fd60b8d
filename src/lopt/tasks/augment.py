"""Augmentation of tasks: families made of other families (Metz et al. 2020, arXiv:2009.11243).

Each draws a task of an inner family and changes something about it, by an amount that is an array,
so that one compiled program trains many different tasks side by side. They nest in any order.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Batch, Key, Params, Scalar, Split, State
from lopt.tasks.ranges import check_range, log_uniform
from lopt.tasks.subsets import image_data_within


class InputScale(AbstractTaskFamily):
    """Tasks whose images are multiplied by a log-uniform factor between `low` and `high`."""

    family: AbstractTaskFamily
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_range("InputScale", self.low, self.high)
        image_data_within("InputScale", self.family)

    def draw(self, key: Key) -> "ScaledInputs":
        """Returns a task of `family` with scaled images."""
        task_key, scale_key = jax.random.split(key)
        task = _without_state("InputScale", self.family.draw(task_key))
        return ScaledInputs(task, log_uniform(scale_key, self.low, self.high))


class InitialScale(AbstractTaskFamily):
    """Tasks whose initial parameters are multiplied by a log-uniform factor."""

    family: AbstractTaskFamily
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_range("InitialScale", self.low, self.high)

    def draw(self, key: Key) -> "ScaledInitial":
        """Returns a task of `family` with scaled initial parameters."""
        task_key, scale_key = jax.random.split(key)
        task = _without_state("InitialScale", self.family.draw(task_key))
        return ScaledInitial(task, log_uniform(scale_key, self.low, self.high))


class Reparameterization(AbstractTaskFamily):
    """Tasks in other units: parameters p' with p = s p', for log-uniform s.

    Losses are as before, gradients are s times and curvatures s^2 times as large.

    Attributes:
        family: any family of tasks without state.
        low, high: the range of s.
        per: "task" for one s, "tensor" for one in each tensor of the parameters.
    """

    family: AbstractTaskFamily
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)
    per: Literal["tensor", "task"] = eqx.field(static=True, default="tensor")

    def __check_init__(self) -> None:
        check_range("Reparameterization", self.low, self.high)
        if self.per not in ("tensor", "task"):
            raise ValueError(
                f'Reparameterization(per={self.per!r}) must be "tensor" or "task"; '
                'try per="tensor".'
            )

    def draw(self, key: Key) -> "Reparameterized":
        """Returns a task of `family` in other units."""
        task_key, scale_key = jax.random.split(key)
        task = _without_state("Reparameterization", self.family.draw(task_key))
        count = len(jax.tree.leaves(jax.eval_shape(task.init, key))) if self.per == "tensor" else 1
        return Reparameterized(task, log_uniform(scale_key, self.low, self.high, (count,)))


class ScaledInputs(AbstractTask):
    """`task` with its images multiplied by `factor`."""

    task: AbstractTask
    factor: Float[Array, ""]

    def init(self, key: Key) -> Params:
        """Returns the initial parameters of `task`."""
        return self.task.init(key)

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns a batch of `task` with scaled images."""
        batch = self.task.batch(key, split)
        factor = self.factor.astype(batch.images.dtype)
        return eqx.tree_at(lambda batch: batch.images, batch, batch.images * factor)

    def loss(self, params: Params, batch: Batch) -> Scalar:
        """Returns the loss of `task`."""
        return self.task.loss(params, batch)


class ScaledInitial(AbstractTask):
    """`task` with its initial parameters multiplied by `factor`."""

    task: AbstractTask
    factor: Float[Array, ""]

    def init(self, key: Key) -> Params:
        """Returns `factor` times the initial parameters of `task`."""
        return jax.tree.map(lambda leaf: leaf * self.factor.astype(leaf.dtype), self.task.init(key))

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns a batch of `task`."""
        return self.task.batch(key, split)

    def loss(self, params: Params, batch: Batch) -> Scalar:
        """Returns the loss of `task`."""
        return self.task.loss(params, batch)


class Reparameterized(AbstractTask):
    """`task` in parameters p', where p = s p' are its own.

    Attributes:
        task: the task.
        factors: s, one for all tensors, or one for each in tree order.
    """

    task: AbstractTask
    factors: Float[Array, " tensor"]

    def original(self, params: Params) -> Params:
        """Returns the parameters s p' of `task`."""
        return self._scale(params, self.factors)

    def init(self, key: Key) -> Params:
        """Returns the initial parameters of `task` divided by s."""
        return self._scale(self.task.init(key), 1 / self.factors)

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns a batch of `task`."""
        return self.task.batch(key, split)

    def loss(self, params: Params, batch: Batch) -> Scalar:
        """Returns the loss of `task` at s p'."""
        return self.task.loss(self.original(params), batch)

    def _scale(self, params: Params, factors: Float[Array, " tensor"]) -> Params:
        leaves, structure = jax.tree.flatten(params)
        factors = jnp.broadcast_to(factors, (len(leaves),))
        return jax.tree.unflatten(
            structure, [leaf * factors[i].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
        )


class WarmStart(AbstractTask):
    """`task`, always begun from the same parameters instead of fresh ones.

    Attributes:
        task: the task.
        params: where it begins, such as the end of a short run.
    """

    task: AbstractTask
    params: Params

    def init(self, key: Key) -> Params:
        """Returns `params`, whatever the key."""
        return self.params

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns a batch of `task`."""
        return self.task.batch(key, split)

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the state of `task`."""
        return self.task.prepare(params, key)

    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        """Returns the loss of `task`, and its next state."""
        return self.task.loss_and_state(params, state, batch)


def _without_state(owner: str, task: AbstractTask) -> AbstractTask:
    """Returns the task.

    Raises:
        ValueError: if it is one with a state.
    """
    if not isinstance(task, AbstractTask):
        raise ValueError(
            f"{owner}(family) draws a {type(task).__name__}, which has a state; "
            "must be an AbstractTask, try mlp_classification."
        )
    return task
