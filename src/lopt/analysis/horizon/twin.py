"""The noisy quadratic by sampling: a task and an optimizer for `lopt.unroll`.

What the recursion of moments foretells, any number of sampled runs must confirm.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from lopt.analysis.horizon.quadratic import Nodes, NoisyQuadratic, Schedule
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Scalar, Split
from lopt.core.unroll import Step


class NoisyQuadraticTask(AbstractTask):
    """A sampled run on a noisy quadratic, one parameter per node.

        loss(theta, c) = 1/2 sum_i h_i (theta_i - c_i)^2,    c_i ~ N(0, sigma_i^2)

    Weights play no part in it, as a node stands for directions that all fare alike: they enter
    where losses are summed, in `ExcessLoss`.

    Attributes:
        problem: the curvatures, the noise, and the second moments of the start.

    Example:
        >>> import jax, lopt
        >>> from lopt.analysis import (
        ...     NoisyQuadraticTask, chebyshev_quadratic, constant_schedule, scheduled_momentum)
        >>> task = NoisyQuadraticTask(chebyshev_quadratic(3))
        >>> optimizer = scheduled_momentum(constant_schedule(0.1, 0.9, 5))
        >>> key = jax.random.key(0)
        >>> state = lopt.start(task, optimizer, task.init(key), key)
        >>> lopt.unroll(task, optimizer, state, 5)[1].shape
        (5,)
    """

    problem: NoisyQuadratic

    def init(self, key: Key) -> Nodes:
        """Returns parameters from N(0, start)."""
        return _normal(key, self.problem.start)

    def batch(self, key: Key, split: Split = "train") -> Nodes:
        """Returns the minimiser c that one example shows."""
        return _normal(key, self.problem.noise)

    def loss(self, params: Nodes, batch: Nodes) -> Scalar:
        """Returns 1/2 sum_i h_i (theta_i - c_i)^2."""
        curvatures = jnp.asarray(self.problem.curvatures, params.dtype)
        return 0.5 * jnp.sum(curvatures * (params - batch) ** 2)


def _normal(key: Key, variances: Nodes) -> Float[Array, " node"]:
    deviations = jnp.sqrt(jnp.asarray(variances))
    return deviations * jax.random.normal(key, deviations.shape, deviations.dtype)


class ExcessLoss(eqx.Module):
    """Records 1/2 sum_i w_i h_i theta_i^2 at each step's parameters, for `lopt.unroll`.

    Attributes:
        problem: the quadratic.
    """

    problem: NoisyQuadratic

    def __call__(self, step: Step) -> Scalar:
        """Returns the excess loss at the parameters that the step found."""
        scale = jnp.asarray(self.problem.weights * self.problem.curvatures, step.params.dtype)
        return 0.5 * jnp.sum(scale * step.params**2)


class VelocityState(eqx.Module):
    """The state of `scheduled_momentum`: the step, and the velocity v that was last added."""

    step: Int[Array, ""]
    velocity: PyTree[Float[Array, "..."]]


def scheduled_momentum(schedule: Schedule) -> optax.GradientTransformation:
    """Returns SGD with momentum in the signs of Wu et al. 2018: v' = mu_t v - a_t g, added.

    Args:
        schedule: a learning rate and a momentum for each step; the last pair goes on after it.
    """

    def init(params: PyTree) -> VelocityState:
        return VelocityState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(
        grads: PyTree, state: VelocityState, params: PyTree | None = None
    ) -> tuple[PyTree, VelocityState]:
        last = len(schedule.learning_rates) - 1
        at = jnp.minimum(state.step, last)
        rate = jnp.asarray(schedule.learning_rates)[at]
        kept = jnp.asarray(schedule.momenta)[at]
        velocity = jax.tree.map(
            lambda v, g: kept.astype(v.dtype) * v - rate.astype(v.dtype) * g, state.velocity, grads
        )
        return velocity, VelocityState(state.step + 1, velocity)

    return optax.GradientTransformation(init, update)
