"""Quadratics of TaskSet: matrices with chosen entries or spectra, which noise changes each step."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.tasks.taskset.config import Config, Draw, Load, family

Vector = Float[Array, " dim"]
Matrix = Float[Array, "dim dim"]
Kind = Literal["normal", "uniform", "linspace_eigen", "logspace_eigen"]


class Entries(eqx.Module):
    """How the entries of an array, or the eigenvalues of a matrix, are distributed.

    Attributes:
        kind: independent normal or uniform entries, or a matrix Q diag(s) Q^T with s spread evenly
            or geometrically, and a random orthogonal Q.
        first, second: mean and standard deviation of a normal; otherwise the least and largest.
    """

    kind: Kind = eqx.field(static=True)
    first: Float[Array, ""]
    second: Float[Array, ""]

    def sample(self, key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Returns an array."""
        first, second = self.first, self.second
        if self.kind == "normal":
            return first + second * jax.random.normal(key, shape)
        uniform = jax.random.uniform(key, shape)
        if self.kind == "uniform":
            return first + (second - first) * uniform
        if self.kind == "linspace_eigen":
            spectrum = jnp.linspace(first, second, shape[0])
        else:
            spectrum = jnp.exp(jnp.linspace(jnp.log(first), jnp.log(second), shape[0]))
        q, r = jnp.linalg.qr(uniform)
        # With signs that make the diagonal of R positive, the factorisation is unique.
        q = q * jnp.sign(jnp.diagonal(r))[None]
        return (q * spectrum[None]) @ q.T


class MatrixQuadratic(AbstractTask):
    """A quadratic of TaskSet, least at zero.

        loss(x) = scale ||(A + N) x||^2,    or    scale log(||(A + N) x||^2 + 1e-8)

    Attributes:
        matrix: A.
        initial: distribution of initial parameters.
        noise: distribution of N, drawn in each step; None for zero.
        scale: a factor.
        log: whether the logarithm is taken.
    """

    matrix: Matrix
    initial: Entries
    noise: Entries | None
    scale: Scalar
    log: bool = eqx.field(static=True)

    @override
    def init(self, key: Key) -> Vector:
        return self.initial.sample(key, self.matrix.shape[:1])

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return () if self.noise is None else self.noise.sample(key, self.matrix.shape)

    @override
    def loss(self, params: Vector, batch: Batch) -> Scalar:
        matrix = self.matrix if self.noise is None else self.matrix + batch
        square = jnp.sum((matrix.astype(params.dtype) @ params) ** 2)
        return self.scale.astype(params.dtype) * (jnp.log(square + 1e-8) if self.log else square)


@dataclasses.dataclass(frozen=True)
class EntriesConfig:
    """`Entries`, as numbers."""

    kind: Kind
    first: float
    second: float

    def build(self) -> Entries:
        """Returns the distribution."""
        return Entries(self.kind, jnp.asarray(self.first, float), jnp.asarray(self.second, float))


@family("quadratic_family")
@dataclasses.dataclass(frozen=True)
class QuadraticConfig(Config):
    """A quadratic of `dim` parameters; `seed` is that of its matrix. See `MatrixQuadratic`."""

    dim: int
    seed: int
    matrix: EntriesConfig
    initial: EntriesConfig
    noise: EntriesConfig | None
    log: bool
    scale: float

    @classmethod
    @override
    def draw(cls, draw: Draw) -> "QuadraticConfig":
        matrix = _draw_matrix(draw, (1.0, 2.0), (-3.0, 1.0, 5.0), (50.0, 100.0), 1000.0)
        kind: Kind = draw.choice(("normal", "uniform"))
        if kind == "normal":
            initial = EntriesConfig(kind, draw.normal(0.0, 1.0), draw.uniform(0.0, 2.0))
        else:
            low = draw.uniform(-5.0, 2.5)
            initial = EntriesConfig(kind, low, low + draw.uniform(0.0, 5.0))
        log = draw.flag(0.5)
        dim, seed = draw.log_integer(2, 3000), draw.integer(100_000)
        scale = draw.log_uniform(1e-5, 1e3)
        noise = None
        if draw.flag(0.5):
            noise = _draw_matrix(draw, (0.05, 0.05), (-0.15, 0.05, 0.25), (2.0, 10.0), 10.0)
        return cls(dim, seed, matrix, initial, noise, log, scale)

    @override
    def build(self, load: Load) -> MatrixQuadratic:
        matrix = self.matrix.build().sample(jax.random.key(self.seed), (self.dim, self.dim))
        noise = None if self.noise is None else self.noise.build()
        scale = jnp.asarray(self.scale, float)
        return MatrixQuadratic(matrix, self.initial.build(), noise, scale, self.log)


def _draw_matrix(
    draw: Draw,
    normal: tuple[float, float],
    uniform: tuple[float, float, float],
    linspace: tuple[float, float],
    logspace: float,
) -> EntriesConfig:
    """Samples one of four kinds, each with the ends of the ranges of its two numbers."""
    kind: Kind = draw.choice(("normal", "linspace_eigen", "uniform", "logspace_eigen"))
    if kind == "normal":
        return EntriesConfig(kind, draw.normal(0.0, normal[0]), draw.uniform(0.0, normal[1]))
    if kind == "logspace_eigen":
        return EntriesConfig(kind, 1e-5, draw.uniform(1.0, logspace))
    low, high, width = uniform if kind == "uniform" else (0.01, *linspace)
    least = draw.uniform(low, high)
    return EntriesConfig(kind, least, least + draw.uniform(0.0, width))
