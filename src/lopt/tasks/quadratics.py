"""Noisy quadratics: tasks on which stochastic gradient descent can be solved by hand.

Along each eigenvector it is a linear recursion, with losses in closed form (Schaul et al. 2013,
arXiv:1206.1106; Wu et al. 2018, arXiv:1803.02021).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.tasks.ranges import check_range, check_scale, log_uniform

Vector = Float[Array, " dim"]
Rate = float | Scalar
Count = int | Int[Array, ""]


class Quadratic(AbstractTask):
    """A quadratic bowl whose centre is seen through noise.

        loss(x, n) = 1/2 sum_i h_i (x_i - c_i - n_i)^2,    n_i ~ noise_scale * N(0, 1)

    A batch is one draw of n, or `()` if there is no noise. Parameters start as
    initial_scale * N(0, 1).

    Attributes:
        eigenvalues: the curvatures h.
        centre: the minimiser c of the expected loss.
        noise_scale: the standard deviation of the noise.
        initial_scale: the standard deviation of initial parameters.

    Example:
        >>> import jax, jax.numpy as jnp, lopt
        >>> task = lopt.tasks.Quadratic(jnp.array([1.0, 0.1]), jnp.zeros(2))
        >>> print(task.sgd_params(jnp.ones(2), learning_rate=0.5, num_steps=2))
        [0.25   0.9025]
    """

    eigenvalues: Vector
    centre: Vector
    noise_scale: float = eqx.field(static=True, default=0.0)
    initial_scale: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        if self.eigenvalues.shape != self.centre.shape:
            shapes = f"eigenvalues {self.eigenvalues.shape}, centre {self.centre.shape}"
            raise ValueError(f"Quadratic({shapes}) must have one shape; try jnp.zeros_like.")
        check_scale("Quadratic", "noise_scale", self.noise_scale)
        check_scale("Quadratic", "initial_scale", self.initial_scale)

    @override
    def init(self, key: Key) -> Vector:
        return self.initial_scale * jax.random.normal(key, self.centre.shape, self.centre.dtype)

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        if self.noise_scale == 0:
            return ()
        return self.noise_scale * jax.random.normal(key, self.centre.shape, self.centre.dtype)

    @override
    def loss(self, params: Vector, batch: Batch) -> Scalar:
        curvature, distance = self._seen_from(params)
        if self.noise_scale > 0:
            distance = distance - batch.astype(params.dtype)
        return 0.5 * jnp.sum(curvature * distance**2)

    @property
    def minimum(self) -> Scalar:
        """The expected loss at the centre, 1/2 noise_scale^2 sum_i h_i."""
        return 0.5 * self.noise_scale**2 * jnp.sum(self.eigenvalues)

    def sgd_params(self, params: Vector, learning_rate: Rate, num_steps: Count) -> Vector:
        """Returns where gradient descent without noise, and on average with it, arrives.

        x_t = c + (1 - learning_rate h)^t (x_0 - c)
        """
        curvature, distance = self._seen_from(params)
        factor = 1 - jnp.asarray(learning_rate, params.dtype) * curvature
        steps = jnp.asarray(num_steps, params.dtype)
        return self.centre.astype(params.dtype) + factor**steps * distance

    def expected_sgd_loss(self, params: Vector, learning_rate: Rate, num_steps: Count) -> Scalar:
        """Returns the loss expected after `num_steps` steps, over all noise in and after them.

        With q = learning_rate h and a = 1 - q, the distance d = x - c follows d' = a d + q n:

            E d_t = a^t d_0,    Var d_t = (q noise_scale)^2 (1 + a^2 + ... + a^(2t - 2))
            E loss = 1/2 sum_i h_i ((E d_t)^2 + Var d_t + noise_scale^2)
        """
        curvature, distance = self._seen_from(params)
        rate = jnp.asarray(learning_rate, params.dtype) * curvature
        steps = jnp.asarray(num_steps, params.dtype)
        power = ((1 - rate) ** 2) ** steps
        # 1 - a^2 = q (2 - q). Where it vanishes, each of the t terms of the sum is 1; the inner
        # `where` keeps the gradient of the branch not taken finite.
        denominator = rate * (2 - rate)
        vanishes = denominator == 0
        terms = jnp.where(vanishes, steps, (1 - power) / jnp.where(vanishes, 1, denominator))
        variance = (rate * self.noise_scale) ** 2 * terms
        return 0.5 * jnp.sum(curvature * (power * distance**2 + variance + self.noise_scale**2))

    def _seen_from(self, params: Vector) -> tuple[Vector, Vector]:
        """Returns h and x - c in the dtype of the parameters."""
        centre = self.centre.astype(params.dtype)
        return self.eigenvalues.astype(params.dtype), params - centre


class QuadraticFamily(AbstractTaskFamily):
    """Quadratics with log-uniform eigenvalues and N(0, 1) centres.

    Attributes:
        dim: the number of parameters.
        low, high: the range of the eigenvalues.
        noise_scale, initial_scale: as in `Quadratic`.
    """

    dim: int = eqx.field(static=True)
    low: float = eqx.field(static=True, default=0.01)
    high: float = eqx.field(static=True, default=1.0)
    noise_scale: float = eqx.field(static=True, default=0.0)
    initial_scale: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        check_integer("QuadraticFamily", "dim", self.dim, hint="dim=10")
        check_range("QuadraticFamily", self.low, self.high)

    @override
    def draw(self, key: Key) -> Quadratic:
        spectrum_key, centre_key = jax.random.split(key)
        eigenvalues = log_uniform(spectrum_key, self.low, self.high, (self.dim,))
        centre = jax.random.normal(centre_key, (self.dim,))
        return Quadratic(eigenvalues, centre, self.noise_scale, self.initial_scale)


class LeastSquares(AbstractTask):
    """|matrix x - target|^2; parameters start as initial_scale * N(0, 1)."""

    matrix: Float[Array, "row dim"]
    target: Float[Array, " row"]
    initial_scale: float = eqx.field(static=True, default=1.0)

    @override
    def init(self, key: Key) -> Vector:
        shape = self.matrix.shape[1:]
        return self.initial_scale * jax.random.normal(key, shape, self.matrix.dtype)

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return ()

    @override
    def loss(self, params: Vector, batch: Batch) -> Scalar:
        matrix, target = self.matrix.astype(params.dtype), self.target.astype(params.dtype)
        return jnp.sum((matrix @ params - target) ** 2)


class LeastSquaresFamily(AbstractTaskFamily):
    """Least squares whose square matrix and target are N(0, 1).

    Reference: the quadratic functions of Andrychowicz et al. 2016, arXiv:1606.04474, 3.1.

    Attributes:
        dim: the number of parameters.
        initial_scale: as in `LeastSquares`.
    """

    dim: int = eqx.field(static=True, default=10)
    initial_scale: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        check_integer("LeastSquaresFamily", "dim", self.dim, hint="dim=10")
        check_scale("LeastSquaresFamily", "initial_scale", self.initial_scale)

    @override
    def draw(self, key: Key) -> LeastSquares:
        drawn = jax.random.normal(key, (self.dim, self.dim + 1))
        return LeastSquares(drawn[:, :-1], drawn[:, -1], self.initial_scale)
