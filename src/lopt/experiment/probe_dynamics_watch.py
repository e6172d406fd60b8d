"""Runs that are watched from inside: one optimizer, several fresh tasks, a record of every step.

Learning rates of the references are the best of the published grid by the published criterion, the
mean training loss of the whole run (Sobotka et al. 2024, arXiv:2312.07174), for just these runs.
"""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from lopt.analysis.dynamics import (
    Alignment,
    AlignmentRecord,
    Companions,
    LearningRate,
    Noise,
    UpdateDistribution,
    UpdateHistogram,
    effective_rate,
    noise_of,
    noise_samples,
)
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Key, Params, Scalar
from lopt.core.unroll import Step, TrainState, start, unroll
from lopt.experiment.recorded import recorded_together

Keys = KeyArray[Array, " seed"]

REFERENCES: dict[str, Any] = {
    "SGD": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "Adam": optax.adam,
    "Lion": functools.partial(optax.lion, weight_decay=0.0),
}
RATES = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1, 5e-1, 1.0, 3.0)
HISTOGRAM = UpdateHistogram()


class Seen(eqx.Module):
    """What is kept of every step.

    Attributes:
        loss: before the update.
        gradient_norm: Euclidean, of all tensors together.
        updates: their distribution.
        rate: the effective learning rate.
        alignment: with each reference, at the same params and gradients; none for references.
    """

    loss: Float[Array, "*time"]
    gradient_norm: Float[Array, "*time"]
    updates: UpdateDistribution
    rate: LearningRate
    alignment: dict[str, Alignment]


class Watch(eqx.Module):
    """Records what is kept of every step."""

    companions: Companions | None

    def __call__(self, step: Step) -> Seen:
        """Returns what is kept of this one."""
        aligned = {} if self.companions is None else AlignmentRecord(self.companions)(step)
        rate = effective_rate(step.updates, step.grads)
        norm = optax.tree.norm(step.grads)
        return Seen(step.loss, norm, HISTOGRAM(step), rate, aligned)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The noise at one moment of training; none where there is none, or numbers are not finite.

    Attributes:
        step: how many had been taken.
        gradients, updates: of each seed.
    """

    step: int
    gradients: tuple[Noise | None, ...]
    updates: tuple[Noise | None, ...]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate that was chosen, and whether it lies at an end of the grid."""

    value: float
    at_edge: bool


def fresh_run(tasks: AbstractTaskFamily, key: Key) -> tuple[AbstractTask, Params, Key]:
    """Draws a task; returns it, its initial params, and the key of the run."""
    task_key, init_key, run_key = jax.random.split(key, 3)
    task = tasks.draw(task_key)
    return task, task.init(init_key), run_key


def together(params: Params, runs: int) -> int:
    """Returns of how many steps records are computed at once: fewer of large networks.

    Args:
        params: of one run.
        runs: how many are watched side by side.
    """
    size = runs * sum(leaf.size for leaf in jax.tree.leaves(params))
    return max(1, min(50, 2**22 // size))


def tuned_rate(tasks: AbstractTaskFamily, name: str, keys: Keys, steps: int) -> Rate:
    """Returns the rate of a reference with the lowest mean training loss, over all steps and runs.

    Where all rates diverge it is the smallest.
    """
    means = np.asarray(_mean_losses(tasks, REFERENCES[name], jnp.asarray(RATES), keys, steps))
    best = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))
    return Rate(RATES[best], best in (0, len(RATES) - 1))


@eqx.filter_jit
def _mean_losses(
    tasks: AbstractTaskFamily, factory: Any, rates: Float[Array, " rate"], keys: Keys, steps: int
) -> Float[Array, " rate"]:
    def train(rate: Scalar, key: Key) -> Scalar:
        task, params, run_key = fresh_run(tasks, key)
        # Of the precision of the params, which Optax would otherwise leave after one step.
        optimizer = factory(rate.astype(jax.tree.leaves(params)[0].dtype))
        state = start(task, optimizer, params, run_key)
        return jnp.mean(unroll(task, optimizer, state, steps)[1])

    over_seeds = jax.vmap(train, in_axes=(None, 0))
    return jnp.mean(jax.vmap(over_seeds, in_axes=(0, None))(rates, keys), axis=1)


def watched_runs(
    tasks: AbstractTaskFamily,
    optimizer: optax.GradientTransformation,
    companions: Companions | None,
    keys: Keys,
    moments: tuple[int, ...],
) -> tuple[Seen, list[TrainState]]:
    """Trains fresh tasks, and stops at several moments to keep the whole state.

    Args:
        tasks: the family.
        optimizer: that of `companions`, if there are any.
        companions: who looks on.
        keys: of each run.
        moments: numbers of steps, increasing; the first is 0, and the last the length of the runs.

    Returns:
        What was seen, by run and step, and the states of all runs at each moment.
    """
    states, seen = [_begin(tasks, optimizer, keys)], []
    for i in range(1, len(moments)):
        steps = moments[i] - moments[i - 1]
        state, part = _advance(tasks, optimizer, keys, states[-1], steps, Watch(companions))
        states.append(state)
        seen.append(part)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *seen), states


@eqx.filter_jit
def _begin(
    tasks: AbstractTaskFamily, optimizer: optax.GradientTransformation, keys: Keys
) -> TrainState:
    def begin(key: Key) -> TrainState:
        task, params, run_key = fresh_run(tasks, key)
        return start(task, optimizer, params, run_key)

    return jax.vmap(begin)(keys)


@eqx.filter_jit
def _advance(
    tasks: AbstractTaskFamily,
    optimizer: optax.GradientTransformation,
    keys: Keys,
    states: TrainState,
    steps: int,
    watch: Watch,
) -> tuple[TrainState, Seen]:
    def advance(key: Key, state: TrainState) -> tuple[TrainState, Seen]:
        task = tasks.draw(jax.random.split(key, 3)[0])
        at_once = together(state.params, len(keys))
        return recorded_together(task, optimizer, state, steps, watch, at_once)

    return jax.vmap(advance)(keys, states)


def noise_at(
    tasks: AbstractTaskFamily,
    optimizer: optax.GradientTransformation,
    keys: Keys,
    states: TrainState,
    step: int,
    batches: int,
) -> Checkpoint:
    """Returns the noise of gradients and updates at a moment of all runs, one after another."""
    gradients, updates = [], []
    for i in range(len(keys)):
        task = tasks.draw(jax.random.split(keys[i], 3)[0])
        state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
        # Steps fold their numbers into the run's key, and preparation the largest of 32 bits.
        key = jax.random.fold_in(state.key, 2**32 - 2)
        found = noise_samples(task, optimizer, state, key, batches)
        gradients.append(_noise(found.grads))
        updates.append(_noise(found.updates))
    return Checkpoint(step, tuple(gradients), tuple(updates))


def _noise(vectors: Params) -> Noise | None:
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(vectors)]
    finite = all(np.isfinite(leaf).all() for leaf in leaves)
    if not finite or not any(np.any(leaf != leaf[:1]) for leaf in leaves):
        return None
    return noise_of(leaves)
