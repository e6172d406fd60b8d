"""Tasks that also tell their optimizer a validation loss."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.estimator import Estimate
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Batch, Key, Params, Scalar, Split, State

ValidationState = tuple[State, Int[Array, ""], Scalar]


class WithValidation(AbstractTask):
    """A task, or the tasks of a family, that tells its optimizer a validation loss.

    `update(..., validation_loss=...)` is given the last one measured: the loss in training mode on
    a fresh batch of the split "valid_inner".

    Attributes:
        task: the task, or a family of them.
        every: steps between measurements; mapped over, as within `lopt.Mean`, all are computed.
    """

    task: Any
    every: int = eqx.field(static=True, default=10)

    def __check_init__(self) -> None:
        check_integer("WithValidation", "every", self.every, hint="every=10")

    @override
    def draw(self, key: Key) -> "WithValidation":
        return WithValidation(self.task.draw(key), self.every)

    @override
    def architectures(self) -> tuple[AbstractTaskFamily, ...]:
        return tuple(WithValidation(each, self.every) for each in self.task.architectures())

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
    def prepare(self, params: Params, key: Key) -> ValidationState:
        inner = self.task.prepare(params, key)
        shape = jax.eval_shape(lambda: self._validation_loss(params, inner, key))
        return inner, jnp.zeros((), jnp.int32), jnp.zeros((), shape.dtype)

    @override
    def loss(self, params: Params, batch: Batch) -> Scalar:
        return self.task.loss(params, batch)

    @override
    def loss_and_state(
        self, params: Params, state: ValidationState, batch: Batch
    ) -> tuple[Scalar, ValidationState]:
        inner, count, last = state
        loss, inner = self.task.loss_and_state(params, inner, batch)
        return loss, (inner, count, last)

    @override
    def metrics(self, params: Params, state: ValidationState, batch: Batch) -> dict[str, Scalar]:
        return self.task.metrics(params, state[0], batch)

    @override
    @eqx.filter_jit
    def estimate(
        self, params: Params, state: ValidationState, key: Key
    ) -> tuple[Estimate, ValidationState]:
        inner, count, last = state
        found, after = self.task.estimate(params, inner, key)
        last = jax.lax.cond(
            count % self.every == 0,
            lambda: self._validation_loss(params, inner, key),
            lambda: last,
        )
        extra = {**found.extra, "validation_loss": last}
        return Estimate(found.loss, found.grads, found.dropped, extra), (after, count + 1, last)

    def _validation_loss(self, params: Params, state: State, key: Key) -> Scalar:
        # Not the key of objectives: an optimizer must not see the batch that it is judged by.
        batch = self.task.batch(jax.random.fold_in(key, 2), "valid_inner")
        return self.task.loss_and_state(params, state, batch)[0]
