"""Where symmetries are measured: a task's loss at a point that is generic, on a few batches."""

from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt.analysis.dynamics.checks import check_same_trees
from lopt.analysis.symmetry.places import Keys
from lopt.core.checks import check_integer, check_key
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Params, Scalar, State


class Bench(eqx.Module):
    """Where symmetries are measured: a loss, a point at which it is generic, and batches.

    Attributes:
        task: the task.
        params: the point.
        state: the task's.
        batches: with a leading axis.
        grads: the gradients on each, with a leading axis.
        key: of the moves.
    """

    task: AbstractTask
    params: Params
    state: State
    batches: Batch
    grads: Params
    key: Key

    @eqx.filter_jit
    def losses(self, params: Params) -> Float[Array, " batch"]:
        """Returns the loss on each batch."""
        numbers = jnp.arange(self.number)

        def loss(number: Int[Array, ""]) -> Scalar:
            batch = jax.tree.map(lambda each: each[number], self.batches)
            return _loss(self.task, params, self.state, batch)

        return jax.lax.map(loss, numbers)

    @property
    def number(self) -> int:
        """The number of batches."""
        return len(jax.tree.leaves(self.grads)[0])


def prepare_bench(
    owner: str, task: AbstractTask, params: Params | None, key: Key, batches: int = 3
) -> Bench:
    """Returns where to measure the symmetries of a task.

    Args:
        owner: who measures, for errors.
        task: the task.
        params: the point; by default initial params with noise, so that no bias is zero, as a
            tangent that vanishes tells nothing.
        key: of the point, the batches and the moves.
        batches: their number.

    Raises:
        ValueError: if no batch has a gradient that is finite and not zero, if a loss is not finite,
            or if the params are not like the task's.
    """
    check_key(owner, key)
    check_integer(owner, "batches", batches, hint=3)
    init_key, noise_key, batch_key, prepare_key, move_key = jax.random.split(key, 5)
    if params is None:
        params = _generic(task.init(init_key), noise_key)
    else:
        _check_params(owner, task, params)
    state = task.prepare(params, prepare_key)

    drawn, losses, grads = _draw(task, params, state, jax.random.split(batch_key, batches))
    length = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grads)) ** 0.5
    if not 0 < length < np.inf or not jnp.isfinite(losses).all():
        raise ValueError(
            f"{type(task).__name__} has losses of {np.asarray(losses)} and gradients of length "
            f"{length} at these params, where nothing can be told about its symmetries; try other "
            "params."
        )
    return Bench(task, params, state, drawn, grads, move_key)


def _check_params(owner: str, task: AbstractTask, params: Params) -> None:
    """Refuses params that are not like the initial ones, whatever their precision."""
    expected: Any = jax.eval_shape(task.init, jax.random.key(0))
    check_same_trees(owner, "params", params, "task.init(key)", expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not eqx.is_inexact_array_like(leaf):
            raise ValueError(
                f"{owner}: params{jax.tree_util.keystr(path)} must be floating-point, and "
                f"is {getattr(leaf, 'dtype', type(leaf).__name__)}; try floating-point arrays."
            )


def _loss(task: AbstractTask, params: Params, state: State, batch: Batch) -> Scalar:
    return task.loss_and_state(params, state, batch)[0]


@eqx.filter_jit
def _draw(
    task: AbstractTask, params: Params, state: State, keys: Keys
) -> tuple[Batch, Float[Array, " batch"], Params]:
    """Returns a batch for each key, and the loss and the gradients on it, with leading axes."""
    slope = jax.value_and_grad(lambda p, b: _loss(task, p, state, b))

    def draw(key: Key) -> tuple[Batch, Scalar, Params]:
        batch = task.batch(key)
        return batch, *slope(params, batch)

    return jax.lax.map(draw, keys)


@jax.jit
def _generic(params: Params, key: Key) -> Params:
    """Adds noise of a third of each array's size, or a third of a tenth if that is zero."""
    sizes = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.maximum(jnp.sqrt(jnp.mean(leaf**2)), 0.1)), params
    )
    flat, restore = jax.flatten_util.ravel_pytree(params)
    noise = jax.random.normal(key, flat.shape, flat.dtype)
    return restore(flat + 0.3 * noise * jax.flatten_util.ravel_pytree(sizes)[0])
