"""Small tasks and optimizers whose meta-gradients are known in closed form."""

from typing import Any

import jax
import jax.numpy as jnp

import lopt


class Position(lopt.AbstractTask):
    """The loss is the parameter itself, which starts at zero."""

    def init(self, key: Any) -> Any:
        return jnp.zeros(())

    def batch(self, key: Any, split: Any = "train") -> Any:
        return ()

    def loss(self, params: Any, batch: Any) -> Any:
        return params


class Drift(lopt.AbstractLearnedOptimizer):
    """Adds theta to the parameter, whatever the gradient.

    On `Position` the loss at step t (from zero) is then t theta: linear in theta, so that ES and
    PES have no smoothing bias, and the mean over steps a to b has the derivative (a + b) / 2.
    """

    def init(self, key: Any) -> Any:
        return jnp.zeros(())

    def begin(self, theta: Any, params: Any) -> Any:
        return ()

    def update(
        self, theta: Any, grads: Any, state: Any, params: Any = None, *, value: Any = None, **_: Any
    ) -> Any:
        return jax.tree.map(lambda g: g * 0 + theta, grads), state


def linear_toy(horizon: int) -> lopt.InnerTraining:
    return lopt.InnerTraining(Position(), Drift(), horizon)


def quadratic_toy(horizon: int, learning_rate: float = 0.1) -> lopt.InnerTraining:
    """SGD with a learned log learning rate on a fixed quadratic without noise."""
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0, 3.0]), jnp.array([1.0, -1.0, 0.5]))
    return lopt.InnerTraining(task, lopt.LearnableSGD(learning_rate), horizon)
