"""The noisy quadratic of a real network: its best learning rate, before any training.

Around given parameters, a network's loss has a gradient g, a Hessian H, and minibatch gradients of
covariance C. The loss that SGD is expected to reach depends on them only through g^T H^k g and
tr(H^k C), which Lanczos' method gives when started from g, and from single gradients' noise.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lopt.analysis.horizon.lanczos import Quadrature, Vector, lanczos
from lopt.analysis.horizon.quadratic import NoisyQuadratic
from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Params, Scalar
from lopt.core.unroll import start, unroll


class NetworkQuadratic(eqx.Module):
    """What a network looks like from where it stands.

    Attributes:
        signal: the quadrature of H seen from the gradient g.
        noise: that seen from the noise of minibatch gradients, one row for each of them.
    """

    signal: Quadrature
    noise: Quadrature

    @property
    def squared_gradient(self) -> float:
        """The squared length of the gradient, g^T g."""
        return float(self.signal.moment(0))

    @property
    def curvature_along_gradient(self) -> float:
        """The curvature g^T H g."""
        return float(self.signal.moment(1))

    @property
    def noise_trace(self) -> float:
        """The trace of the covariance C of minibatch gradients."""
        return float(jnp.mean(self.noise.moment(0)))

    @property
    def noise_curvature(self) -> float:
        """The trace of H C: how much of the noise steps upwards."""
        return float(jnp.mean(self.noise.moment(1)))

    @property
    def greedy_rate(self) -> float:
        """The best learning rate for one step, g^T g / (g^T H g + tr(H C))."""
        return self.squared_gradient / (self.curvature_along_gradient + self.noise_curvature)

    def problem(self, smallest: float = 1e-6) -> NoisyQuadratic:
        """Returns the noisy quadratic of these moments.

        Losses are linear in E theta_i^2 and in sigma_i^2, so that nodes of the signal, which start
        at g_i^2 / h_i^2 and have no noise, stand beside nodes of the noise, which start at zero
        and have sigma_i^2 = c_i / h_i^2. Losses are exact to the order of the quadratures: m
        nodes suffice for horizons up to m.

        Args:
            smallest: nodes closer to zero than this, relative to the largest, are moved there.
        """
        signal, noise = (
            jax.tree.map(lambda a: np.asarray(a, np.float64), q) for q in (self.signal, self.noise)
        )
        rows = len(noise.nodes)
        curvatures = np.concatenate([signal.nodes, noise.nodes.ravel()])
        floor = smallest * np.max(np.abs(curvatures))
        sign = np.where(curvatures < 0, -1, 1)
        curvatures = sign * np.maximum(np.abs(curvatures), floor)
        count = signal.nodes.size
        moved = np.arange(curvatures.size) < count
        strength = np.concatenate([signal.weights, noise.weights.ravel() / rows]) / curvatures**2
        return NoisyQuadratic(
            curvatures,
            np.ones_like(curvatures),
            np.where(moved, 0, strength),
            np.where(moved, strength, 0),
        )


def fit_noisy_quadratic(
    task: AbstractTask,
    params: Params,
    key: Key,
    *,
    whole: Batch | None = None,
    batches: int = 64,
    probes: int = 32,
    order: int = 16,
) -> NetworkQuadratic:
    """Returns the noisy quadratic that a task looks like at `params`.

    Args:
        task: any task without state.
        params: where to look.
        key: of the minibatches.
        whole: one batch of all examples, whose gradient and Hessian are meant. Without it, those
            are means over `batches` batches, which adds tr(C) / batches to g^T g.
        batches: how many, if `whole` is not given.
        probes: how many minibatch gradients the noise is measured on.
        order: the order of each quadrature, and the longest horizon that it is exact for.

    Raises:
        ValueError: if a count is not positive.
    """
    for name, count in (("batches", batches), ("probes", probes), ("order", order)):
        check_integer("fit_noisy_quadratic", name, count)
    return _fit(task, params, key, whole, batches, probes, order)


@eqx.filter_jit
def _fit(
    task: AbstractTask,
    params: Params,
    key: Key,
    whole: Batch | None,
    batches: int,
    probes: int,
    order: int,
) -> NetworkQuadratic:
    whole_key, probe_key = jax.random.split(key)
    gradient_of, flat = _mean_gradient(task, params, whole, whole_key, batches)
    gradient = gradient_of(flat)
    unflatten = ravel_pytree(params)[1]

    def operator(vector: Vector) -> Vector:
        return jax.jvp(gradient_of, (flat,), (vector,))[1]

    def probe(key: Key) -> Quadrature:
        batch = task.batch(key)
        one = jax.grad(lambda flat: _loss(task, unflatten(flat), batch))(flat)
        # The mean of n batches has a noise of its own, which is in the difference.
        excess = 1.0 if whole is not None else 1 + 1 / batches
        return lanczos(operator, (one - gradient) / excess**0.5, order)

    noise = jax.lax.map(probe, jax.random.split(probe_key, probes))
    return NetworkQuadratic(lanczos(operator, gradient, order), noise)


def spectral_density(
    task: AbstractTask,
    params: Params,
    key: Key,
    *,
    whole: Batch | None = None,
    batches: int = 64,
    probes: int = 8,
    order: int = 32,
) -> Quadrature:
    """Returns nodes and weights that stand for the eigenvalues of the Hessian.

    Sums over eigenvalues, such as the trace, are sums over nodes: weights add up to the number of
    parameters. It is the mean of quadratures seen from random vectors of entries 1 and -1.

    Args:
        task: any task without state.
        params: where to look.
        key: of the minibatches and the random vectors.
        whole: one batch of all examples, whose Hessian is meant.
        batches: over how many the Hessian is a mean, if `whole` is not given.
        probes: the number of random vectors.
        order: the order of each quadrature.

    Raises:
        ValueError: if a count is not positive.
    """
    for name, count in (("batches", batches), ("probes", probes), ("order", order)):
        check_integer("spectral_density", name, count)
    return _density(task, params, key, whole, batches, probes, order)


@eqx.filter_jit
def _density(
    task: AbstractTask,
    params: Params,
    key: Key,
    whole: Batch | None,
    batches: int,
    probes: int,
    order: int,
) -> Quadrature:
    whole_key, probe_key = jax.random.split(key)
    gradient_of, flat = _mean_gradient(task, params, whole, whole_key, batches)

    def probe(key: Key) -> Quadrature:
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return lanczos(lambda vector: jax.jvp(gradient_of, (flat,), (vector,))[1], signs, order)

    found = jax.lax.map(probe, jax.random.split(probe_key, probes))
    return Quadrature(found.nodes.ravel(), found.weights.ravel() / probes)


def _loss(task: AbstractTask, params: Params, batch: Batch) -> Scalar:
    return task.loss_and_state(params, (), batch)[0]


def _mean_gradient(
    task: AbstractTask, params: Params, whole: Batch | None, key: Key, batches: int
) -> tuple[Callable[[Vector], Vector], Vector]:
    """Returns the gradient of the whole loss as a function of flat parameters, and these."""
    flat, unflatten = ravel_pytree(params)

    def loss(flat: Vector, batch: Batch) -> Scalar:
        return _loss(task, unflatten(flat), batch)

    if whole is not None:
        return lambda flat: jax.grad(loss)(flat, whole), flat
    keys = jax.random.split(key, batches)

    def gradient_of(flat: Vector) -> Vector:
        gradients = jax.lax.map(lambda key: jax.grad(loss)(flat, task.batch(key)), keys)
        return jnp.mean(gradients, axis=0)

    return gradient_of, flat


@eqx.filter_jit
def measured_losses(
    task: AbstractTask,
    params: Params,
    learning_rates: Float[Array, " rate"],
    key: Key,
    whole: Batch,
    horizon: int = 1,
    runs: int = 64,
) -> Float[Array, "rate run"]:
    """Returns the loss after SGD at each learning rate: the line search that a fit foretells.

    Args:
        task: any task without state.
        params: where every run starts.
        learning_rates: to try, with the same batches for each.
        key: of all runs.
        whole: one batch of all examples, on which the loss is taken.
        horizon: the number of steps.
        runs: how many, each on batches of its own.
    """
    for name, count in (("horizon", horizon), ("runs", runs)):
        check_integer("measured_losses", name, count)

    def one(learning_rate: Scalar, key: Key) -> Scalar:
        optimizer = optax.sgd(learning_rate)
        state, _ = unroll(task, optimizer, start(task, optimizer, params, key), horizon)
        return _loss(task, state.params, whole)

    keys = jax.random.split(key, runs)
    return jax.lax.map(lambda rate: jax.vmap(lambda key: one(rate, key))(keys), learning_rates)


def lowest_on_line(
    learning_rates: Float[Array | np.ndarray, " rate"],
    losses: Float[Array | np.ndarray, " rate"],
) -> float:
    """Returns the learning rate of the lowest loss, between those tried: a parabola's minimum.

    Args:
        learning_rates: in rising order, on a geometric grid.
        losses: at each of them; what is not finite is avoided.
    """
    losses = np.where(np.isfinite(losses), np.asarray(losses, np.float64), np.inf)
    logs = np.log(np.asarray(learning_rates, np.float64))
    i = int(np.argmin(losses))
    if i in (0, len(logs) - 1) or not np.isfinite(losses[i - 1 : i + 2]).all():
        return float(np.exp(logs[i]))
    a, b, _ = np.polyfit(logs[i - 1 : i + 2] - logs[i], losses[i - 1 : i + 2], 2)
    return float(np.exp(logs[i] - b / (2 * a)))
