"""Tasks around a task: they change its gradients, or remember something.

Each keeps to `differentiate`, so that they nest in any order with one another and with
`lopt.TransformedTask`. What differs between two of them is an array.
"""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.estimator import Estimate
from lopt.core.inner import Objective
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Batch, Key, Params, Scalar, Split, State, as_pytree


class AbstractWrapped(AbstractTask):
    """The task `task`; what a subclass does not say is as there."""

    task: eqx.AbstractVar[Any]

    def own_batch(self, batch: Batch) -> Batch:
        """Returns what the task sees of a batch."""
        return batch

    @override
    def draw(self, key: Key) -> AbstractTask:
        return dataclasses.replace(self, task=self.task.draw(key))

    @override
    def architectures(self) -> tuple[AbstractTaskFamily, ...]:
        return tuple(dataclasses.replace(self, task=part) for part in self.task.architectures())

    @override
    def init(self, key: Key) -> Params:
        return self.task.init(key)

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return self.task.batch(key, split)

    @override
    def everything(self, split: Split = "train") -> Batch | None:
        return self.task.everything(split)

    @override
    def prepare(self, params: Params, key: Key) -> State:
        return self.task.prepare(params, key)

    @override
    def loss(self, params: Params, batch: Batch) -> Scalar:
        return self.task.loss(params, self.own_batch(batch))

    @override
    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        return self.task.loss_and_state(params, state, self.own_batch(batch))

    @override
    def metrics(self, params: Params, state: State, batch: Batch) -> dict[str, Scalar]:
        return self.task.metrics(params, state, self.own_batch(batch))


class AbstractRemembering(AbstractWrapped):
    """A task whose state is a pair: that of the task, and a memory that only training changes."""

    @override
    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        loss, inner = self.task.loss_and_state(params, state[0], batch)
        return loss, (inner, state[1])

    @override
    def metrics(self, params: Params, state: State, batch: Batch) -> dict[str, Scalar]:
        return self.task.metrics(params, state[0], batch)


class WithBestLoss(AbstractRemembering):
    """A task, or the tasks of a family, that tells the least training loss so far.

    It reaches `update(..., best_loss=...)`, and objectives as `step.extra["best_loss"]`. It is a
    mean over one batch for each loss: with small batches it is lower than any expected loss.

    Attributes:
        task: the task, or a family of them.
    """

    task: Any

    @override
    def prepare(self, params: Params, key: Key) -> State:
        inner = self.task.prepare(params, key)
        loss = jax.eval_shape(lambda: self.task.estimate(params, inner, key)[0].loss)
        return inner, jnp.full((), jnp.finfo(loss.dtype).max, loss.dtype)

    @override
    def differentiate(self, params: Params, state: State, batch: Batch) -> tuple[Estimate, State]:
        found, inner = self.task.differentiate(params, state[0], batch)
        best = jnp.fmin(found.loss, state[1])  # NaN is no loss
        return dataclasses.replace(found, extra={**found.extra, "best_loss": best}), (inner, best)


class WithObjective(AbstractWrapped):
    """A task, or the tasks of a family, with an objective of their own, for `own_objective`.

    In a mixture each task is then judged on a scale of its own. It goes around other changes.

    Attributes:
        task: the task, or a family of them.
        objective: what its training is to be good at, such as a `NormalizedLoss`.
    """

    task: Any
    objective: Objective = eqx.field(converter=as_pytree)


class DelayedTask(AbstractRemembering):
    """A task whose gradients arrive `delay` steps late; until then they are zero.

    Attributes:
        longest: the number of gradients that are kept, at least `delay`.
    """

    task: AbstractTask
    delay: Int[Array, ""]
    longest: int = eqx.field(static=True)

    @override
    def prepare(self, params: Params, key: Key) -> State:
        rows = (self.longest + 1,)
        kept = jax.tree.map(lambda leaf: jnp.zeros(rows + leaf.shape, leaf.dtype), params)
        return self.task.prepare(params, key), kept

    @override
    def differentiate(self, params: Params, state: State, batch: Batch) -> tuple[Estimate, State]:
        found, inner = self.task.differentiate(params, state[0], batch)
        kept = jax.tree.map(
            lambda new, old: jnp.concatenate([new[None], old[:-1]]), found.grads, state[1]
        )
        late = jax.tree.map(lambda leaf: leaf[self.delay], kept)
        return dataclasses.replace(found, grads=late), (inner, kept)


class AbstractRandomised(AbstractWrapped):
    """A task whose gradients, not losses, change at random; a batch is its own and a key."""

    @abc.abstractmethod
    def change(self, grads: Params, key: Key) -> Params:
        """Returns the gradient that takes the place of `grads`."""

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return self.task.batch(key, split), jax.random.fold_in(key, 3)

    @override
    def everything(self, split: Split = "train") -> Batch | None:
        whole = self.task.everything(split)
        return None if whole is None else (whole, jax.random.key(0))

    @override
    def own_batch(self, batch: Batch) -> Batch:
        return batch[0]

    @override
    def differentiate(self, params: Params, state: State, batch: Batch) -> tuple[Estimate, State]:
        found, state = self.task.differentiate(params, state, batch[0])
        return dataclasses.replace(found, grads=self.change(found.grads, batch[1])), state


class PerturbedTask(AbstractRandomised):
    """A task whose gradients are noisy, or zero by chance; losses are as they were.

    Attributes:
        scale: the standard deviation of noise in each entry of a gradient.
        zeros: the probability that an entry is zero.
    """

    task: AbstractTask
    scale: Float[Array, ""]
    zeros: Float[Array, ""]

    @override
    def change(self, grads: Params, key: Key) -> Params:
        noise_key, zeros_key = jax.random.split(key)
        noise = optax.tree.random_like(noise_key, grads, jax.random.normal)
        chance = optax.tree.random_like(zeros_key, grads, jax.random.uniform)

        def perturb(grad: Array, noise: Array, chance: Array) -> Array:
            noisy = grad + self.scale.astype(grad.dtype) * noise
            return jnp.where(chance < self.zeros.astype(grad.dtype), 0, noisy)

        return jax.tree.map(perturb, grads, noise, chance)
