"""The rule that starts at Muon, meta-trained on networks of many kinds.

Perceptrons of several depths, with drawn widths and activation, classify 8x8 images: digits, and
MNIST and Fashion-MNIST where their files are found. An autoencoder and a small language model are
trained beside them, in units drawn anew for each task. Every architecture is a program. Episodes
are of log-uniform lengths, and gradients are those of NRES, the best of nine from Muon in as many
seconds: exact ones explode where few examples are learned by heart. `lopt-1` has had both.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

import lopt
from lopt import tasks
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Scalar
from lopt.core.unroll import Step
from lopt.estimators import Clipped, LogUniformHorizon, Part, RampedHorizon, Resume
from lopt.experiment.data.datasets import load_images
from lopt.experiment.data.text import load_text
from lopt.experiment.recipes import falling_adam
from lopt.experiment.recipes.digits import found_here
from lopt.experiment.runs.storage import load
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.learned import MatrixAxes, MuonMLP, muon_mlp

# With outer steps a minute, on two cores with the defaults below (by forward mode of `schedule` and
# `fans` alone), and the norm above which the estimate of a particle counts less.
ESTIMATORS = {
    "exact": (10.0, 10.0),
    "truncated": (40.0, 10.0),
    "forward": (16.0, 10.0),
    "mixed": (8.0, 10.0),
    "nres": (120.0, 200.0),
    "pes": (120.0, 200.0),
}
PARTS = ("matrix", "vector", "sizes", "decay", "fans", "coefficients", "schedule")
ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.gelu)


class RampedLogLoss(eqx.Module):
    """3 ((t + 1) / num_steps)^2 times log(loss + 0.005), at most 1 and 1 where it is not finite.

    For losses that are one at the start: halving any of them counts the same, until it is small,
    and the end of the run counts most. Runs of any length count the same, as the weight is
    multiplied by 500 / num_steps: a long one is seen in as many more windows.

    Attributes:
        held_out: the share of the loss on fresh examples of "valid_inner", after the step.
    """

    held_out: float = eqx.field(static=True, default=0.5)

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the weighted logarithm."""

        def log(loss: Scalar) -> Scalar:
            loss = jnp.where(jnp.isfinite(loss), loss, math.e)
            return jnp.minimum(jnp.log(jnp.maximum(loss, 0) + 0.005), 1)

        fresh = log(lopt.validation_loss(task, step, num_steps))
        value = (1 - self.held_out) * log(step.loss) + self.held_out * fresh
        length = num_steps.astype(value.dtype)
        done = (step.step + 1).astype(value.dtype) / length
        return 1500 / length * done**2 * value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The rule that starts at Muon, meta-trained on many kinds of networks."""

    budget: float = 30.0  # minutes of meta-training of all of theta, about, on two cores.
    hidden: int = 4  # odd units of the rule; without any it is an equation.
    shortest: int = 100  # inner steps of the shortest episode, unless gradients are exact.
    longest: int = 200  # of the longest; lengths are log-uniform between the two.
    growing: bool = False  # whether they grow instead, each drawn at most 20 % off.
    truncation: int = 50  # per outer step, unless gradients are exact; divides the longest.
    # a run, or weights of this rule, to begin with; by default Muon.
    start: Path = Path()
    # of the meta-gradient: nres, pes, truncated, forward; mixed, of truncated evolution strategies
    # and backpropagation by inverse variance; or exact, through runs of the longest length.
    estimator: str = "nres"
    sigma: float = 0.02  # perturbation of theta by nres, pes and mixed.
    # chance that an episode goes on from where another was in trouble, unless exact or mixed.
    from_buffer: float = 0.0
    # episodes side by side, or pairs of them, or four pairs for mixed; shared among architectures.
    particles: int = 20
    learning_rate: float = 0.004  # of the outer Adam; falls to zero along a cosine.
    only: tuple[str, ...] = PARTS  # of theta, which are trained; the others are not perturbed.
    depths: tuple[int, ...] = (1, 2, 4)  # hidden layers of the perceptrons.
    width: int = 32  # units of each at most, with one layer twice as many; as few as half.
    batch_size: int = 64  # images per inner step at most; as few as an eighth.
    examples: int = 1000  # the fewest for training a classification; log-uniform from this to all.
    held_out: float = 0.5  # share of the objective that is of held-out examples.
    weight_decay: float = 0.06  # of the rule, for matrices, per step and unit of the rate.
    unit: float = 1.5  # parameters are in units drawn between one over this and this.
    # besides digits; by default those of mnist and fashion_mnist whose files are found.
    datasets: tuple[str, ...] = dataclasses.field(default_factory=found_here)
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        positive = dict.fromkeys(("budget", "learning_rate"), POSITIVE)
        check(self, FIELD, **positive, width=4, unit="[1, inf)", weight_decay="[0, inf)")
        check(self, FIELD, estimator=(*ESTIMATORS,), only=PARTS, hidden=0, examples=1)
        check(self, FIELD, from_buffer="[0, 1)")
        if self.from_buffer and self.estimator in ("exact", "mixed"):
            said = f"--set from_buffer={self.from_buffer} is not for {self.estimator}"
            raise ValueError(f"{said}; try estimator=nres.")
        data = {name: load_images(name, size=8) for name in ("digits", *self.datasets)}
        learned = muon_mlp(self.hidden, axes=MatrixAxes("out_in"), weight_decay=self.weight_decay)
        families: list[AbstractTaskFamily] = []
        for images in data.values():
            for depth in self.depths:
                widths = (self.width if depth > 1 else 2 * self.width,) * depth
                classify: AbstractTaskFamily = tasks.MLPFamily(
                    images, widths, ACTIVATIONS, widths[0] // 2, self.batch_size
                )
                count = int(images.train.count)
                classify = tasks.DataSubset(classify, count, min(self.examples, count))
                classify = tasks.ReducedBatch(classify, max(1, self.batch_size // 8))
                families.append(_of_one(tasks.InitialScale(classify, 0.7, 1.4), math.log(10)))
            encode = tasks.mlp_autoencoder(images, (32, 8, 32), batch_size=32)
            families.append(_of_one(encode, 0.15))
        text = load_text("bundled", length=17)
        families.append(_of_one(tasks.char_transformer(text, 16, 1, 2, 4), math.log(256)))
        drawn = tasks.Mixture(
            [tasks.Reparameterization(one, 1 / self.unit, self.unit, "task") for one in families]
        )
        inner = lopt.InnerTraining(drawn, learned, self.longest, RampedLogLoss(self.held_out))
        pace, outlying = ESTIMATORS[self.estimator]
        steps = max(1, round(self.budget * pace))
        meta = lopt.Mean(Clipped(self.one(inner, steps), outlying), self.particles)
        outer = falling_adam(self.learning_rate, steps, 1.0)
        initial = None
        if self.start != Path():
            found, initial = load(self.start)
            if not isinstance(found, MuonMLP) or found.hidden != self.hidden:
                raise ValueError(f"--set start={self.start} is no rule of {self.hidden} odd units.")
        # Few steps for each checkpoint, as one takes seconds.
        about: dict[str, Any] = {"seed": self.seed, "initial": initial, "steps_per_chunk": 4}
        return lopt.Experiment(learned, meta, outer, steps, **about)

    def one(self, inner: lopt.InnerTraining, steps: int) -> lopt.AbstractGradientEstimator:
        """Returns the estimator of a particle."""
        one: lopt.AbstractGradientEstimator = lopt.MetaTask(inner)
        if self.estimator != "exact":
            ends = self.shortest, self.longest
            lengths = RampedHorizon(*ends, steps) if self.growing else LogUniformHorizon(*ends)
            windows: dict[str, Any] = {"truncation": self.truncation, "schedule": lengths}
            noise = windows | {"sigma": self.sigma}
            through = lopt.TruncatedBackprop(inner, **windows)
            kinds: dict[str, Callable[[], lopt.AbstractGradientEstimator]] = {
                "truncated": lambda: through,
                "forward": lambda: lopt.OnlineForwardMode(inner, **windows),
                "nres": lambda: lopt.NRES(inner, **noise),
                "pes": lambda: lopt.PES(inner, **noise),
                "mixed": lambda: lopt.InverseVariance(
                    lopt.TruncatedES(inner, **noise), lopt.Reparameterized(through, self.sigma), 4
                ),
            }
            one = kinds[self.estimator]()
        one = Resume(one, self.from_buffer) if self.from_buffer else one
        if len(self.only) == len(PARTS):
            return one
        return Part(one, lambda theta: [theta[part] for part in self.only])


def _of_one(family: AbstractTaskFamily, initial: float) -> AbstractTaskFamily:
    """Returns tasks whose loss is about one at the start."""
    return tasks.LossScale(family, 1 / initial, 1 / initial)
