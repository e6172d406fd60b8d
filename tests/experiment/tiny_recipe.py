"""A recipe that takes a second: one learned rate, by PES, of an optimizer of the recipe's own."""

import dataclasses

import jax.numpy as jnp
import optax

import lopt


def factory(learning_rate):
    """A function that lopt cannot find by name, so that the weights are saved without it."""
    return optax.sgd(learning_rate)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe that takes a second: one learned rate, by PES."""

    outer_steps: int = 60
    learning_rate: float = 0.05
    truncation: int = 2
    particles: int = 4
    poison: bool = False
    own: bool = False
    evaluate: bool = False

    def build(self) -> lopt.Experiment:
        """Builds the experiment."""
        task = lopt.tasks.Quadratic(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]), noise_scale=0.1)
        learned = lopt.learnable(
            factory if self.own else optax.sgd, learning_rate=1e25 if self.poison else 0.02
        )
        meta = lopt.Mean(
            lopt.PES(lopt.InnerTraining(task, learned, 8), self.truncation, 0.05), self.particles
        )
        evaluations = []
        if self.evaluate:
            digits = lopt.tasks.mlp_classification(lopt.load_images("digits"), (4,), batch_size=16)
            evaluations = [lopt.Evaluation("digits", digits, horizon=10)]
        return lopt.Experiment(
            learned,
            meta,
            optax.adam(self.learning_rate),
            self.outer_steps,
            tuple(evaluations),
            steps_per_chunk=2,
        )
