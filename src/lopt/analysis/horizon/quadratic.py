"""The noisy quadratic of Wu et al. 2018 (arXiv:1803.02021): what SGD does on it, without sampling.

One example has the loss 1/2 sum_i h_i (theta_i - c_i)^2 with c_i ~ N(0, sigma_i^2) anew in each
step. SGD with momentum, in the paper's signs, is v' = mu v - a h (theta - c), theta' = theta + v'.
The loss is quadratic, so that second moments obey a closed linear recursion.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.core.checks import check_integer, check_positive
from lopt.core.types import Scalar

Nodes = Float[Array | np.ndarray, " node"]
Steps = Float[Array | np.ndarray, " step"]
Number = float | Float[Array | np.ndarray, ""]


class NoisyQuadratic(eqx.Module):
    """A quadratic in its eigenvectors, and the noise of its gradients.

    Attributes:
        curvatures: the eigenvalues h_i.
        weights: how many directions each of them stands for; may be fractions, as of a quadrature.
        noise: sigma_i^2, the variance of the minimiser that one example shows.
        start: E theta_i^2 before the first step; the velocity starts at zero.

    Example:
        >>> import numpy as np
        >>> from lopt.analysis import NoisyQuadratic, constant_schedule, expected_losses
        >>> problem = NoisyQuadratic(np.ones(1), np.ones(1), np.ones(1), np.full(1, 10.0))
        >>> print(expected_losses(problem, constant_schedule(0.5, 0.0, 2)))
        [5.     1.375  0.46875]
    """

    curvatures: Nodes
    weights: Nodes
    noise: Nodes
    start: Nodes

    def __check_init__(self) -> None:
        for name in ("curvatures", "weights", "noise", "start"):
            field = getattr(self, name)
            if field.shape != self.curvatures.shape:
                raise ValueError(
                    f"NoisyQuadratic({name} of shape {field.shape}) must have the shape of "
                    f"curvatures, {self.curvatures.shape}; give one value for each of them."
                )
            if isinstance(field, jax.core.Tracer):
                continue
            if not np.isfinite(field).all():
                raise ValueError(f"NoisyQuadratic({name}) must be finite; it is {field}.")
            if name != "curvatures" and bool((np.asarray(field) < 0).any()):
                raise ValueError(
                    f"NoisyQuadratic({name}) has the negative entry {np.asarray(field).min()}; "
                    "weights and variances must be at least 0."
                )


class Schedule(eqx.Module):
    """A learning rate and a momentum for each step.

    Attributes:
        learning_rates: a_t, the factor of the gradient in step t.
        momenta: mu_t, the share of the velocity that step t keeps.
    """

    learning_rates: Steps
    momenta: Steps

    def __check_init__(self) -> None:
        rates, momenta = (jnp.shape(field) for field in (self.learning_rates, self.momenta))
        if rates != momenta:
            raise ValueError(
                f"Schedule(learning_rates of shape {rates}, momenta of shape {momenta}) must have "
                "both for each step; give equally many."
            )

    @property
    def effective_rates(self) -> Steps:
        """The rates a / (1 - mu) at which a constant gradient is followed in the end."""
        forgets = self.momenta != 1
        rest = jnp.where(forgets, 1 - self.momenta, 1)
        return jnp.where(forgets, self.learning_rates / rest, jnp.inf)


class Moments(eqx.Module):
    """Second moments of each direction: P = E theta^2, Q = E v^2 and C = E theta v."""

    position: Nodes
    velocity: Nodes
    cross: Nodes


def constant_schedule(learning_rate: float, momentum: float, horizon: int) -> Schedule:
    """Returns the same learning rate and momentum for each of `horizon` steps."""
    check_integer("constant_schedule", "horizon", horizon, hint=250)
    _check_finite("constant_schedule", learning_rate=learning_rate, momentum=momentum)
    return Schedule(np.full(horizon, learning_rate), np.full(horizon, momentum))


def inverse_time_schedule(
    learning_rate: float, decay: float, time_constant: float, horizon: int
) -> Schedule:
    """Returns a_t = learning_rate / (1 + t / time_constant)^decay, t from 0, without momentum."""
    check_integer("inverse_time_schedule", "horizon", horizon, hint=250)
    check_positive("inverse_time_schedule", "time_constant", time_constant, hint=60)
    _check_finite("inverse_time_schedule", learning_rate=learning_rate, decay=decay)
    time = np.arange(horizon)
    return Schedule(
        learning_rate * (1 + time / time_constant) ** -float(decay), np.zeros(horizon, float)
    )


def chebyshev_quadratic(
    dim: int = 1000, nodes: int | None = None, condition: float = 200.0, start: float = 100.0
) -> NoisyQuadratic:
    """Returns the problem of the paper: the worst spectrum for conjugate gradient.

        h_j = (1 + 1/condition) / 2 + (1 - 1/condition) / 2 cos((2j - 1) pi / (2 nodes))

    with sigma_j^2 = 1 / h_j, for j from 1 to `nodes`. Every expected loss after T steps is then a
    polynomial in h of degree 2T + 1, which Gauss and Chebyshev's quadrature integrates exactly on
    T + 1 nodes: 251 of them, each standing for dim / 251 directions, give the losses of 250 steps
    in a thousand dimensions.

    Args:
        dim: the number of directions.
        nodes: the number of distinct curvatures; `dim` by default.
        condition: the largest curvature, 1, over the smallest.
        start: E theta_j^2 at the start.
    """
    nodes = dim if nodes is None else nodes
    if not nodes >= 1 or not dim >= 1:
        raise ValueError(f"chebyshev_quadratic(dim={dim}, nodes={nodes}) must both be at least 1.")
    _check_finite("chebyshev_quadratic", condition=condition, start=start)
    if condition < 1:
        raise ValueError(f"chebyshev_quadratic(condition={condition}) must be at least 1; try 200.")
    angles = (2 * np.arange(1, nodes + 1) - 1) * np.pi / (2 * nodes)
    curvatures = 0.5 * (1 + 1 / condition) + 0.5 * (1 - 1 / condition) * np.cos(angles)
    return NoisyQuadratic(
        curvatures, np.full(nodes, dim / nodes), 1 / curvatures, np.full(nodes, float(start))
    )


def begin(problem: NoisyQuadratic) -> Moments:
    """Returns the moments before the first step, at rest."""
    rest = jnp.zeros_like(problem.start)
    return Moments(jnp.asarray(problem.start), rest, rest)


def advance(
    problem: NoisyQuadratic, moments: Moments, learning_rate: Number, momentum: Number
) -> Moments:
    """Returns the moments one step later.

    With X = E theta v',

        Q' = mu^2 Q - 2 mu a h C + (a h)^2 (P + sigma^2),    X = mu C - a h P,
        P' = P + 2 X + Q',                                    C' = X + Q'.

    Args:
        problem: the quadratic.
        moments: before the step.
        learning_rate: a.
        momentum: mu.
    """
    rates = learning_rate * problem.curvatures
    velocity = (
        momentum**2 * moments.velocity
        - 2 * momentum * rates * moments.cross
        + rates**2 * (moments.position + problem.noise)
    )
    crossed = momentum * moments.cross - rates * moments.position
    return Moments(moments.position + 2 * crossed + velocity, velocity, crossed + velocity)


def excess_loss(problem: NoisyQuadratic, moments: Moments) -> Scalar:
    """Returns 1/2 sum_i h_i P_i: the expected loss above that of the minimiser."""
    return 0.5 * jnp.sum(problem.weights * problem.curvatures * moments.position)


def expected_loss(problem: NoisyQuadratic, schedule: Schedule) -> Scalar:
    """Returns the excess loss expected after the last step; differentiable, cheaply in reverse."""

    def step(moments: Moments, rates: tuple[Scalar, Scalar]) -> tuple[Moments, None]:
        return advance(problem, moments, *rates), None

    # A scan of expectations, not of training: nothing here has a gradient estimate or an optimizer.
    # Steps are recomputed in reverse, which is faster than storing their intermediate products.
    step = jax.checkpoint(step, prevent_cse=False)
    moments, _ = jax.lax.scan(step, begin(problem), _rates(schedule))
    return excess_loss(problem, moments)


def expected_losses(problem: NoisyQuadratic, schedule: Schedule) -> Float[Array, " time"]:
    """Returns the excess loss expected before the first step and after each: one more than steps.

    Args:
        problem: the quadratic.
        schedule: learning rates and momenta; the losses are differentiable in both.
    """
    return jnp.sum(component_losses(problem, schedule), axis=1)


def component_losses(problem: NoisyQuadratic, schedule: Schedule) -> Float[Array, "time node"]:
    """Returns the terms of `expected_losses`: the part of each node in each of its losses."""

    def step(moments: Moments, rates: tuple[Scalar, Scalar]) -> tuple[Moments, Nodes]:
        moments = advance(problem, moments, *rates)
        return moments, moments.position

    first = begin(problem)
    _, positions = jax.lax.scan(step, first, _rates(schedule))
    scale = 0.5 * problem.weights * problem.curvatures
    return jnp.concatenate([first.position[None], positions]) * scale[None]


def band_shares(problem: NoisyQuadratic, bands: int) -> Float[np.ndarray, "node band"]:
    """Returns the share of each node's directions in each of `bands` equal groups, steepest first.

    Args:
        problem: the quadratic.
        bands: into how many groups of equally many directions the spectrum is cut.
    """
    order = np.argsort(-np.asarray(problem.curvatures), kind="stable")
    weights = np.asarray(problem.weights, np.float64)[order]
    ends = np.cumsum(weights)
    edges = np.linspace(0, ends[-1], bands + 1)
    overlap = np.minimum(ends[:, None], edges[None, 1:]) - np.maximum(
        (ends - weights)[:, None], edges[None, :-1]
    )
    shares = np.empty_like(overlap)
    shares[order] = np.clip(overlap, 0, None) / weights[:, None]
    return shares


def _rates(schedule: Schedule) -> tuple[Array, Array]:
    return jnp.asarray(schedule.learning_rates), jnp.asarray(schedule.momenta)


def _check_finite(function: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not np.isfinite(number):
            raise ValueError(f"{function}({name}={number}) must be finite.")
