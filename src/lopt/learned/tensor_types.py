"""A learned optimizer whose step each type of tensor multiplies by a learned factor."""

from typing import Any

import jax
import jax.numpy as jnp

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta

TYPES = ("vector", "matrix", "kernel")


class PerTensorType(AbstractLearnedOptimizer):
    """Another optimizer, its updates times exp(multiplier of the tensor's type).

    Types go by rank: vectors (and scalars), matrices, and kernels of convolutions. All multipliers
    start at one. A rule that was distilled on perceptrons has never seen a kernel, and a factor for
    each type is the least that lets it be tuned for one.

    Theta is `{"learned": ..., "log_multipliers": {"vector": ..., "matrix": ..., "kernel": ...}}`.

    Attributes:
        learned: the optimizer.
    """

    learned: AbstractLearnedOptimizer

    @property
    def max_steps(self) -> int | None:
        """That of `learned`."""
        return self.learned.max_steps

    @property
    def needs_num_steps(self) -> bool:
        """That of `learned`."""
        return self.learned.needs_num_steps

    def init(self, key: Key) -> Theta:
        """Returns the weights of `learned`, and zeros."""
        return self.wrap(self.learned.init(key))

    def wrap(self, theta: Theta) -> Theta:
        """Returns these weights of `learned`, and zeros."""
        return {"learned": theta, "log_multipliers": {name: jnp.zeros(()) for name in TYPES}}

    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        """Returns the state of `learned`."""
        return self.learned.begin(theta["learned"], params, num_steps)

    def update(
        self,
        theta: Theta,
        grads: Params,
        state: State,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, State]:
        """Returns the multiplied updates, and the state of `learned`."""
        updates, state = self.learned.update(
            theta["learned"], grads, state, params, value=value, **extra
        )

        def multiplied(update: Any) -> Any:
            log = theta["log_multipliers"][TYPES[min(max(update.ndim, 1), 3) - 1]]
            return update * jnp.exp(log).astype(update.dtype)

        return jax.tree.map(multiplied, updates), state
