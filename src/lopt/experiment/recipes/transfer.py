"""A trained optimizer trained on, on another task: transfer, and tuning of distilled rules.

`lopt train --from RUN --task NAME` and `lopt tune RULE --task NAME` are this recipe.

Memory, for `--task cifar10_resnet50`: PES takes two gradients for each particle side by side, at
about 7 GB each, which is 56 GB for four and 14 GB with `--set particles=1`. For truncated
backpropagation see `lopt.tasks.resnet_classification`. Both are estimates.
"""

import dataclasses
from pathlib import Path

import lopt
from lopt.experiment.data.named_tasks import named_task
from lopt.experiment.recipes import ESTIMATORS, falling_adam
from lopt.experiment.runs.storage import load
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.learned import PerTensorType

LARGE = ("resnet18", "resnet50")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A trained optimizer trained on, on another task: transfer, and tuning of distilled rules."""

    # what to begin with: a run's folder, a distilled rule's, or a file of `lopt.save`.
    start: Path = Path()
    # the name of a task, such as digits_conv or mlp_family_seed7: see lopt tasks.
    task: str = "digits_conv"
    size: int = 0  # pixels along each side; 0 for 32 of CIFAR-10 and 8 of others.
    batch_size: int = 128  # examples per inner step.
    # whether vectors, matrices and kernels get a learned multiplier each.
    tensor_types: bool = False
    horizon: int = 200  # inner steps per episode, and per evaluation.
    truncation: int = 20  # inner steps per outer step; divides the horizon. ES does without.
    estimator: str = "pes"  # of the meta-gradient: pes, es, truncated_backprop or forward.
    sigma: float = 0.01  # perturbation of theta, for PES and ES.
    particles: int = 4  # episodes side by side, or pairs of them.
    outer_steps: int = 200  # steps of meta-training.
    learning_rate: float = 1e-3  # of the outer Adam; falls to zero along a cosine.
    gradient_clip: float = 1.0  # the largest norm of a meta-gradient.
    # initialisations per evaluation, at least 5; 0 for no evaluation. By default 5, but none for
    # resnet18 and resnet50, as an evaluation trains them all side by side.
    seeds: int = -1
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        if self.start == Path():
            raise ValueError("start='' must name a run, a distilled rule or a file of lopt.save.")
        check(self, FIELD, outer_steps=1, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        check(self, FIELD, estimator=ESTIMATORS)
        seeds = (0 if self.task.endswith(LARGE) else 5) if self.seeds < 0 else self.seeds
        learned, theta = load(self.start)
        if self.tensor_types:
            learned = PerTensorType(learned)
            theta = learned.wrap(theta)
        task = named_task(self.task, self.size, self.batch_size)
        inner = lopt.InnerTraining(task, learned, self.horizon)
        one = ESTIMATORS[self.estimator](inner, self.truncation, self.sigma)
        meta = lopt.Mean(one, self.particles)
        outer = falling_adam(self.learning_rate, self.outer_steps, self.gradient_clip)
        title = f"{self.task}, new initialisations"
        evaluations = (lopt.Evaluation(title, task, self.horizon, seeds, True),) if seeds else ()
        return lopt.Experiment(
            *(learned, meta, outer, self.outer_steps, evaluations, self.seed),
            steps_per_chunk=min(20, self.outer_steps),
            initial=theta,
        )
