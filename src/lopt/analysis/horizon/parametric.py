"""A schedule of two numbers, fitted to a horizon and then run for longer.

The family is a_t = a / (1 + t / K)^decay without momentum, of the paper's offline experiment (Wu
et al. 2018, arXiv:1803.02021). A short horizon asks for a fast decay, at which longer runs stall.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.analysis.horizon.minimise import Point, minimise_in_box
from lopt.analysis.horizon.precision import in_double
from lopt.analysis.horizon.quadratic import (
    Moments,
    NoisyQuadratic,
    Schedule,
    advance,
    begin,
    excess_loss,
    inverse_time_schedule,
)
from lopt.core.checks import check_integer, check_positive


def fit_inverse_time(
    problem: NoisyQuadratic,
    fitted_to: int,
    time_constant: float,
    largest_rate: float = 2.0,
) -> tuple[float, float]:
    """Returns the learning rate and the decay that minimise the loss after `fitted_to` steps.

    Args:
        problem: the quadratic.
        fitted_to: the horizon of the fit.
        time_constant: K, in steps.
        largest_rate: the largest learning rate of the first step that is allowed.

    Raises:
        ValueError: if a number is not positive.
    """
    check_integer("fit_inverse_time", "fitted_to", fitted_to, hint=250)
    check_positive("fit_inverse_time", "time_constant", time_constant, hint=60)
    check_positive("fit_inverse_time", "largest_rate", largest_rate, hint=2.0)
    point = _fit(problem, jnp.int32(fitted_to), float(time_constant), float(largest_rate))
    return float(point[0]), float(point[1])


def fitted_schedule(
    problem: NoisyQuadratic, fitted_to: int, time_constant: float, horizon: int
) -> Schedule:
    """Returns `horizon` steps of the inverse-time schedule that is best for `fitted_to` steps."""
    return inverse_time_schedule(
        *fit_inverse_time(problem, fitted_to, time_constant), time_constant, horizon
    )


@in_double
def _fit(
    problem: NoisyQuadratic, steps: Array, time_constant: float, largest_rate: float
) -> Float[Array, "2"]:
    return _fit_compiled(problem, steps, jnp.asarray(time_constant), jnp.asarray(largest_rate))


@jax.jit
def _fit_compiled(
    problem: NoisyQuadratic, steps: Array, time_constant: Array, largest_rate: Array
) -> Float[Array, "2"]:
    def loss(point: Point) -> Array:
        def step(time: Array, moments: Moments) -> Moments:
            age = 1 + time.astype(point.dtype) / time_constant
            rate = jnp.exp(point[0] - jnp.exp(point[1]) * jnp.log(age))
            return advance(problem, moments, rate, 0.0)

        zero = jnp.zeros_like(steps)
        return excess_loss(problem, jax.lax.fori_loop(zero, steps, step, begin(problem)))

    lower = jnp.stack([jnp.log(largest_rate * 1e-3), jnp.log(jnp.full_like(largest_rate, 1e-2))])
    upper = jnp.stack([jnp.log(largest_rate), jnp.log(jnp.full_like(largest_rate, 1e2))])
    return jnp.exp(minimise_in_box(loss, lower, upper, (16, 24), 24))
