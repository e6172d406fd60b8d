"""Schedules chosen by a short horizon: greedy, and held for H steps at a time.

The greedy schedule minimises the expected loss one step ahead, which has a closed form (Theorem 2
of Wu et al. 2018, arXiv:1803.02021; without momentum Schaul et al. 2013, arXiv:1206.1106). With a
look-ahead of H steps one learning rate and one momentum are chosen at a time, best for the loss
after H steps, and held for so long: online tuning with an exact inner optimum. With H the whole
run it is the best fixed pair.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lopt.analysis.horizon.minimise import Point, minimise_in_box
from lopt.analysis.horizon.precision import in_double
from lopt.analysis.horizon.quadratic import (
    Moments,
    NoisyQuadratic,
    Schedule,
    advance,
    begin,
    excess_loss,
)
from lopt.core.checks import check_integer
from lopt.core.types import Scalar

# Search ranges: learning rates in units of 1 / the largest curvature, and 1 - momentum.
RATES = (1e-4, 1e2)
SMALLEST_REST = 1e-3


@in_double
def greedy_schedule(problem: NoisyQuadratic, horizon: int, momentum: bool = True) -> Schedule:
    """Returns the schedule of which each step minimises the loss expected right after it.

    With S1 = sum h Q, S2 = sum h^2 C, S3 = sum h^3 (P + sigma^2), B1 = sum h^2 P, B2 = sum h C:

        a = (B1 S1 - B2 S2) / (S3 S1 - S2^2),    mu = (a S2 - B2) / S1

    and a = B1 / S3, mu = 0 at rest or without momentum.

    Args:
        problem: the quadratic.
        horizon: the number of steps.
        momentum: whether there is any.
    """
    check_integer("greedy_schedule", "horizon", horizon, hint=250)
    return _greedy(problem, horizon, momentum)


@functools.partial(jax.jit, static_argnames=("horizon", "momentum"))
def _greedy(problem: NoisyQuadratic, horizon: int, momentum: bool) -> Schedule:
    def step(moments: Moments, _: None) -> tuple[Moments, tuple[Scalar, Scalar]]:
        rate, kept = greedy_pair(problem, moments, momentum)
        return advance(problem, moments, rate, kept), (rate, kept)

    return Schedule(*jax.lax.scan(step, begin(problem), length=horizon)[1])


def greedy_pair(
    problem: NoisyQuadratic, moments: Moments, momentum: bool = True
) -> tuple[Scalar, Scalar]:
    """Returns the learning rate and the momentum that are best for one step."""
    h, w = problem.curvatures, problem.weights
    s1 = jnp.sum(w * h * moments.velocity)
    s2 = jnp.sum(w * h**2 * moments.cross)
    s3 = jnp.sum(w * h**3 * (moments.position + problem.noise))
    b1 = jnp.sum(w * h**2 * moments.position)
    b2 = jnp.sum(w * h * moments.cross)
    alone = jnp.where(s3 == 0, 0, b1 / jnp.where(s3 == 0, 1, s3))
    if not momentum:
        return alone, jnp.zeros_like(alone)
    # At rest, and where velocity and gradient are parallel, momentum adds no second direction.
    determinant = s3 * s1 - s2**2
    plane = determinant > 1e-14 * s3 * s1
    rate = (b1 * s1 - b2 * s2) / jnp.where(plane, determinant, 1)
    kept = (rate * s2 - b2) / jnp.where(plane, s1, 1)
    return jnp.where(plane, rate, alone), jnp.where(plane, kept, 0)


@in_double
def look_ahead_schedule(
    problem: NoisyQuadratic, horizon: int, steps: int, momentum: bool = True
) -> Schedule:
    """Returns the schedule whose blocks of `steps` steps each minimise the loss at their own end.

    Args:
        problem: the quadratic.
        horizon: the number of steps of the whole schedule.
        steps: H, for how many steps a pair is chosen and held; the last block may be shorter.
        momentum: whether momentum, between 0 and 0.999, is chosen too.

    Example:
        >>> from lopt.analysis import chebyshev_quadratic, look_ahead_schedule
        >>> problem = chebyshev_quadratic(1000, nodes=5)
        >>> schedule = look_ahead_schedule(problem, horizon=4, steps=2)
        >>> bool(schedule.learning_rates[0] == schedule.learning_rates[1])
        True
    """
    check_integer("look_ahead_schedule", "horizon", horizon, hint=250)
    check_integer("look_ahead_schedule", "steps", steps, hint=10)
    if steps > horizon:
        raise ValueError(
            f"look_ahead_schedule(steps={steps}) must be between 1 and horizon={horizon}."
        )
    return _look_ahead(problem, jnp.asarray(steps, jnp.int32), jnp.asarray(momentum), horizon)


def best_fixed_schedule(problem: NoisyQuadratic, horizon: int, momentum: bool = True) -> Schedule:
    """Returns the best schedule of one learning rate and one momentum: a look-ahead of all steps.

    Args:
        problem: the quadratic.
        horizon: the number of steps.
        momentum: whether there is any.
    """
    return look_ahead_schedule(problem, horizon, horizon, momentum)


# The number of steps held and whether there is momentum are traced: one program serves all of them.
@functools.partial(jax.jit, static_argnames=("horizon",))
def _look_ahead(problem: NoisyQuadratic, steps: Array, momentum: Array, horizon: int) -> Schedule:
    largest = jnp.max(jnp.abs(problem.curvatures))
    # Coordinates are log a and log (1 - mu): what matters in both is a factor.
    lower = jnp.stack([jnp.log(RATES[0] / largest), jnp.where(momentum, jnp.log(SMALLEST_REST), 0)])
    upper = jnp.stack([jnp.log(RATES[1] / largest), jnp.zeros_like(largest)])
    times = jnp.arange(horizon, dtype=jnp.int32)

    def hold(moments: Moments, point: Point, count: Array) -> Moments:
        rate, kept = jnp.exp(point[0]), 1 - jnp.exp(point[1])
        zero = jnp.zeros_like(count)
        return jax.lax.fori_loop(
            zero, count, lambda _, moments: advance(problem, moments, rate, kept), moments
        )

    def block(carry: tuple[Array, Moments, Schedule]) -> tuple[Array, Moments, Schedule]:
        time, moments, schedule = carry
        count = jnp.minimum(steps, horizon - time)
        point = minimise_in_box(
            lambda point: excess_loss(problem, hold(moments, point, count)), lower, upper
        )
        here = (times >= time) & (times < time + count)
        schedule = Schedule(
            jnp.where(here, jnp.exp(point[0]), schedule.learning_rates),
            jnp.where(here, 1 - jnp.exp(point[1]), schedule.momenta),
        )
        return time + count, hold(moments, point, count), schedule

    empty = jnp.zeros(horizon, largest.dtype)
    carry = (jnp.zeros((), jnp.int32), begin(problem), Schedule(empty, empty))
    return jax.lax.while_loop(lambda carry: carry[0] < horizon, block, carry)[2]
