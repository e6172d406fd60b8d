"""Runs that are watched from inside: one optimizer, several fresh tasks, a record of every step.

Learning rates of the references are the best of a grid for just these runs, by the published
criterion: the mean training loss of the whole run (Sobotka et al. 2024, arXiv:2312.07174).
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

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
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Params, Scalar
from lopt.core.unroll import Step, TrainState
from lopt.experiment.baselines import BASELINES, Tuned, tune
from lopt.experiment.trainings import Keys, begin, drawn, dtype_of, trainings

HISTOGRAM = UpdateHistogram()
# Records of so many numbers are computed at once: of fewer steps of large networks.
RECORD_SIZE = 2**22


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


def tuned_references(tasks: AbstractTaskFamily, keys: Keys, steps: int, name: str) -> Tuned:
    """Returns the rate of a reference with the lowest mean loss over all steps and runs."""
    baseline = BASELINES[name]

    def train(optimizer: optax.GradientTransformation) -> tuple[Scalar, tuple[()]]:
        return jnp.mean(trainings(tasks, optimizer, keys, steps)[1]), ()

    return tune(baseline.factory, baseline.rates.astype(dtype_of(tasks)), train)


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
    begun = jax.vmap(lambda key: begin(tasks, optimizer, key))(keys)
    states, seen, watch = [begun], [], Watch(companions)
    for i in range(1, len(moments)):
        steps = moments[i] - moments[i - 1]
        state, part = trainings(
            tasks, optimizer, keys, steps, watch, states=states[-1], record_size=RECORD_SIZE
        )
        states.append(state)
        seen.append(part)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *seen), states


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
        task = drawn(tasks, keys[i])
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
