"""Gradient flow, through the one loop: what conserves exactly what symmetries say.

The implicit midpoint rule u = -h grad L(theta + u / 2) keeps every linear and every quadratic
function of the params that the flow keeps, whatever the step (Cooper 1987): the law that gradient
flow drifts zero along a symmetry can be seen to rounding. Not so where a gradient jumps, at a kink
of ReLU: there u may have no solution, and what is lost shrinks with the step.
"""

from typing import Any

import equinox as eqx
import jax

from lopt.analysis.symmetry.check import check_task
from lopt.core.checks import check_integer, check_positive
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, State


class GradientFlow(AbstractGradientEstimator):
    """The gradient half a step ahead, with which `optax.sgd(step_size)` follows gradient flow.

    Attributes:
        task: whose loss flows; on a fresh batch in each step, as it has them.
        step_size: of time, and the learning rate of the SGD to use it with.
        iterations: of the fixed point u = -h grad L(theta + u / 2), which converges if half a step
            times the largest curvature is below one, the more slowly the closer.

    Example:
        >>> import jax, jax.numpy as jnp, lopt, optax
        >>> task = lopt.tasks.Quadratic(jnp.array([2.0]), jnp.array([0.0]))
        >>> flow, sgd = GradientFlow(task, 0.1), optax.sgd(0.1)
        >>> state = lopt.start(flow, sgd, jnp.ones(1), jax.random.key(0))
        >>> state, _ = lopt.unroll(flow, sgd, state, 10)
        >>> print(jnp.round(state.params, 2))  # exp(-2)
        [0.13]
    """

    task: AbstractTask
    step_size: float = eqx.field(static=True)
    iterations: int = eqx.field(static=True, default=40)

    def __check_init__(self) -> None:
        check_task("GradientFlow", self.task)
        check_positive("GradientFlow", "step_size", self.step_size, 0.01)
        check_integer("GradientFlow", "iterations", self.iterations, hint=40)

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the task's state."""
        return self.task.prepare(params, key)

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the loss at the params, and the gradient half a step ahead."""
        half = self.step_size / 2
        here, after = self.task.estimate(params, state, key)

        def ahead(_: Any, grads: Params) -> Params:
            middle = jax.tree.map(lambda p, g: p - half * g, params, grads)
            return self.task.estimate(middle, state, key)[0].grads

        grads = jax.lax.fori_loop(0, self.iterations, ahead, here.grads)
        return Estimate(here.loss, grads), after
