"""Lanczos' method: a large symmetric operator seen from one vector, as a few nodes and weights.

After m steps from s, the eigenvalues of the tridiagonal matrix are nodes and the squares of their
first components weights of a Gauss quadrature: sum_i w_i h_i^k = s^T H^k s for all k < 2m. From
random vectors it estimates the density of eigenvalues (Ghorbani et al. 2019, arXiv:1901.10159).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer

Vector = Float[Array, " dim"]


class Quadrature(eqx.Module):
    """Nodes h_i and weights w_i with sum_i w_i f(h_i) = s^T f(H) s, exactly for polynomials.

    Attributes:
        nodes: estimates of eigenvalues, the outermost of which are the best.
        weights: how much of s lies there; they add up to its squared length.
    """

    nodes: Float[Array, "*group node"]
    weights: Float[Array, "*group node"]

    def moment(self, power: int) -> Float[Array, "*group"]:
        """Returns s^T H^power s."""
        return jnp.sum(self.weights * self.nodes**power, axis=-1)


def lanczos(operator: Callable[[Vector], Vector], start: Vector, order: int) -> Quadrature:
    """Returns the quadrature of `order` nodes that `operator` has, seen from `start`.

    Args:
        operator: a symmetric linear map.
        start: the vector s.
        order: m, how many times the operator is applied. Each new vector is made orthogonal to
            all before it, twice, so that no eigenvalue is found again as a ghost.

    Example:
        >>> import jax.numpy as jnp
        >>> from lopt.analysis import lanczos
        >>> print(lanczos(lambda x: jnp.array([1.0, 3.0]) * x, jnp.array([1.0, 2.0]), 2).weights)
        [1. 4.]
    """
    check_integer("lanczos", "order", order)
    norm = jnp.linalg.norm(start)
    tiny = jnp.finfo(start.dtype).tiny
    epsilon = 10 * jnp.finfo(start.dtype).eps

    def step(
        carry: tuple[Float[Array, "order dim"], Vector, Array], i: Array
    ) -> tuple[tuple[Float[Array, "order dim"], Vector, Array], tuple[Array, Array]]:
        basis, vector, scale = carry
        basis = basis.at[i].set(vector)
        image = operator(vector)
        diagonal = vector @ image
        scale = jnp.maximum(scale, jnp.linalg.norm(image))
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        beside = jnp.linalg.norm(image)
        # What is left of rounding alone is no direction: the space is exhausted.
        beside = jnp.where(beside > epsilon * scale, beside, 0)
        vector = jnp.where(beside > 0, image / jnp.maximum(beside, tiny), 0)
        return (basis, vector, scale), (diagonal, beside)

    basis = jnp.zeros((order, *start.shape), start.dtype)
    first = start / jnp.maximum(norm, tiny)
    carry = basis, first, jnp.zeros((), start.dtype)
    _, (diagonal, beside) = jax.lax.scan(step, carry, jnp.arange(order, dtype=jnp.int32))
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    nodes, vectors = jnp.linalg.eigh(matrix)
    return Quadrature(nodes, norm**2 * vectors[0] ** 2)
