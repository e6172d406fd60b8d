"""A trained optimizer trained on, on another task: transfer, and tuning of distilled rules.

`lopt train --from RUN --task NAME` and `lopt tune RULE --task NAME` are this recipe.

Memory, for `--task cifar10_resnet50`: PES takes two gradients for each particle side by side, at
about 7 GB each, which is 56 GB for four and 14 GB with `--set particles=1`. For truncated
backpropagation see `lopt.tasks.resnet_classification`. Both are estimates.
"""

import dataclasses
from pathlib import Path

import optax

import lopt
from lopt.experiment.data.named_tasks import named_task
from lopt.experiment.recipes import named_estimator
from lopt.experiment.runs.storage import load
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.learned import PerTensorType

LARGE = ("resnet18", "resnet50")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A trained optimizer trained on, on another task: transfer, and tuning of distilled rules.

    Attributes:
        start: what to begin with: a run's folder, a distilled rule's, or a file of `lopt.save`.
        task: data set and network, such as digits_conv, fashion_mnist_mlp or cifar10_resnet50.
        size: pixels along each side; 0 for 32 of CIFAR-10 and 8 of others.
        batch_size: examples per inner step.
        tensor_types: whether vectors, matrices and kernels get a learned multiplier each.
        horizon: inner steps per episode, and per evaluation.
        truncation: inner steps per outer step; divides the horizon. ES does without.
        estimator: of the meta-gradient: pes, es, truncated_backprop or forward.
        sigma: perturbation of theta, for PES and ES.
        particles: episodes side by side, or pairs of them.
        outer_steps: steps of meta-training.
        learning_rate: of the outer Adam; falls to zero along a cosine.
        gradient_clip: the largest norm of a meta-gradient.
        seeds: initialisations per evaluation, at least 5; 0 for no evaluation. By default 5, but
            none for resnet18 and resnet50, as an evaluation trains them all side by side.
        seed: of everything random.
    """

    start: Path = Path()
    task: str = "digits_conv"
    size: int = 0
    batch_size: int = 128
    tensor_types: bool = False
    horizon: int = 200
    truncation: int = 20
    estimator: str = "pes"
    sigma: float = 0.01
    particles: int = 4
    outer_steps: int = 200
    learning_rate: float = 1e-3
    gradient_clip: float = 1.0
    seeds: int = -1
    seed: int = 0

    def build(self) -> lopt.Experiment:
        """Builds the experiment."""
        if self.start == Path():
            raise ValueError("start='' must name a run, a distilled rule or a file of lopt.save.")
        check(self, FIELD, outer_steps=1, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        seeds = self.seeds if self.seeds >= 0 else 0 if self.task.endswith(LARGE) else 5
        learned, theta = load(self.start)
        if self.tensor_types:
            learned = PerTensorType(learned)
            theta = learned.wrap(theta)
        task = named_task(self.task, self.size, self.batch_size)
        inner = lopt.InnerTraining(task, learned, self.horizon)
        one = named_estimator(self.estimator, inner, self.truncation, self.sigma)
        meta = lopt.Mean(one, self.particles)
        outer = optax.chain(
            optax.clip_by_global_norm(self.gradient_clip),
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.outer_steps)),
        )
        title = f"{self.task}, new initialisations"
        return lopt.Experiment(
            learned,
            meta,
            outer,
            self.outer_steps,
            (lopt.Evaluation(title, task, self.horizon, seeds, True),) if seeds else (),
            self.seed,
            steps_per_chunk=min(20, self.outer_steps),
            initial=theta,
        )
