"""The rule that starts at Muon, meta-trained on networks of many kinds and runs of many lengths.

Perceptrons of several depths, with drawn widths and activation, classify 8x8 images: digits, and
MNIST and Fashion-MNIST where their files are found. An autoencoder and a small language model are
trained beside them. Parameters are in units drawn anew for each task. Every architecture is a
program. Episodes have log-uniform lengths, so that steps become smaller where runs are longer.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

import lopt
from lopt import tasks
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Scalar
from lopt.core.unroll import Step
from lopt.estimators import LogUniformHorizon
from lopt.experiment.data.datasets import load_images
from lopt.experiment.data.text import load_text
from lopt.experiment.recipes.digits import found_here
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.learned import MatrixAxes, muon_mlp

STEPS_PER_MINUTE = 100  # of meta-training, on two cores, with the defaults below
ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.gelu)


class RampedLogLoss(eqx.Module):
    """2 (t + 1) / num_steps times log(loss + 0.01), at most 1 and 1 where it is not finite.

    For losses that are one at the start: halving any of them counts the same, until it is small.
    """

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the weighted logarithm."""
        loss = jnp.where(jnp.isfinite(step.loss), step.loss, math.e)
        ramp = (2 * (step.step + 1)).astype(loss.dtype) / num_steps.astype(loss.dtype)
        return ramp * jnp.minimum(jnp.log(jnp.maximum(loss, 0) + 0.01), 1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The rule that starts at Muon, meta-trained on many kinds of networks and lengths."""

    budget: float = 30.0  # minutes of meta-training, about, on two cores.
    hidden: int = 8  # odd units of the rule.
    shortest: int = 100  # inner steps of the shortest episode.
    longest: int = 2000  # of the longest; lengths are log-uniform between the two.
    truncation: int = 50  # inner steps per outer step; divides the longest.
    sigma: float = 0.02  # perturbation of theta.
    particles: int = 20  # pairs of episodes side by side, shared equally among architectures.
    learning_rate: float = 0.01  # of the outer Adam; falls to zero along a cosine.
    gradient_clip: float = 1.0  # the largest norm of a meta-gradient.
    depths: tuple[int, ...] = (1, 2, 4)  # hidden layers of the perceptrons.
    width: int = 48  # units of each at most; as few as a quarter.
    batch_size: int = 64  # images per inner step.
    unit: float = 3.0  # parameters are in units drawn between one over this and this.
    # besides digits; by default those of mnist and fashion_mnist whose files are found.
    datasets: tuple[str, ...] = dataclasses.field(default_factory=found_here)
    seeds: int = 5  # initialisations per evaluation; 0 for no evaluation.
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        check(self, FIELD, budget=POSITIVE, width=4, unit="[1, inf)", hidden=1)
        check(self, FIELD, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        data = {name: load_images(name, size=8) for name in ("digits", *self.datasets)}
        learned = muon_mlp(self.hidden, axes=MatrixAxes("out_in"))
        families: list[AbstractTaskFamily] = []
        for images in data.values():
            for depth in self.depths:
                widths, least = (self.width,) * depth, max(4, self.width // 4)
                classify = tasks.MLPFamily(images, widths, ACTIVATIONS, least, self.batch_size)
                families.append(_of_one(classify, math.log(10)))
            families.append(
                _of_one(tasks.mlp_autoencoder(images, (32, 8, 32), batch_size=32), 0.15)
            )
        text = load_text("bundled", length=17)
        families.append(_of_one(tasks.char_transformer(text, 16, 1, 2, 4), math.log(256)))
        drawn = tasks.Mixture(
            [tasks.Reparameterization(one, 1 / self.unit, self.unit, "task") for one in families]
        )
        inner = lopt.InnerTraining(drawn, learned, self.longest, RampedLogLoss())
        lengths = LogUniformHorizon(self.shortest, self.longest)
        one = lopt.PES(inner, self.truncation, self.sigma, schedule=lengths)
        meta = lopt.Mean(one, self.particles)
        steps = max(1, round(self.budget * STEPS_PER_MINUTE))
        outer = optax.chain(
            optax.clip_by_global_norm(self.gradient_clip),
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps)),
        )
        name, images = list(data.items())[-1]
        evaluations = [
            lopt.Evaluation(
                f"{name}, {depth} hidden layers, {horizon} steps",
                tasks.mlp_classification(images, (self.width,) * depth, batch_size=self.batch_size),
                horizon,
                self.seeds,
            )
            for depth in (self.depths[0], self.depths[-1] + 2)
            for horizon in (200, 1000)
            if self.seeds
        ]
        return lopt.Experiment(learned, meta, outer, steps, tuple(evaluations), self.seed)


def _of_one(family: AbstractTaskFamily, initial: float) -> AbstractTaskFamily:
    """Returns tasks whose loss is about one at the start."""
    return tasks.LossScale(family, 1 / initial, 1 / initial)
