"""Losses after several horizons of one run: what hyperparameter surfaces are made of.

Wu et al. 2018, arXiv:1803.02021, section 4.1. Map them over theta for a surface, differentiate them
for the field of meta-gradients on it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_length
from lopt.core.inner import InnerTraining, mean_loss
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, State, Theta
from lopt.core.unroll import Step, unroll


def measure_after(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    horizons: tuple[int, ...],
    measure: Callable[[AbstractTask, Params, State, Key], Any],
) -> Any:
    """Returns what is measured of a network after each of some horizons of a single run.

    Args:
        inner: what is trained, by what; its horizon and objective do not count.
        theta: of the optimizer.
        key: of the run. Equal keys give the same minibatches, whatever theta is.
        horizons: inner steps, increasing.
        measure: (task, params, state, key) to any pytree of arrays; the key is always the same.

    Returns:
        The measurements, with a leading axis of one place per horizon.

    Raises:
        ValueError: if a horizon is not positive, they do not increase, or the last is longer than
            the learned optimizer is made for.
    """
    check_horizons("measure_after(horizons", horizons)
    run = f"measure_after(horizons={horizons})"
    check_length(run, horizons[-1], inner.learned.max_steps)
    run_key, measure_key = jax.random.split(key)
    episode = inner.begin(theta, run_key, jnp.asarray(horizons[-1], jnp.int32))
    task = inner.tasks.draw(episode.task_key)
    wanted = jnp.asarray(horizons, jnp.int32)

    def record(step: Step) -> Any:
        def measured() -> Any:
            params = jax.tree.map(jnp.add, step.params, step.updates)
            return measure(task, params, step.estimator_state, measure_key)

        def nothing() -> Any:
            return jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(measured)
            )

        return jax.lax.cond(jnp.any(step.step + 1 == wanted), measured, nothing)

    optimizer = inner.learned.optimizer(theta, episode.num_steps)
    _, record_of_steps = unroll(task, optimizer, episode.train, horizons[-1], record=record)
    return jax.tree.map(lambda leaf: leaf[wanted - 1], record_of_steps)


def losses_after(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    horizons: tuple[int, ...],
    batches: int = 10,
) -> Float[Array, " horizon"]:
    """Returns the mean loss over some training batches after each of some horizons of one run.

    The batches are the same for equal keys. See `measure_after`.
    """
    return measure_after(inner, theta, key, horizons, functools.partial(mean_loss, batches=batches))


def check_horizons(what: str, horizons: tuple[int, ...]) -> None:
    """Refuses horizons that are not positive integers in increasing order."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in horizons)
    if not horizons or not whole or list(horizons) != sorted(set(horizons)):
        raise ValueError(
            f"{what}={horizons!r}) must be positive numbers of inner steps in increasing order; "
            "try 10, 100, 1000."
        )
