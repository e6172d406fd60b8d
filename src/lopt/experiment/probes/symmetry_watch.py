"""Trainings that are watched for the symmetries they break: a course, of one theta or of each.

Deviations are those of `lopt.analysis.symmetry.deviation`; signed sums are kept without their sign,
as published, and where learned optimizers add their updates and the baselines of the study subtract
them it means nothing.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lopt.analysis.symmetry import Deviation, SymmetryProbe, SymmetryReading, drift
from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.unroll import Step
from lopt.experiment.trainings import RECORD_SIZE, Keys, trainings

Measured = Float[Array, "*time"]


class Sizes(eqx.Module):
    """How far a direction leaves one symmetry, in the three measures.

    Attributes:
        signed: |sum_i <u, xi_i>|.
        absolute: sum_i |<u, xi_i>|.
        normalised: the length of the cosines of all units.
    """

    signed: Measured
    absolute: Measured
    normalised: Measured


MEASURES = ("signed", "absolute", "normalised")


class Kept(eqx.Module):
    """What is kept of one symmetry.

    Attributes:
        updates, grads: their deviations.
        drift: how far what gradient flow conserves has moved, as a share; none if it is not known.
    """

    updates: Sizes
    grads: Sizes
    drift: Measured | None


class Course(eqx.Module):
    """What is kept of a training: the loss, and of each symmetry, by name."""

    loss: Measured
    symmetries: dict[str, Kept]


class Watch(eqx.Module):
    """Which symmetries are watched."""

    generators: tuple[AbstractGenerator, ...]

    def record(self, step: Step) -> tuple[Any, dict[str, SymmetryReading]]:
        """Returns loss and readings of one step."""
        return step.loss, SymmetryProbe(self.generators)(step)


@eqx.filter_jit
def watched(
    tasks: AbstractTaskFamily,
    optimizer: optax.GradientTransformation,
    keys: Keys,
    steps: int,
    watch: Watch,
) -> Course:
    """Returns what is kept of training a fresh task for each key, by seed and step."""
    _, (losses, readings) = trainings(
        tasks, optimizer, keys, steps, watch.record, record_size=RECORD_SIZE
    )
    return Course(losses, {n: jax.vmap(_kept)(reading) for n, reading in readings.items()})


class EachTheta(eqx.Module):
    """A record for meta-training: the course of a short training with the theta of each step.

    Attributes:
        tasks: what is trained, and so on, as for `watched`.
    """

    tasks: AbstractTaskFamily
    learned: AbstractLearnedOptimizer
    keys: Keys
    steps: int = eqx.field(static=True)
    watch: Watch

    def __call__(self, step: Step) -> Course:
        """Returns the course, by seed and inner step."""
        optimizer = self.learned.optimizer(step.params, self.steps)
        return watched(self.tasks, optimizer, self.keys, self.steps, self.watch)


def _kept(reading: SymmetryReading) -> Kept:
    moved = None if reading.conserved is None else drift(reading.conserved)
    return Kept(_sizes(reading.updates), _sizes(reading.grads), moved)


def _sizes(found: Deviation) -> Sizes:
    return Sizes(jnp.abs(found.signed), found.absolute, found.cosine)
