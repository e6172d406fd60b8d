"""The main job: a small rule, meta-trained on perceptrons over 8x8 digits.

Where their files are found, MNIST and Fashion-MNIST at 8x8 are trained on as well.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import lopt
from lopt.core.task import AbstractTask
from lopt.experiment.data.datasets import available, load_images
from lopt.experiment.recipes import named_estimator
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.tasks import Data, Examples, Mixture, mlp_classification


def found_here() -> tuple[str, ...]:
    """Returns the data sets besides digits that need no download."""
    return tuple(name for name in ("mnist", "fashion_mnist") if available(name))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The main job: a small rule, meta-trained on perceptrons over 8x8 digits.

    Attributes:
        horizon: inner steps per episode, and per evaluation.
        truncation: inner steps per outer step; divides the horizon. ES does without.
        estimator: of the meta-gradient: pes, es, truncated_backprop or forward.
        sigma: perturbation of theta, for PES and ES.
        particles: episodes side by side, or pairs of them.
        outer_steps: steps of meta-training.
        learning_rate: of the outer AdamW; falls to zero along a cosine.
        weight_decay: of the outer AdamW.
        gradient_clip: the largest norm of a meta-gradient.
        hidden: units of the hidden layer of the networks that are trained.
        batch_size: examples per inner step.
        datasets: trained on besides digits; by default those of mnist and fashion_mnist whose
            files are found.
        seeds: initialisations per evaluation.
        seed: of everything random.
    """

    horizon: int = 200
    truncation: int = 50
    estimator: str = "pes"
    sigma: float = 0.01
    particles: int = 16
    outer_steps: int = 800
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    hidden: int = 32
    batch_size: int = 128
    datasets: tuple[str, ...] = dataclasses.field(default_factory=found_here)
    seeds: int = 5
    seed: int = 0

    def build(self) -> lopt.Experiment:
        """Builds the experiment."""
        check(self, FIELD, horizon=1, outer_steps=1, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        data = {name: load_images(name, size=8) for name in ("digits", *self.datasets)}
        first = data["digits"]

        def task(images: Data, *widths: int) -> AbstractTask:
            return mlp_classification(images, widths or (self.hidden,), batch_size=self.batch_size)

        tasks = {name: task(images) for name, images in data.items()}
        learned = lopt.adafactor_mlp(step_multiplier=0.01)
        inner = lopt.InnerTraining(
            Mixture(tuple(tasks.values())), learned, self.horizon, lopt.RampedLoss()
        )
        one = named_estimator(self.estimator, inner, self.truncation, self.sigma)
        meta = lopt.Mean(one, self.particles)
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.outer_steps)
        outer = optax.chain(
            optax.clip_by_global_norm(self.gradient_clip),
            optax.adamw(schedule, weight_decay=self.weight_decay),
        )
        unseen = {
            "held-out images": (task(held_out(first)), self.horizon),
            "wider and deeper": (task(first, 4 * self.hidden, 4 * self.hidden), self.horizon),
            "5 times as long": (tasks["digits"], 5 * self.horizon),
        }
        evaluations = [
            lopt.Evaluation(f"{name}, new initialisations", one, self.horizon, self.seeds, True)
            for name, one in tasks.items()
        ] + [lopt.Evaluation(f"digits, {name}", *one, self.seeds) for name, one in unseen.items()]
        return lopt.Experiment(
            learned, meta, outer, self.outer_steps, tuple(evaluations), self.seed
        )


def held_out(data: Data) -> Data:
    """Returns data whose training images no meta-training has seen; tested on valid_inner."""
    splits = data.valid_outer.arrays, data.test.arrays
    train = Examples(jax.tree.map(lambda *parts: jnp.concatenate(parts), *splits))
    return eqx.tree_at(lambda d: (d.train, d.test), data, (train, data.valid_inner))
