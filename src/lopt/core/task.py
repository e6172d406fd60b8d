"""Tasks: the simplest gradient estimators, which differentiate their own loss on a batch."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from typing_extensions import override

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Batch, Key, Params, Scalar, Split, State, as_pytree


class AbstractTaskFamily(eqx.Module):
    """A distribution of tasks.

    `draw` runs inside compiled programs and is mapped over many keys, so everything that differs
    between two draws has to be an array.
    """

    @abc.abstractmethod
    def draw(self, key: Key) -> "AbstractTask":
        """Returns one task; the same key gives the same task."""

    def architectures(self) -> tuple["AbstractTaskFamily", ...]:
        """Returns the families, of one program each, that share the particles of a `lopt.Mean`.

        A family whose tasks differ in more than arrays overrides this.
        """
        return (self,)


class AbstractTask(AbstractGradientEstimator, AbstractTaskFamily):
    """A task: write `init`, `batch` and `loss`, and it can be trained and judged.

    A network that carries something besides its parameters, such as running statistics, is written
    with `prepare` and `loss_and_state` in place of `loss`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, lopt
        >>> class Parabola(lopt.AbstractTask):
        ...     def init(self, key):
        ...         return jax.random.normal(key, (3,))
        ...
        ...     def batch(self, key, split="train"):
        ...         return ()
        ...
        ...     def loss(self, params, batch):
        ...         return jnp.sum(params**2)
        >>> key, task, optimizer = jax.random.key(0), Parabola(), optax.sgd(0.1)
        >>> state = lopt.start(task, optimizer, task.init(key), key)
        >>> state, losses = lopt.unroll(task, optimizer, state, 20)
        >>> bool(losses[-1] < 1e-3 * losses[0])
        True
    """

    @abc.abstractmethod
    def init(self, key: Key) -> Params:
        """Returns initial parameters: a pytree of floating-point arrays."""

    @abc.abstractmethod
    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns everything that is random about one step: examples, noise, dropout keys."""

    def loss(self, params: Params, batch: Batch) -> Scalar:
        """Returns the loss, a deterministic function of parameters and batch."""
        raise NotImplementedError(
            f"{type(self).__name__} must define loss(params, batch), or prepare and loss_and_state "
            "where its network carries a state."
        )

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the state of the network before the first step; `()` if it has none."""
        return ()

    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        """Returns the loss in training mode, a deterministic function, and the next state."""
        return self.loss(params, batch), state

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns loss and exact gradient on a fresh training batch, and the next state."""
        return self.differentiate(params, state, self.batch(key))

    def differentiate(self, params: Params, state: State, batch: Batch) -> tuple[Estimate, State]:
        """Returns loss and gradient on a batch, and the next state."""
        gradient = jax.value_and_grad(self.loss_and_state, has_aux=True)
        (loss, state), grads = gradient(params, state, batch)
        return Estimate(loss, grads), state

    def metrics(self, params: Params, state: State, batch: Batch) -> dict[str, Scalar]:
        """Returns what the task is judged by, in inference mode: "loss", and any others by name."""
        return {"loss": self.loss_and_state(params, state, batch)[0]}

    def everything(self, split: Split = "train") -> Batch | None:
        """Returns a split as one batch; None where batches are drawn and there is no whole."""
        return None

    def draw(self, key: Key) -> "AbstractTask":
        """Returns the task itself: a task is a family of one."""
        return self


@eqx.filter_jit
def judge(
    task: AbstractTask,
    params: Params,
    state: State,
    key: Key,
    split: Split = "test",
    batches: int = 64,
) -> dict[str, Scalar]:
    """Returns the task's metrics over a whole split, or where there is none, over some batches.

    `state` is that of the network, as training left it; `key` that of the batches.
    """
    whole = task.everything(split)
    if whole is not None:
        return task.metrics(params, state, whole)
    keys = jax.random.split(key, batches)
    each = jax.lax.map(lambda key: task.metrics(params, state, task.batch(key, split)), keys)
    return jax.tree.map(jnp.mean, each)


def _same(value: Any) -> Any:
    return value


class TransformedTask(AbstractTask):
    """Another task, seen through maps of its parts; maps that hold arrays are Equinox modules.

    Only `lopt.tasks.WithValidation` goes around it, not within.

    Attributes:
        map_initial, map_batch: from its initial parameters and batches to those of this task.
        map_params, map_key: from parameters and batch keys of this task to its own.
        map_loss: from its loss to that of this task.
    """

    task: AbstractTask
    map_initial: Callable[[Params], Params] = eqx.field(default=_same, converter=as_pytree)
    map_params: Callable[[Params], Params] = eqx.field(default=_same, converter=as_pytree)
    map_batch: Callable[[Batch], Batch] = eqx.field(default=_same, converter=as_pytree)
    map_key: Callable[[Key], Key] = eqx.field(default=_same, converter=as_pytree)
    map_loss: Callable[[Scalar], Scalar] = eqx.field(default=_same, converter=as_pytree)

    @override
    def init(self, key: Key) -> Params:
        return self.map_initial(self.task.init(key))

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return self.map_batch(self.task.batch(self.map_key(key), split))

    @override
    def prepare(self, params: Params, key: Key) -> State:
        return self.task.prepare(self.map_params(params), key)

    @override
    def loss(self, params: Params, batch: Batch) -> Scalar:
        return self.map_loss(self.task.loss(self.map_params(params), batch))

    @override
    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        loss, state = self.task.loss_and_state(self.map_params(params), state, batch)
        return self.map_loss(loss), state

    @override
    def differentiate(self, params: Params, state: State, batch: Batch) -> tuple[Estimate, State]:
        own, transpose = jax.vjp(self.map_params, params)
        found, state = self.task.differentiate(own, state, batch)
        loss, slope = jax.value_and_grad(self.map_loss)(found.loss)
        scaled = jax.tree.map(lambda grad: slope.astype(grad.dtype) * grad, found.grads)
        return dataclasses.replace(found, loss=loss, grads=transpose(scaled)[0]), state

    @override
    def metrics(self, params: Params, state: State, batch: Batch) -> dict[str, Scalar]:
        found = self.task.metrics(self.map_params(params), state, batch)
        return {**found, "loss": self.map_loss(found["loss"])}

    @override
    def everything(self, split: Split = "train") -> Batch | None:
        whole = self.task.everything(split)
        return None if whole is None else self.map_batch(whole)
