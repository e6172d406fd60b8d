"""Minima of smooth functions of one or two numbers in a box: a grid, then damped Newton steps.

The functions here are polynomials of high degree in a learning rate: a grid finds the basin, and
second derivatives in forward mode, which need no memory, the bottom of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Scalar

Point = Float[Array, " coordinate"]


def minimise_in_box(
    function: Callable[[Point], Scalar],
    lower: Point,
    upper: Point,
    points: tuple[int, ...] = (32, 12),
    iterations: int = 16,
) -> Point:
    """Returns a minimiser of `function` between `lower` and `upper`.

    Args:
        function: twice differentiable in forward mode; what is not finite is avoided.
        lower: the least corner of the box.
        upper: the largest; equal to `lower` where a coordinate is fixed.
        points: of the grid, along each coordinate.
        iterations: of Newton's method. Each tries many dampings at once and keeps the best, so
            that none is ever worse than the one before.
    """
    axes = [
        low + (high - low) * jnp.linspace(0.0, 1.0, count, dtype=lower.dtype)
        for low, high, count in zip(lower, upper, points, strict=True)
    ]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(points))
    dampings = jnp.logspace(-10, 3, 14, dtype=lower.dtype)
    gradient_of = jax.jacfwd(function)
    hessian_of = jax.jacfwd(gradient_of)

    def improve(point: Point, _: None) -> tuple[Point, None]:
        gradient, hessian = gradient_of(point), hessian_of(point)
        # A coordinate that is pressed against its bound is held there.
        held = ((point <= lower) & (gradient > 0)) | ((point >= upper) & (gradient < 0))
        free = jnp.where(held, 0, 1).astype(point.dtype)
        gradient, hessian = gradient * free, hessian * jnp.outer(free, free)
        eigenvalues, vectors = jnp.linalg.eigh(hessian)
        scale = jnp.max(jnp.abs(eigenvalues)) + jnp.finfo(point.dtype).tiny
        # Absolute values turn a saddle into a descent.
        denominators = jnp.abs(eigenvalues)[None] + scale * dampings[:, None]
        steps = ((vectors.T @ gradient)[None] / denominators) @ vectors.T
        tried = jnp.concatenate(
            [point[None], jnp.clip(point[None] - steps, lower[None], upper[None])]
        )
        return _best(function, tried), None

    return jax.lax.scan(improve, _best(function, grid), length=iterations)[0]


def _best(function: Callable[[Point], Scalar], points: Float[Array, "n coordinate"]) -> Point:
    values = jax.vmap(function)(points)
    return points[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]
