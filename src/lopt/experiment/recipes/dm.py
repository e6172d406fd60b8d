"""The two first experiments of "Learning to learn by gradient descent by gradient descent".

Random quadratic functions of 10 parameters, and perceptrons with 20 sigmoid units on images; runs
of 100 steps, truncated backpropagation over 20, gradients as constants (Andrychowicz et al. 2016,
arXiv:1606.04474). Images are 8x8; those published had 28x28. Compare what comes out with
`lopt evaluate RUN --baselines SGD --baselines momentum --baselines RMSProp --baselines Adam`.
"""

import dataclasses

import jax

import lopt
from lopt.experiment.data.datasets import load_images, mnist_or_digits
from lopt.experiment.recipes import falling_adam
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.tasks import LeastSquaresFamily, mlp_classification


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The LSTM optimizer of Andrychowicz et al., on quadratic functions or on perceptrons."""

    task: str = "quadratic"  # quadratic, or mlp.
    # of mlp: digits, mnist or fashion_mnist; MNIST where it is found, else digits, by default.
    dataset: str = dataclasses.field(default_factory=mnist_or_digits)
    horizon: int = 100  # inner steps per episode, and per evaluation.
    truncation: int = 20  # inner steps per outer step; divides the horizon.
    particles: int = 16  # episodes side by side.
    multiplier: float = 0.1  # of the network's output; the published one was tuned.
    outer_steps: int = 4000  # steps of meta-training.
    learning_rate: float = 0.01  # of the outer Adam; falls to zero along a cosine.
    gradient_clip: float = 1.0  # the largest norm of a meta-gradient.
    seeds: int = 20  # tasks of each evaluation.
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        check(self, FIELD, task=("quadratic", "mlp"), outer_steps=1, seeds=5)
        check(self, FIELD, learning_rate=POSITIVE, multiplier=POSITIVE, gradient_clip=POSITIVE)
        tasks: lopt.AbstractTaskFamily = LeastSquaresFamily(10)
        if self.task == "mlp":
            data = load_images(self.dataset, size=8)
            tasks = mlp_classification(data, (20,), jax.nn.sigmoid, batch_size=128)
        learned = lopt.dm(k=10.0, multiplier=self.multiplier)
        inner = lopt.InnerTraining(tasks, learned, self.horizon)
        meta = lopt.Mean(lopt.TruncatedBackprop(inner, self.truncation), self.particles)
        outer = falling_adam(self.learning_rate, self.outer_steps, self.gradient_clip)
        evaluations = (
            lopt.Evaluation(self.task, tasks, self.horizon, self.seeds, True),
            lopt.Evaluation(f"{self.task}, twice as long", tasks, 2 * self.horizon, self.seeds),
        )
        return lopt.Experiment(learned, meta, outer, self.outer_steps, evaluations, self.seed)
