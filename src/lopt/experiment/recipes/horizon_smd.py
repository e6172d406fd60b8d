"""Stochastic meta-descent on two hyperparameters: the gradient of the loss after a short run.

Each outer step begins again from the same weights, with fresh minibatches. Wu et al. 2018,
arXiv:1803.02021, section 4.1.
"""

import dataclasses

import optax

import lopt
from lopt.experiment.studies.setting import setting, values_of, within_ranges


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stochastic meta-descent on two hyperparameters: the gradient of the loss after a short run.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        horizon: inner steps.
        time_constant: of the decay of the learning rate, inner steps.
        learning_rate: where meta-descent begins.
        power: of the decay, where meta-descent begins.
        outer_steps: steps of meta-descent.
        meta_learning_rate: of the outer Adam, per unit of log learning rate and log power.
        gradient_clip: the largest derivative by either logarithm.
        particles: runs per outer step, on minibatches of their own.
        batches: over how many of them the final loss is averaged.
        seed: of everything random.
    """

    dataset: str = "digits"
    horizon: int = 100
    time_constant: float = 250.0
    learning_rate: float = 0.01
    power: float = 1.0
    outer_steps: int = 200
    meta_learning_rate: float = 0.05
    gradient_clip: float = 10.0
    particles: int = 1
    batches: int = 10
    seed: int = 0

    def build(self) -> lopt.Experiment:
        """Builds the experiment."""
        chosen = setting(
            self.dataset, self.time_constant, self.learning_rate, self.power, self.seed
        )
        outer = optax.chain(
            optax.clip(self.gradient_clip), optax.adam(self.meta_learning_rate), within_ranges()
        )
        meta = lopt.Mean(lopt.ForwardMode(chosen.inner(self.horizon, self.batches)), self.particles)
        return lopt.Experiment(
            chosen.learned,
            meta,
            outer,
            self.outer_steps,
            seed=self.seed,
            record=lambda step: values_of(step.params),
        )
