"""A small rule, meta-trained on perceptrons over 8x8 digits.

Where their files are found, MNIST and Fashion-MNIST at 8x8 are trained on as well.
"""

import dataclasses

import lopt
from lopt.experiment.data.datasets import available, load_images
from lopt.experiment.evaluation.suites import quick
from lopt.experiment.recipes import DESIGNS, ESTIMATORS, falling_adam
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.tasks import Mixture, mlp_classification


def found_here() -> tuple[str, ...]:
    """Returns the data sets besides digits that need no download."""
    return tuple(name for name in ("mnist", "fashion_mnist") if available(name))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A small rule, meta-trained on perceptrons over 8x8 digits."""

    optimizer: str = "adafactor_mlp"  # the design; any of lopt.experiment.recipes.DESIGNS.
    horizon: int = 200  # inner steps per episode, and per evaluation.
    truncation: int = 50  # inner steps per outer step; divides the horizon. ES does without.
    estimator: str = "pes"  # of the meta-gradient: pes, es, truncated_backprop or forward.
    sigma: float = 0.01  # perturbation of theta, for PES and ES.
    particles: int = 16  # episodes side by side, or pairs of them.
    outer_steps: int = 800  # steps of meta-training.
    learning_rate: float = 3e-3  # of the outer AdamW; falls to zero along a cosine.
    weight_decay: float = 0.0  # of the outer AdamW.
    gradient_clip: float = 1.0  # the largest norm of a meta-gradient.
    hidden: int = 32  # units of the hidden layer of the networks that are trained.
    batch_size: int = 128  # examples per inner step.
    # trained on besides digits; by default those of mnist and fashion_mnist whose files are found.
    datasets: tuple[str, ...] = dataclasses.field(default_factory=found_here)
    seeds: int = 5  # initialisations per evaluation.
    seed: int = 0  # of everything random.

    def one(self, inner: lopt.InnerTraining) -> lopt.AbstractGradientEstimator:
        """Returns the estimator of one particle."""
        return ESTIMATORS[self.estimator](inner, self.truncation, self.sigma)

    def build(self) -> lopt.Experiment:
        check(self, FIELD, horizon=1, outer_steps=1, seeds=5, weight_decay="[0, inf)")
        check(self, FIELD, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        check(self, FIELD, optimizer=DESIGNS, estimator=ESTIMATORS)
        data = {name: load_images(name, size=8) for name in ("digits", *self.datasets)}
        tasks = {
            name: mlp_classification(images, (self.hidden,), batch_size=self.batch_size)
            for name, images in data.items()
        }
        learned = DESIGNS[self.optimizer]()
        inner = lopt.InnerTraining(
            Mixture(tuple(tasks.values())), learned, self.horizon, lopt.RampedLoss()
        )
        meta = lopt.Mean(self.one(inner), self.particles)
        rate, steps = self.learning_rate, self.outer_steps
        outer = falling_adam(rate, steps, self.gradient_clip, self.weight_decay)
        sizes = self.horizon, self.hidden, self.batch_size, self.seeds
        evaluations = tuple(quick(data["digits"], *sizes)) + tuple(
            lopt.Evaluation(
                *(f"{name}, new initialisations", one, self.horizon, self.seeds),
                trained_on=True,
                group="trained on",
            )
            for name, one in tasks.items()
            if name != "digits"
        )
        return lopt.Experiment(learned, meta, outer, self.outer_steps, evaluations, self.seed)
