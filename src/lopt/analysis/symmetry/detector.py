"""The generic detector: directions that no minibatch's gradient has, and the symmetries they are.

Gradients of many minibatches at one point, stacked: every direction that is missing in all of them
leaves the loss unchanged to first order, whatever the data. Their number bounds that of conserved
quantities from above (Marcotte et al. 2023, arXiv:2307.00144). Named symmetries either explain all
of them, or something is left to be found, such as a ReLU that is on for all data, at these params:
its bias can be moved into the next layer's, as if it were linear.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.analysis.symmetry.bench import prepare_bench
from lopt.analysis.symmetry.check import check_task
from lopt.analysis.symmetry.deviation import check_names
from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.analysis.symmetry.places import Keys
from lopt.core.checks import check_integer, check_key, is_real
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, State

# A tangent of unit length belongs to the null space if less than this of it sticks out.
OUTSIDE = 1e-6


class Share(eqx.Module):
    """What one symmetry explains of the null space.

    Attributes:
        name, kind: of the symmetry.
        dimensions: the rank of its tangents.
        added: how many dimensions it adds to those of the symmetries before it.
        outside: how much of a tangent of unit length sticks out of the null space, at most; nothing
            is added if it is not rounding.
    """

    name: str
    kind: str
    dimensions: int
    added: int
    outside: float


class MissingRanks(eqx.Module):
    """The result of `missing_ranks`.

    Attributes:
        size: the number of params.
        rank: of the stacked gradients.
        gap: the smallest singular value that counts and the largest that does not, as shares of the
            largest.
        shares: of each symmetry, in the order they were given.
        directions: an orthonormal basis of the null space, as rows of raveled params.
    """

    size: int
    rank: int
    gap: tuple[float, float]
    shares: tuple[Share, ...]
    directions: Float[np.ndarray, "direction parameter"]

    @property
    def nullity(self) -> int:
        """The number of missing ranks."""
        return self.size - self.rank

    @property
    def unexplained(self) -> int:
        """The number of missing ranks that no symmetry explains.

        Not all of them are symmetries that are left to be found: a ReLU or leaky ReLU that has one
        sign on all data is a linear unit at these params, which has more. Behind other such units
        that is frequent; try other params.
        """
        return self.nullity - sum(share.added for share in self.shares)

    def added_by_kind(self) -> dict[str, int]:
        """Returns how many dimensions symmetries of each kind add to those before them."""
        kinds: dict[str, int] = {}
        for share in self.shares:
            kinds[share.kind] = kinds.get(share.kind, 0) + share.added
        return kinds


def missing_ranks(
    task: AbstractTask,
    key: Key,
    generators: Sequence[AbstractGenerator] = (),
    *,
    params: Params | None = None,
    batches: int = 1500,
    threshold: float | None = None,
) -> MissingRanks:
    """Returns how many ranks are missing in the gradients of many minibatches, and why.

    For small networks: the singular values of a matrix of batches times params are computed.

    Args:
        task: the task.
        key: of the batches, and of the params.
        generators: symmetries to attribute the null space to, in this order.
        params: where; by default initial params with noise.
        batches: their number, at least that of the params.
        threshold: the smallest singular value that counts, as a share of the largest; by default
            1e-10 in double and 1e-4 in single precision.

    Raises:
        ValueError: if there are fewer batches than params, or an argument is none of its kind.
    """
    check_task("missing_ranks", task)
    if generators:
        check_names("missing_ranks", generators)
    check_key("missing_ranks", key)
    check_integer("missing_ranks", "batches", batches, hint=1500)
    if threshold is not None and not (is_real(threshold) and 0 < threshold < 1):
        raise ValueError(
            f"missing_ranks(threshold={threshold!r}) must be a share above 0 and below 1; try 1e-4."
        )
    bench_key, draw_key = jax.random.split(key)
    bench = prepare_bench("missing_ranks", task, params, bench_key, 1)
    flat, _ = jax.flatten_util.ravel_pytree(bench.params)
    if batches < flat.size:
        raise ValueError(
            f"missing_ranks(batches={batches}) must be at least the number of params, {flat.size}, "
            f"or ranks are missing for want of gradients; try batches={2 * flat.size}."
        )
    if threshold is None:
        threshold = 1e-10 if flat.dtype == jnp.float64 else 1e-4
    keys = jax.random.split(draw_key, batches)
    stacked = np.asarray(_stack(task, bench.params, bench.state, keys))
    _, values, rows = np.linalg.svd(stacked, full_matrices=False)
    values = values / values[0]
    rank = int(np.sum(values > threshold))
    below = float(values[rank]) if rank < len(values) else 0.0
    null = rows[rank:]
    shares = attribute(null, bench.params, generators)
    return MissingRanks(flat.size, rank, (float(values[rank - 1]), below), shares, null)


def attribute(
    directions: Float[np.ndarray, "direction parameter"],
    params: Params,
    generators: Sequence[AbstractGenerator],
) -> tuple[Share, ...]:
    """Returns what symmetries explain of a space of directions.

    Args:
        directions: an orthonormal basis, as rows of raveled params.
        params: where the tangents are taken.
        generators: the symmetries, in order.

    Raises:
        ValueError: if the directions are not of the params.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if np.ndim(directions) != 2 or np.shape(directions)[1] != size:
        raise ValueError(
            f"attribute(directions) must be rows of {size} numbers, as many as params have; their "
            f"shape is {np.shape(directions)}. Try missing_ranks(...).directions."
        )
    directions = np.asarray(directions)
    if generators:
        check_names("attribute", generators)
    shares, explained = [], np.zeros((0, directions.shape[1]))
    for generator in generators:
        tangents = np.asarray(_tangents(generator, params))
        # What rounding leaves, of tangents and of the null space: 1.5e-8 in double precision, and
        # 3.5e-4 in single.
        rounding = float(np.sqrt(np.finfo(tangents.dtype).eps))
        lengths = np.linalg.norm(tangents, axis=1, keepdims=True)
        tangents = tangents / np.where(lengths > 0, lengths, 1)
        sticking = tangents - (tangents @ directions.T) @ directions
        outside = float(np.max(np.linalg.norm(sticking, axis=1)))
        dimensions, added = _rank(tangents, rounding), 0
        if outside < max(OUTSIDE, rounding):
            before = _rank(explained, rounding)
            explained = np.concatenate([explained, tangents])
            added = _rank(explained, rounding) - before
        shares.append(Share(generator.name, generator.kind, dimensions, added, outside))
    return tuple(shares)


@eqx.filter_jit
def _stack(
    task: AbstractTask, params: Params, state: State, keys: Keys
) -> Float[Array, "batch parameter"]:
    """Returns the raveled gradient on a batch for each key, of unit length."""

    def grads(key: Key) -> Float[Array, " parameter"]:
        batch = task.batch(key)
        slope = jax.grad(lambda params: task.loss_and_state(params, state, batch)[0])(params)
        flat, _ = jax.flatten_util.ravel_pytree(slope)
        return flat / jnp.maximum(jnp.linalg.norm(flat), jnp.finfo(flat.dtype).tiny)

    return jax.lax.map(grads, keys)


def _tangents(generator: AbstractGenerator, params: Params) -> Float[Array, "unit parameter"]:
    tangents = generator.tangents(params)
    return jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(tangents)


def _rank(rows: Float[np.ndarray, "row column"], rounding: float) -> int:
    """Returns the rank of some rows of unit length."""
    return int(np.linalg.matrix_rank(rows, tol=rounding)) if len(rows) else 0
