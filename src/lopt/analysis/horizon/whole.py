"""Schedules optimised over the whole horizon: the paper's recipe, and the optimum in a box.

Moments are linear in the moments before them, and quadratic in one step's learning rate and
momentum together. With the other steps held, the final loss is therefore a convex quadratic in one
step's pair, whose minimum in a box is known exactly; what lies behind the step enters through the
adjoint of the recursion (the idea of Krotov's method in optimal control). Sweeps through all steps
never raise the loss, and reach machine precision where quasi-Newton methods stall.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt.analysis.horizon.precision import in_double
from lopt.analysis.horizon.quadratic import (
    Moments,
    NoisyQuadratic,
    Schedule,
    advance,
    begin,
    excess_loss,
    expected_loss,
)
from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.core.unroll import start, unroll

Box = tuple[Float[Array, "2"], Float[Array, "2"]]
SWEEPS_BETWEEN_CHECKS = 50
# A schedule, its loss at the last two checks, and the number of sweeps.
Progress = tuple[Schedule, Scalar, Scalar, Int[Array, ""]]


class ScheduleTask(AbstractTask):
    """The training of a schedule: its parameters are a `Schedule`, its loss is exact.

        loss = log E L_T(max(a, 0), clip(mu, 0, 1))

    Attributes:
        problem: the quadratic.
        initial: the schedule to start from.
    """

    problem: NoisyQuadratic
    initial: Schedule

    def init(self, key: Key) -> Schedule:
        """Returns the initial schedule."""
        return self.initial

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns nothing: expectations are exact."""
        return ()

    def loss(self, params: Schedule, batch: Batch) -> Scalar:
        """Returns the logarithm of the loss expected after the last step."""
        return jnp.log(expected_loss(self.problem, _clipped(params)))


@in_double
def adam_schedule(
    problem: NoisyQuadratic,
    initial: Schedule,
    learning_rate: float = 3e-3,
    num_steps: int = 500,
) -> Schedule:
    """Returns what Adam makes of a schedule: the recipe of Wu et al. 2018.

    Where it ends depends on where it starts: it is far from converged.

    Args:
        problem: the quadratic.
        initial: the schedule to start from, such as the best fixed one.
        learning_rate: of Adam, which moves the rates and momenta themselves.
        num_steps: of Adam.
    """
    task, optimizer, key = (
        ScheduleTask(problem, initial),
        optax.adam(learning_rate),
        jax.random.key(0),
    )
    state = start(task, optimizer, initial, key)
    return _clipped(unroll(task, optimizer, state, num_steps)[0].params)


def _clipped(schedule: Schedule) -> Schedule:
    """Returns the schedule with learning rates of at least 0 and momenta from 0 to 1."""
    return Schedule(jnp.maximum(schedule.learning_rates, 0), jnp.clip(schedule.momenta, 0, 1))


def optimal_schedule(
    problem: NoisyQuadratic,
    initial: Schedule,
    learning_rates: tuple[float, float] = (0.0, 1.0),
    momenta: tuple[float, float] = (0.0, 0.99),
    max_sweeps: int = 5000,
) -> Schedule:
    """Returns the schedule with the least loss after its last step, in a box.

    No pair of it can be improved alone, and no slope points into the box. Short horizons have
    several such schedules: try more than one start where it matters.

    Args:
        problem: the quadratic; its curvatures must be positive.
        initial: the schedule to start from.
        learning_rates: the least and the largest learning rate that are allowed. Without a bound
            (`-inf`, `inf`) components grow beyond all measure on the way, and sweeps find ever
            lower losses.
        momenta: the least and the largest momentum that are allowed.
        max_sweeps: when to give up; sweeps end before if they no longer lower the loss.

    Raises:
        ValueError: if a curvature is not positive, or the box is empty.

    Example:
        >>> from lopt.analysis import chebyshev_quadratic, constant_schedule, optimal_schedule
        >>> problem = chebyshev_quadratic(1000, nodes=5)
        >>> schedule = optimal_schedule(problem, constant_schedule(0.1, 0.0, 4))
        >>> bool((schedule.learning_rates <= 1).all())
        True
    """
    if bool((problem.curvatures <= 0).any()):
        raise ValueError(
            f"optimal_schedule(problem) has the curvature {problem.curvatures.min()}; all must be "
            "positive, try problems without negative curvature, or best_fixed_schedule."
        )
    check_integer("optimal_schedule", "max_sweeps", max_sweeps, hint=5000)
    for name, (least, most) in (("learning_rates", learning_rates), ("momenta", momenta)):
        if not least <= most:
            raise ValueError(
                f"optimal_schedule({name}={(least, most)}) must be the least and the largest that "
                "are allowed; try (0.0, 1.0)."
            )
    low, high = zip(learning_rates, momenta, strict=True)
    return _optimal(problem, initial, low, high, max_sweeps)


@in_double
def _optimal(
    problem: NoisyQuadratic,
    initial: Schedule,
    low: tuple[float, float],
    high: tuple[float, float],
    max_sweeps: int,
) -> Schedule:
    box = jnp.asarray(low, jnp.float64), jnp.asarray(high, jnp.float64)
    return _sweep_until_still(problem, initial, box, jnp.asarray(max_sweeps, jnp.int32))


@jax.jit
def _sweep_until_still(
    problem: NoisyQuadratic, initial: Schedule, box: Box, max_sweeps: Array
) -> Schedule:
    def some(carry: Progress) -> Progress:
        schedule, _, before, count = carry
        schedule, losses = jax.lax.scan(
            lambda schedule, _: _sweep(problem, schedule, box),
            schedule,
            length=SWEEPS_BETWEEN_CHECKS,
        )
        return schedule, before, losses[-1], count + SWEEPS_BETWEEN_CHECKS

    def moving(carry: Progress) -> Array:
        _, before, after, count = carry
        return (count < max_sweeps) & ~(before - after <= 1e-13 * after)

    infinite = jnp.full((), jnp.inf, box[0].dtype)
    carry = (initial, infinite, infinite, jnp.zeros((), jnp.int32))
    # The first comparison is of infinities: no number, and thus no reason to stop.
    return jax.lax.while_loop(moving, some, carry)[0]


def _sweep(problem: NoisyQuadratic, schedule: Schedule, box: Box) -> tuple[Schedule, Scalar]:
    """Returns the schedule with each pair replaced by the best for later ones, and its loss."""

    def backward(adjoint: Moments, rates: tuple[Scalar, Scalar]) -> tuple[Moments, Moments]:
        return _pull_back(problem, adjoint, *rates), adjoint

    def forward(moments: Moments, adjoint: Moments) -> tuple[Moments, tuple[Scalar, Scalar]]:
        pair = _best_pair(problem, adjoint, moments, box)
        return advance(problem, moments, *pair), pair

    rest = jnp.zeros_like(problem.start)
    last = Moments(0.5 * problem.weights * problem.curvatures, rest, rest)
    rates = jnp.asarray(schedule.learning_rates), jnp.asarray(schedule.momenta)
    _, adjoints = jax.lax.scan(backward, last, rates, reverse=True)
    moments, rates = jax.lax.scan(forward, begin(problem), adjoints)
    return Schedule(*rates), excess_loss(problem, moments)


def _pull_back(
    problem: NoisyQuadratic, adjoint: Moments, learning_rate: Scalar, momentum: Scalar
) -> Moments:
    """Returns the transpose of `advance` in the moments, applied to an adjoint."""
    rates = learning_rate * problem.curvatures
    squared = adjoint.position + adjoint.velocity + adjoint.cross
    crossed = 2 * adjoint.position + adjoint.cross
    return Moments(
        adjoint.position + rates**2 * squared - rates * crossed,
        momentum**2 * squared,
        momentum * crossed - 2 * momentum * rates * squared,
    )


def _best_pair(
    problem: NoisyQuadratic, adjoint: Moments, moments: Moments, box: Box
) -> tuple[Scalar, Scalar]:
    """Returns the pair in the box that minimises <adjoint, advance(moments, a, mu)>.

    With k2 = lambda_P + lambda_Q + lambda_C and k1 = 2 lambda_P + lambda_C that is, but for a
    constant, sum k2 (mu^2 Q - 2 mu a h C + a^2 h^2 (P + sigma^2)) + k1 (mu C - a h P).
    """
    h = problem.curvatures
    squared = adjoint.position + adjoint.velocity + adjoint.cross
    crossed = 2 * adjoint.position + adjoint.cross
    aa = jnp.sum(squared * h**2 * (moments.position + problem.noise))
    am = -2 * jnp.sum(squared * h * moments.cross)
    mm = jnp.sum(squared * moments.velocity)
    a1 = -jnp.sum(crossed * h * moments.position)
    m1 = jnp.sum(crossed * moments.cross)
    (low_a, low_m), (high_a, high_m) = box

    def best_rate(m: Scalar) -> Scalar:
        return jnp.clip(-(am * m + a1) / (2 * aa), low_a, high_a)

    def best_momentum(a: Scalar) -> Scalar:
        best = -(am * a + m1) / jnp.where(mm > 0, 2 * mm, 1)
        return jnp.clip(jnp.where(mm > 0, best, 0), low_m, high_m)

    determinant = 4 * aa * mm - am**2
    plane = determinant > 4e-14 * aa * mm
    determinant = jnp.where(plane, determinant, 1)
    a, m = (am * m1 - 2 * mm * a1) / determinant, (am * a1 - 2 * aa * m1) / determinant
    inside = plane & (a >= low_a) & (a <= high_a) & (m >= low_m) & (m <= high_m)
    # Otherwise the minimum lies on an edge; at rest, where momentum does nothing, it is zero.
    zero = jnp.clip(jnp.zeros_like(low_m), low_m, high_m)
    rates = jnp.stack([best_rate(zero), best_rate(low_m), best_rate(high_m), low_a, high_a])
    kept = jnp.stack([zero, low_m, high_m, best_momentum(low_a), best_momentum(high_a)])
    values = aa * rates**2 + am * rates * kept + mm * kept**2 + a1 * rates + m1 * kept
    i = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    return jnp.where(inside, a, rates[i]), jnp.where(inside, m, kept[i])
