"""Tasks that also tell their optimizer a validation loss."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.estimator import Estimate
from lopt.core.types import Key, Params, Scalar, State
from lopt.tasks.wrapped import AbstractRemembering

ValidationState = tuple[State, tuple[Int[Array, ""], Scalar]]


class WithValidation(AbstractRemembering):
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
    def prepare(self, params: Params, key: Key) -> ValidationState:
        inner = self.task.prepare(params, key)
        shape = jax.eval_shape(lambda: self._validation_loss(params, inner, key))
        return inner, (jnp.zeros((), jnp.int32), jnp.zeros((), shape.dtype))

    @override
    @eqx.filter_jit
    def estimate(
        self, params: Params, state: ValidationState, key: Key
    ) -> tuple[Estimate, ValidationState]:
        inner, (count, last) = state
        found, after = self.task.estimate(params, inner, key)
        last = jax.lax.cond(
            count % self.every == 0, lambda: self._validation_loss(params, inner, key), lambda: last
        )
        extra = {**found.extra, "validation_loss": last}
        return Estimate(found.loss, found.grads, found.dropped, extra), (after, (count + 1, last))

    def _validation_loss(self, params: Params, state: State, key: Key) -> Scalar:
        # Not the key of objectives: an optimizer must not see the batch that it is judged by.
        batch = self.task.batch(jax.random.fold_in(key, 2), "valid_inner")
        return self.task.loss_and_state(params, state, batch)[0]
