"""Stochastic meta-descent on learning rate and decay."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

import lopt
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.experiment.studies.setting import decayed_training, outer_adam, warm_task
from lopt.experiment.studies.settings import NETWORKS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stochastic meta-descent on two hyperparameters: the gradient of the loss after a short run.

    Each outer step begins again from the same weights, with fresh minibatches. Wu et al. 2018,
    arXiv:1803.02021, section 4.1.
    """

    dataset: str = "digits"  # digits, mnist, fashion_mnist or cifar10.
    horizon: int = 100  # inner steps.
    time_constant: float = 250.0  # of the decay of the learning rate, inner steps.
    learning_rate: float = 0.01  # where meta-descent begins.
    power: float = 1.0  # of the decay, where meta-descent begins.
    outer_steps: int = 200  # steps of meta-descent.
    # of the outer Adam, per unit of log learning rate and log power.
    meta_learning_rate: float = 0.05
    gradient_clip: float = 10.0  # the largest derivative by either logarithm.
    particles: int = 1  # runs per outer step, on minibatches of their own.
    batches: int = 10  # over how many of them the final loss is averaged.
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        check(self, FIELD, dataset=NETWORKS, horizon=1, time_constant=POSITIVE)
        check(self, FIELD, learning_rate=POSITIVE, power=POSITIVE)
        begin = (self.time_constant, self.learning_rate, self.power, self.batches)
        inner = decayed_training(warm_task(self.dataset, self.seed), self.horizon, *begin)
        meta = lopt.Mean(lopt.ForwardMode(inner), self.particles)
        outer = outer_adam(self.meta_learning_rate, self.gradient_clip)
        steps, seed = self.outer_steps, self.seed
        return lopt.Experiment(inner.learned, meta, outer, steps, seed=seed, record=hyperparameters)


def hyperparameters(step: lopt.Step) -> dict[str, Float[Array, ""]]:
    """Returns what is logged of an outer step."""
    theta = step.params["learning_rate"]
    return {"learning_rate": jnp.exp(theta["initial"]), "power": jnp.exp(theta["power"])}
