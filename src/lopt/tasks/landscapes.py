"""Landscapes: classical test functions of optimization, without data or noise.

Formulas, domains and minimisers as collected in Jamil and Yang 2013, arXiv:1308.4008.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.tasks.ranges import check_scale

Vector = Float[Array, " dim"]


class AbstractLandscape(AbstractTask):
    """A deterministic function of a vector, with a known global minimum."""

    @property
    @abc.abstractmethod
    def minimiser(self) -> Vector:
        """The parameters of least loss."""

    @property
    @abc.abstractmethod
    def minimum(self) -> float:
        """The least loss."""

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns the empty batch: nothing is random."""
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

    def __check_init__(self) -> None:
        check_integer("Rosenbrock", "dim", self.dim, 2, hint="dim=2")
        check_scale("Rosenbrock", "initial_scale", self.initial_scale)

    @property
    def minimiser(self) -> Vector:
        """(1, ..., 1)."""
        return jnp.ones(self.dim)

    @property
    def minimum(self) -> float:
        """Zero."""
        return 0.0

    def init(self, key: Key) -> Vector:
        """Returns (-1.2, 1, -1.2, 1, ...) + initial_scale * N(0, 1)."""
        start = jnp.where(jnp.arange(self.dim) % 2 == 0, -1.2, 1.0)
        return start + self.initial_scale * jax.random.normal(key, (self.dim,))

    def loss(self, params: Vector, batch: Batch) -> Scalar:
        """Returns sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2."""
        here, following = params[:-1], params[1:]
        return jnp.sum(100.0 * (following - here**2) ** 2 + (1.0 - here) ** 2)


class Ackley(AbstractLandscape):
    """Ackley's funnel, nearly flat far away and full of local minima.

        loss(x) = 20 + e - 20 exp(-0.2 sqrt(mean x^2)) - exp(mean cos(2 pi x))

    Attributes:
        dim: the number of parameters.
        reach: initial parameters are uniform between -reach and reach.
    """

    dim: int = eqx.field(static=True, default=2)
    reach: float = eqx.field(static=True, default=5.0)

    def __check_init__(self) -> None:
        check_integer("Ackley", "dim", self.dim, hint="dim=2")
        check_scale("Ackley", "reach", self.reach)

    @property
    def minimiser(self) -> Vector:
        """The origin."""
        return jnp.zeros(self.dim)

    @property
    def minimum(self) -> float:
        """Zero."""
        return 0.0

    def init(self, key: Key) -> Vector:
        """Returns uniform parameters between -reach and reach."""
        return self.reach * jax.random.uniform(key, (self.dim,), minval=-1.0)

    def loss(self, params: Vector, batch: Batch) -> Scalar:
        """Returns 20 + e - 20 exp(-0.2 sqrt(mean x^2)) - exp(mean cos(2 pi x))."""
        square = jnp.mean(params**2)
        # The funnel ends in a cone, where the root has no gradient: zero, a subgradient, is given.
        is_origin = square == 0
        radius = jnp.where(is_origin, 0, jnp.sqrt(jnp.where(is_origin, 1, square)))
        ripples = jnp.exp(jnp.mean(jnp.cos(2 * math.pi * params)))
        return 20 * (1 - jnp.exp(-0.2 * radius)) + (math.e - ripples)


class Beale(AbstractLandscape):
    """Beale's function of two parameters, with steep walls and a flat valley.

        loss(x, y) = (1.5 - x + x y)^2 + (2.25 - x + x y^2)^2 + (2.625 - x + x y^3)^2

    Attributes:
        reach: initial parameters are uniform between -reach and reach.
    """

    reach: float = eqx.field(static=True, default=4.5)

    def __check_init__(self) -> None:
        check_scale("Beale", "reach", self.reach)

    @property
    def minimiser(self) -> Vector:
        """(3, 1/2)."""
        return jnp.array([3.0, 0.5])

    @property
    def minimum(self) -> float:
        """Zero."""
        return 0.0

    def init(self, key: Key) -> Vector:
        """Returns uniform parameters between -reach and reach."""
        return self.reach * jax.random.uniform(key, (2,), minval=-1.0)

    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        """Returns the sum of the three squares."""
        x, y = params[0], params[1]
        first, second, third = 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3
        return first**2 + second**2 + third**2


class StyblinskiTang(AbstractLandscape):
    """Styblinski and Tang's function: two valleys per coordinate, one of them the right one.

        loss(x) = 1/2 sum_i x_i^4 - 16 x_i^2 + 5 x_i

    Attributes:
        dim: the number of parameters.
        reach: initial parameters are uniform between -reach and reach.
    """

    dim: int = eqx.field(static=True, default=2)
    reach: float = eqx.field(static=True, default=5.0)

    def __check_init__(self) -> None:
        check_integer("StyblinskiTang", "dim", self.dim, hint="dim=2")
        check_scale("StyblinskiTang", "reach", self.reach)

    @property
    def minimiser(self) -> Vector:
        """The least root of 4 x^3 - 32 x + 5 = 0 in every coordinate."""
        return jnp.full(self.dim, -2.903534027771177)

    @property
    def minimum(self) -> float:
        """-39.17 per coordinate."""
        return -39.16616570377142 * self.dim

    def init(self, key: Key) -> Vector:
        """Returns uniform parameters between -reach and reach."""
        return self.reach * jax.random.uniform(key, (self.dim,), minval=-1.0)

    def loss(self, params: Vector, batch: Batch) -> Scalar:
        """Returns 1/2 sum_i x_i^4 - 16 x_i^2 + 5 x_i."""
        return 0.5 * jnp.sum(params**4 - 16.0 * params**2 + 5.0 * params)
