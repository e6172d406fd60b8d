"""Quadratics of TaskSet: matrices with chosen entries or spectra, which noise changes each step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.tasks.taskset.config import Config, Draw, Load, drawn, family

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

    @classmethod
    def draw_initial(cls, draw: Draw) -> "EntriesConfig":
        """Samples how parameters begin."""
        if draw.choice(("normal", "uniform")) == "normal":
            return cls("normal", draw.normal(0.0, 1.0), draw.uniform(0.0, 2.0))
        low = draw.uniform(-5.0, 2.5)
        return cls("uniform", low, low + draw.uniform(0.0, 5.0))

    @classmethod
    def draw_matrix(
        cls, draw: Draw, normal: Sequence[float], most: float, **ranges: Sequence[float]
    ) -> "EntriesConfig":
        """Samples one of four kinds, each with the ends of the ranges of its two numbers."""
        kind: Kind = draw.choice(("normal", "linspace_eigen", "uniform", "logspace_eigen"))
        if kind == "normal":
            return cls(kind, draw.normal(0.0, normal[0]), draw.uniform(0.0, normal[1]))
        if kind == "logspace_eigen":
            return cls(kind, 1e-5, draw.uniform(1.0, most))
        low, high, width = ranges[kind]
        least = draw.uniform(low, high)
        return cls(kind, least, least + draw.uniform(0.0, width))

    def build(self) -> Entries:
        """Returns the distribution."""
        return Entries(self.kind, jnp.asarray(self.first, float), jnp.asarray(self.second, float))


MATRIX: dict[str, Any] = {"normal": (1.0, 2.0), "most": 1000.0}
MATRIX |= {"uniform": (-3.0, 1.0, 5.0), "linspace_eigen": (0.01, 50.0, 100.0)}
NOISE: dict[str, Any] = {"normal": (0.05, 0.05), "most": 10.0}
NOISE |= {"uniform": (-0.15, 0.05, 0.25), "linspace_eigen": (0.01, 2.0, 10.0)}


@family("quadratic_family")
class QuadraticConfig(Config):
    """A quadratic of `dim` parameters; `seed` is that of its matrix. See `MatrixQuadratic`."""

    matrix: EntriesConfig = drawn(lambda draw: EntriesConfig.draw_matrix(draw, **MATRIX))
    initial: EntriesConfig = drawn(EntriesConfig.draw_initial)
    log: bool = drawn(lambda draw: draw.flag(0.5))
    dim: int = drawn(lambda draw: draw.log_integer(2, 3000))
    seed: int = drawn(lambda draw: draw.integer(100_000))
    scale: float = drawn(lambda draw: draw.log_uniform(1e-5, 1e3))
    noise: EntriesConfig | None = drawn(
        lambda draw: EntriesConfig.draw_matrix(draw, **NOISE) if draw.flag(0.5) else None
    )

    @override
    def build(self, load: Load) -> MatrixQuadratic:
        matrix = self.matrix.build().sample(jax.random.key(self.seed), (self.dim, self.dim))
        noise = None if self.noise is None else self.noise.build()
        scale = jnp.asarray(self.scale, float)
        return MatrixQuadratic(matrix, self.initial.build(), noise, scale, self.log)
