"""A learned optimizer with a learned factor of the updates for each type of tensor."""

from typing import Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, State, Theta
from lopt.learned.safeguards import AbstractCombination

TYPES = ("vector", "matrix", "kernel")


class PerTensorType(AbstractCombination):
    """Another optimizer, its updates times exp(multiplier of the tensor's type).

    The rank decides the type: vectors (and scalars), matrices, and kernels of convolutions. All
    factors start at one. They tune a rule that was distilled on perceptrons for kernels.

    Theta is `{"learned": ..., "log_multipliers": {"vector": ..., "matrix": ..., "kernel": ...}}`.

    Attributes:
        learned: the optimizer.
    """

    learned: AbstractLearnedOptimizer

    @override
    def init(self, key: Key) -> Theta:
        return self.wrap(self.learned.init(key))

    def wrap(self, theta: Theta) -> Theta:
        """Returns the initial theta around these weights of `learned`."""
        return {"learned": theta, "log_multipliers": {name: jnp.zeros(()) for name in TYPES}}

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        return self.learned.begin(theta["learned"], params, num_steps)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        updates, state = self.learned.update(theta["learned"], grads, state, params, **extra)

        def multiplied(update: Any) -> Any:
            log = theta["log_multipliers"][TYPES[min(max(update.ndim, 1), 3) - 1]]
            return update * jnp.exp(log).astype(update.dtype)

        return jax.tree.map(multiplied, updates), state
