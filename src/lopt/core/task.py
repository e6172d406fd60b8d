"""Tasks: what an optimizer is asked to do.

A task is the simplest gradient estimator (it differentiates its own loss on a fresh batch) and
the simplest task family (it draws itself). Most tasks have no state and derive from
`AbstractTask`; a network with running statistics derives from `AbstractStatefulTask` and carries
them as its estimator state.
"""

import abc

import equinox as eqx
import jax

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Batch, Key, Params, Scalar, Split, State


class AbstractTaskFamily(eqx.Module):
    """A distribution of tasks.

    `draw` runs inside compiled programs and is mapped over many keys, so everything that differs
    between two draws has to be an array.
    """

    @abc.abstractmethod
    def draw(self, key: Key) -> "AbstractStatefulTask":
        """Returns one task; the same key gives the same task."""


class AbstractStatefulTask(AbstractGradientEstimator, AbstractTaskFamily):
    """A task whose network carries something besides its parameters, such as running statistics.

    `prepare(params, key)` returns that state, `estimate` hands it on from step to step.
    """

    @abc.abstractmethod
    def init(self, key: Key) -> Params:
        """Returns initial parameters: a pytree of floating-point arrays."""

    @abc.abstractmethod
    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns everything that is random about one step: examples, noise, dropout keys."""

    @abc.abstractmethod
    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        """Returns the loss, a deterministic function of its arguments, and the next state."""

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns loss and exact gradient on a fresh training batch, and the next state."""
        batch = self.batch(key)
        differentiate = jax.value_and_grad(self.loss_and_state, has_aux=True)
        (loss, state), grads = differentiate(params, state, batch)
        return Estimate(loss, grads), state

    def draw(self, key: Key) -> "AbstractStatefulTask":
        """Returns the task itself: a task is a family of one."""
        return self


class AbstractTask(AbstractStatefulTask):
    """A task without state: write `init`, `batch` and `loss`, and it can be trained.

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
    def loss(self, params: Params, batch: Batch) -> Scalar:
        """Returns the loss, a deterministic function of parameters and batch."""

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the empty state."""
        return ()

    def loss_and_state(self, params: Params, state: State, batch: Batch) -> tuple[Scalar, State]:
        """Returns `loss(params, batch)` and the state as it was."""
        return self.loss(params, batch), state
