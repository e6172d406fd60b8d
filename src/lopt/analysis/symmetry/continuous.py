"""The published closed forms for what SGD does to conserved quantities, in continuous time.

Kunin et al. 2021 (arXiv:2012.04728). With steps of s = rate (1 - dampening) of time, momentum b and
weight decay l, keeping the second difference of a heavy ball,

    y'' + 2 gamma y' + w^2 y = source,    gamma = (1 - b) / (s (1 + b)),

where w^2 is 2 l / (s (1 + b)) for a translation, without source, and 4 l / (s (1 + b)) for what is
quadratic, with the source 2 [theta', theta']. Without momentum the first order is kept:
y(t) = exp(-2 l t) y0 + rate * integral of exp(-2 l (t - s)) [g, g] ds. They are approximations:
`exact_law` has none.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.analysis.symmetry.generators import Symmetry
from lopt.analysis.symmetry.laws import HeavyBall, Ledger, check_law

Times = Float[Array, "..."]


def continuous_law(
    generator: Symmetry, optimizer: HeavyBall, ledger: Ledger
) -> Float[Array, "step unit"]:
    """Returns what the closed form predicts of the conserved quantity before each step.

    Sources are those of the recorded run: [g, g] without momentum, and [u, u] with it.

    Args:
        generator: the symmetry.
        optimizer: what trained, from rest.
        ledger: what a `LedgerProbe` recorded of the run.

    Raises:
        ValueError: if there is no law for such a symmetry, or `ledger` is not that of a run.
    """
    check_law("continuous_law", generator, ledger)
    start = ledger.conserved[0]
    size = optimizer.learning_rate * (1 - optimizer.dampening)
    quadratic = generator.motion == "stretch"
    steps = jnp.arange(len(ledger.conserved)).astype(start.dtype)
    times = size * steps
    if not optimizer.momentum:
        decay = (2 if quadratic else 1) * optimizer.weight_decay
        free = jnp.exp(-decay * times)
        kernel, source = free, size * ledger.grads
    else:
        gamma, frequency = _oscillator(optimizer, quadratic)
        free, _ = _responses(gamma, frequency, times)
        # An update is made in the middle of its step.
        kernel = _responses(gamma, frequency, times - size / 2)[1]
        source = 2 * ledger.updates / size**2
    predicted = free[:, None] * start[None]
    if not quadratic:
        return predicted
    # Convolution: the source of step j acts on all steps k > j.
    later = steps[:, None] > steps[None, :]
    lag = jnp.maximum(jnp.arange(len(times))[:, None] - jnp.arange(len(times))[None, :], 0)
    weights = jnp.where(later, kernel[lag], jnp.zeros((), start.dtype))
    return predicted + size * weights @ source


def regime(generator: Symmetry, optimizer: HeavyBall) -> str:
    """Returns "overdamped", "critical" or "underdamped", or "first order" without momentum.

    Raises:
        ValueError: if there is no law for such a symmetry.
    """
    check_law("regime", generator)
    if not optimizer.momentum:
        return "first order"
    gamma, frequency = _oscillator(optimizer, generator.motion == "stretch")
    discriminant = gamma**2 - frequency**2
    if abs(discriminant) <= 1e-12 * gamma**2:
        return "critical"
    return "overdamped" if discriminant > 0 else "underdamped"


def _oscillator(optimizer: HeavyBall, quadratic: bool) -> tuple[float, float]:
    """Returns the damping gamma and the frequency w."""
    inertia = optimizer.learning_rate * (1 - optimizer.dampening) * (1 + optimizer.momentum)
    gamma = (1 - optimizer.momentum) / inertia
    return gamma, ((4 if quadratic else 2) * optimizer.weight_decay / inertia) ** 0.5


def _responses(gamma: float, frequency: float, times: Times) -> tuple[Times, Times]:
    """Returns the motion from 1 at rest, and from 0 at speed 1: the kernel of a source."""
    discriminant = gamma**2 - frequency**2
    damping = jnp.exp(-gamma * times)
    if abs(discriminant) <= 1e-12 * gamma**2:
        return damping * (1 + gamma * times), damping * times
    if discriminant < 0:
        turn = (-discriminant) ** 0.5
        cosine, sine = jnp.cos(turn * times), jnp.sin(turn * times) / turn
        return damping * (cosine + gamma * sine), damping * sine
    # Two decays rather than hyperbolic functions, which overflow.
    split = discriminant**0.5
    # gamma - split loses digits if the frequency is low; the product of both is its square.
    fast, slow = -(gamma + split), -(frequency**2) / (gamma + split)
    early, late = jnp.exp(fast * times), jnp.exp(slow * times)
    return (slow * early - fast * late) / (slow - fast), (late - early) / (slow - fast)
