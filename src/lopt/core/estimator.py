"""The one protocol of lopt: something that, given parameters, returns a loss and a direction."""

import abc

import equinox as eqx
from jaxtyping import Array, Int

from lopt.core.types import Key, Params, Scalar, State


class Estimate(eqx.Module):
    """One sample of a loss and of its gradient.

    Attributes:
        loss: the loss at the parameters (for evolution strategies: the mean over both partners).
        grads: a direction of steepest ascent, same structure, shapes and dtypes as the parameters.
        dropped: how many particles were left out because they were not finite.
        extra: further keyword arguments of the optimizer's `update`, such as a validation loss.
    """

    loss: Scalar
    grads: Params
    dropped: Int[Array, ""] | int = 0
    extra: dict[str, Scalar] = eqx.field(default_factory=dict)


class AbstractGradientEstimator(eqx.Module):
    """Maps parameters to an `Estimate`, carrying a state from step to step.

    Implementations are written for one particle; `lopt.estimators.Mean` maps them over many.
    """

    @abc.abstractmethod
    def prepare(self, params: Params, key: Key) -> State:
        """Returns the state before the first step (empty for most tasks)."""

    @abc.abstractmethod
    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns an estimate of loss and gradient at `params`, and the next state.

        Everything random comes from `key`; the same arguments give the same answer.
        """
