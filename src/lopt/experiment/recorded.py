"""Records of many steps that are computed together, after the last of them.

A step of a small network takes no longer than its record, if that is of many small operations;
computed for some steps at once, a record costs much less.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.types import Record
from lopt.core.unroll import Step, TrainState, unroll


def recorded_together(
    estimator: AbstractGradientEstimator,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    num_steps: int,
    record: Callable[[Step], Any],
    at_once: int,
) -> tuple[TrainState, Record]:
    """Returns what `lopt.unroll` does, with records of some steps computed at once.

    By the semigroup law a run is one of windows, of which each keeps its steps as they are; the
    record is then mapped over them.

    Args:
        estimator: a task, or an estimator of a meta-gradient.
        optimizer: any Optax optimizer.
        state: from `lopt.start`, or from an earlier run.
        num_steps: at least 1.
        record: what to keep of each step.
        at_once: how many steps, cut to a divisor of `num_steps`; memory holds as many states.
    """
    window = max(size for size in range(1, at_once + 1) if num_steps % size == 0)
    if window == 1:
        return unroll(estimator, optimizer, state, num_steps, record=record)

    def advance(state: TrainState, _: None) -> tuple[TrainState, Record]:
        state, steps = unroll(estimator, optimizer, state, window, record=lambda step: step)
        return state, jax.vmap(record)(steps)

    state, kept = jax.lax.scan(advance, state, length=num_steps // window)
    return state, jax.tree.map(lambda leaf: leaf.reshape(num_steps, *leaf.shape[2:]), kept)
