"""Meta-optimization while training: look ahead from the current weights, update theta, rewind.

It sees only the next few steps, and so is as greedy as a learner of theta can be. It is here as
the subject of Wu et al. 2018, arXiv:1803.02021, section 4.2, and to be compared with.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.checks import check_integer, check_length
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining, mean_loss
from lopt.core.task import TransformedTask
from lopt.core.types import Key, Scalar, Theta
from lopt.core.unroll import unroll


class LookAheadState(eqx.Module):
    """One endless run, where it is halted to look ahead from.

    Attributes:
        episode: the run.
        estimates: made since it was halted.
        loss: the mean training loss of its last `stride` steps; NaN before the first.
        key: of the batches to look ahead with.
    """

    episode: Episode
    estimates: Int[Array, ""]
    loss: Scalar
    key: Key


class LookAhead(AbstractGradientEstimator):
    """The gradient of the loss a few steps ahead of one endless run.

    Trains `stride` steps with the current theta, halts, makes `estimates` estimates from there,
    each for an outer step of its own, and goes on. The weights are reset after each look ahead. It
    is exact for its few steps, by forward mode, and sees nothing behind them.

    Attributes:
        inner: whose tasks are trained, by what; its horizon and objective do not count.
        steps: how far to look ahead, inner steps.
        batches: over how many batches the loss there is averaged.
        estimates: outer steps between two stretches of training; on the same batches.
        stride: inner steps of each stretch of training.
        deterministic: whether one batch serves every look-ahead step and the loss there.
    """

    inner: InnerTraining
    steps: int = eqx.field(static=True, default=5)
    batches: int = eqx.field(static=True, default=5)
    estimates: int = eqx.field(static=True, default=10)
    stride: int = eqx.field(static=True, default=100)
    deterministic: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        for name in ("steps", "batches", "estimates", "stride"):
            check_integer("LookAhead", name, getattr(self, name), hint=5)
        end = self.inner.learned.max_steps
        check_length("LookAhead, whose run has no end,", None, end, "lopt.ES")

    @override
    def prepare(self, params: Theta, key: Key) -> LookAheadState:
        episode = self.inner.begin(params, key)
        loss = jnp.full((), jnp.nan, jax.tree.leaves(episode.train.params)[0].dtype)
        zero = jnp.zeros((), jnp.int32)
        # None of the keys that an episode derives from its own.
        return LookAheadState(episode, zero, loss, jax.random.fold_in(key, 2**32 - 1))

    @override
    def estimate(
        self, params: Theta, state: LookAheadState, key: Key
    ) -> tuple[Estimate, LookAheadState]:

        def go_on() -> LookAheadState:
            losses, episode = self.inner.advance(params, state.episode, self.stride)
            return LookAheadState(episode, jnp.zeros_like(state.estimates), jnp.mean(losses), key)

        halted = jax.lax.cond(state.estimates == self.estimates, go_on, lambda: state)

        def ahead(theta: Theta) -> tuple[Scalar, Scalar]:
            loss = self.loss_ahead(theta, halted)
            return loss, loss

        grads, loss = jax.jacfwd(ahead, has_aux=True)(params)
        counted = eqx.tree_at(lambda state: state.estimates, halted, halted.estimates + 1)
        return Estimate(loss, grads), counted

    def loss_ahead(self, theta: Theta, state: LookAheadState) -> Scalar:
        """Returns the loss that theta would lead to from where the run is halted."""
        task = self.inner.tasks.draw(state.episode.task_key)
        if self.deterministic:
            task = TransformedTask(task, map_key=eqx.Partial(_first, state.key))
        train = eqx.tree_at(lambda train: train.key, state.episode.train, state.key)
        optimizer = self.inner.learned.optimizer(theta, state.episode.num_steps)
        train, _ = unroll(task, optimizer, train, self.steps)
        measured = 1 if self.deterministic else self.batches
        key = jax.random.fold_in(state.key, 2**32 - 1)
        return mean_loss(task, train.params, train.estimator_state, key, measured)


def _first(key: Key, _: Key) -> Key:
    return key
