"""Landscapes: classical test functions of optimization, without data or noise.

Formulas, domains and minimisers as collected in Jamil and Yang 2013, arXiv:1308.4008.
"""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.tasks.ranges import check_scale

Vector = Float[Array, " dim"]


class AbstractLandscape(AbstractTask):
    """A deterministic function of `dim` parameters, with a known global minimum.

    Attributes:
        lowest: where it is, one number for each parameter or one for all.
    """

    dim: eqx.AbstractVar[int]
    lowest: eqx.AbstractClassVar[float | tuple[float, ...]]

    @property
    def minimiser(self) -> Vector:
        """The parameters of least loss."""
        return jnp.full(self.dim, jnp.array(self.lowest))

    @property
    def minimum(self) -> Scalar:
        """The least loss."""
        return self.loss(self.minimiser, ())

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return ()


class Rosenbrock(AbstractLandscape):
    """Rosenbrock's banana, a narrow curved valley.

        loss(x) = sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2

    Attributes:
        dim: the number of parameters, at least 2.
        initial_scale: the standard deviation of initial parameters around the customary
            starting point (-1.2, 1, -1.2, 1, ...).
    """

    dim: int = eqx.field(static=True, default=2)
    initial_scale: float = eqx.field(static=True, default=0.0)
    lowest: ClassVar = 1.0

    def __check_init__(self) -> None:
        check_integer("Rosenbrock", "dim", self.dim, 2, hint="dim=2")
        check_scale("Rosenbrock", "initial_scale", self.initial_scale)

    @override
    def init(self, key: Key) -> Vector:
        start = jnp.where(jnp.arange(self.dim) % 2 == 0, -1.2, 1.0)
        return start + self.initial_scale * jax.random.normal(key, (self.dim,))

    @override
    def loss(self, params: Vector, batch: Batch) -> Scalar:
        here, following = params[:-1], params[1:]
        return jnp.sum(100.0 * (following - here**2) ** 2 + (1.0 - here) ** 2)


class AbstractBox(AbstractLandscape):
    """A landscape whose `dim` initial parameters are uniform between -reach and reach."""

    reach: eqx.AbstractVar[float]

    def __check_init__(self) -> None:
        check_integer(type(self).__name__, "dim", self.dim, hint="dim=2")
        check_scale(type(self).__name__, "reach", self.reach)

    @override
    def init(self, key: Key) -> Vector:
        return self.reach * jax.random.uniform(key, (self.dim,), minval=-1.0)


class Ackley(AbstractBox):
    """Ackley's funnel, nearly flat far away and full of local minima around the origin.

    loss(x) = 20 + e - 20 exp(-0.2 sqrt(mean x^2)) - exp(mean cos(2 pi x))
    """

    dim: int = eqx.field(static=True, default=2)
    reach: float = eqx.field(static=True, default=5.0)
    lowest: ClassVar = 0.0

    @override
    def loss(self, params: Vector, batch: Batch) -> Scalar:
        square = jnp.mean(params**2)
        # The funnel ends in a cone, where the root has no gradient: zero, a subgradient, is given.
        is_origin = square == 0
        radius = jnp.where(is_origin, 0, jnp.sqrt(jnp.where(is_origin, 1, square)))
        ripples = jnp.exp(jnp.mean(jnp.cos(2 * math.pi * params)))
        return 20 * (1 - jnp.exp(-0.2 * radius)) + (math.e - ripples)


class Beale(AbstractBox):
    """Beale's function of two parameters, with steep walls and a flat valley.

    loss(x, y) = (1.5 - x + x y)^2 + (2.25 - x + x y^2)^2 + (2.625 - x + x y^3)^2
    """

    reach: float = eqx.field(static=True, default=4.5)
    dim: int = eqx.field(static=True, default=2, init=False)
    lowest: ClassVar = (3.0, 0.5)

    @override
    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        x, y = params[0], params[1]
        first, second, third = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
        return first**2 + second**2 + third**2


class StyblinskiTang(AbstractBox):
    """Styblinski and Tang's function: two valleys per coordinate, one of them the right one.

    loss(x) = 1/2 sum_i x_i^4 - 16 x_i^2 + 5 x_i
    """

    dim: int = eqx.field(static=True, default=2)
    reach: float = eqx.field(static=True, default=5.0)
    lowest: ClassVar = -2.903534027771177  # the least root of 4 x^3 - 32 x + 5

    @override
    def loss(self, params: Vector, batch: Batch) -> Scalar:
        return 0.5 * jnp.sum(params**4 - 16.0 * params**2 + 5.0 * params)


class LogSumExp(AbstractBox):
    """A smooth bowl: the logarithm of a sum of exponentials.

    loss(x, y) = log(exp(x + 3y - 0.1) + exp(x - 3y - 0.1) + exp(-x - 0.1) + 1)
    """

    reach: float = eqx.field(static=True, default=1.0)
    dim: int = eqx.field(static=True, default=2, init=False)
    lowest: ClassVar = (-0.5 * math.log(2), 0.0)

    @override
    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        x, y = params[0], params[1]
        terms = [x + 3 * y - 0.1, x - 3 * y - 0.1, -x - 0.1, jnp.zeros_like(x)]
        return jax.nn.logsumexp(jnp.stack(terms))


class Matyas(AbstractBox):
    """Matyas' function, a long valley along x = y.

    loss(x, y) = 0.26 (x^2 + y^2) - 0.48 x y
    """

    reach: float = eqx.field(static=True, default=10.0)
    dim: int = eqx.field(static=True, default=2, init=False)
    lowest: ClassVar = 0.0

    @override
    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        return 0.26 * jnp.sum(params**2) - 0.48 * params[0] * params[1]


class Branin(AbstractLandscape):
    """Branin's function of two parameters, with three global minima.

        loss(x, y) = (y - 5.1 x^2 / (4 pi^2) + 5 x / pi - 6)^2 + 10 (1 - 1 / (8 pi)) cos x + 10

    Initial parameters are uniform, x between -5 and 10, y between 0 and 15.
    """

    dim: int = eqx.field(static=True, default=2, init=False)
    lowest: ClassVar = (math.pi, 2.275)  # one of the three

    @override
    def init(self, key: Key) -> Float[Array, "2"]:
        return 15 * jax.random.uniform(key, (2,)) - jnp.array([5.0, 0.0])

    @override
    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        x, y = params[0], params[1]
        valley = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
        return valley**2 + 10 * (1 - 1 / (8 * math.pi)) * jnp.cos(x) + 10


class Michalewicz(AbstractLandscape):
    """Michalewicz' function of two parameters: flat, with steep valleys.

        loss(x, y) = -sin(x) sin(x^2 / pi)^10 - sin(y) sin(2 y^2 / pi)^10

    This is m = 5; m = 10 is customary elsewhere. Initial parameters are uniform from 0 to pi, where
    the minimum is.
    """

    dim: int = eqx.field(static=True, default=2, init=False)
    lowest: ClassVar = (2.185311961840168, math.pi / 2)

    @override
    def init(self, key: Key) -> Float[Array, "2"]:
        return math.pi * jax.random.uniform(key, (2,))

    @override
    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        ridges = jnp.sin(params**2 * jnp.arange(1, 3, dtype=params.dtype) / math.pi)
        return -jnp.sum(jnp.sin(params) * ridges**10)
