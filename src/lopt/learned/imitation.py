"""Imitation: an expert runs beside a learned optimizer, which is trained to do as it does.

The expert sees the same gradients, and may take part of the steps. Weights change over outer steps
by `lopt.estimators.Scheduled`. Chen et al. 2020, arXiv:2010.09089; ELO, 2026, arXiv:2607.06772.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.inner import train_loss
from lopt.core.learned import AbstractLearnedOptimizer, Tensor
from lopt.core.task import AbstractTask
from lopt.core.tensors import as_tensor
from lopt.core.types import NumSteps, Params, Scalar, State, Theta, as_pytree
from lopt.core.unroll import Step
from lopt.learned.safeguards import AbstractCombination, as_learned


class GuidedState(eqx.Module):
    """The states of both optimizers, and how their last updates differed, as a mean over tensors.

    Attributes:
        parts: the learned optimizer's state, and the expert's.
        direction: 1 - cos(angle between the updates).
        magnitude: the squared logarithm of the ratio of their norms.
    """

    parts: State
    direction: Scalar
    magnitude: Scalar


class Guided(AbstractCombination):
    """A learned optimizer with an expert beside it.

    Updates are (1 - share) times the learned optimizer's, plus share times the expert's.

    Attributes:
        learned: the optimizer.
        expert: the other, such as `optax.adam(1e-3)`.
        share: an array, from zero to one: how much of the path is the expert's.
    """

    learned: AbstractLearnedOptimizer = eqx.field(converter=as_learned)
    expert: AbstractLearnedOptimizer = eqx.field(converter=as_learned)
    share: Float[Array, ""] = eqx.field(converter=lambda x: jnp.asarray(x, float), default=0.0)

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> GuidedState:
        zeros = jnp.zeros((), float), jnp.zeros((), float)  # two, so that they can be donated
        return GuidedState(self.begin_each(theta, params, num_steps), *zeros)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, GuidedState]:
        (ours, theirs), parts = self.update_each(theta, grads, state.parts, params, **extra)
        leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        found = [_differences(as_tensor(one), as_tensor(other)) for one, other in leaves]
        means = (jnp.mean(jnp.stack(each)) for each in zip(*found, strict=True))
        updates = jax.tree.map(
            lambda one, other: one + self.share.astype(one.dtype) * (other - one), ours, theirs
        )
        return updates, GuidedState(parts, *means)


def _differences(one: Tensor, other: Tensor) -> tuple[Scalar, Scalar]:
    """Returns how two updates of a tensor differ in direction and in magnitude."""
    norms = [optax.safe_norm(each, 1e-12) for each in (one, other)]
    cosine = jnp.sum((one / norms[0]) * (other / norms[1]))
    return (1 - cosine).astype(float), (jnp.log(norms[0] / norms[1]) ** 2).astype(float)


class Imitation(eqx.Module):
    """An objective of `lopt.InnerTraining(learned=Guided(...))`: to do as the expert does.

    direction (1 - cos) + magnitude (log of the ratio of norms)^2 + the rest of one times another
    objective. Both weights are arrays.

    Attributes:
        objective: the other.
        direction, magnitude: the weights, which are at least zero and add up to one at most.
    """

    objective: Callable[..., Scalar] = eqx.field(default=train_loss, converter=as_pytree)
    direction: Float[Array, ""] = eqx.field(converter=lambda x: jnp.asarray(x, float), default=0.5)
    magnitude: Float[Array, ""] = eqx.field(converter=lambda x: jnp.asarray(x, float), default=0.25)

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the weighted sum."""
        seen = step.new_opt_state
        if not isinstance(seen, GuidedState):
            raise ValueError("Imitation needs an expert; try InnerTraining(learned=Guided(...)).")
        own = self.objective(task, step, num_steps)
        imitated = self.direction * seen.direction + self.magnitude * seen.magnitude
        return (
            imitated.astype(own.dtype)
            + (1 - self.direction - self.magnitude).astype(own.dtype) * own
        )
