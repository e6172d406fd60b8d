"""Meta-optimization while training: look a few steps ahead, update the learning rate, rewind.

Greedy by design, see `lopt horizon online`. Wu et al. 2018, arXiv:1803.02021, section 4.2.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import lopt
from lopt.core.task import AbstractTask
from lopt.core.unroll import Step
from lopt.experiment.studies.setting import (
    constant_momentum,
    measure,
    setting,
    values_of,
    within_ranges,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Meta-optimization while training: look a few steps ahead, update the learning rate, rewind.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        steps: of training.
        num_meta_steps: steps of meta-optimization between two stretches of training.
        steps_per_update: inner steps of each stretch of training.
        look_ahead: inner steps, and batches that the loss there is averaged over.
        learning_rate: of momentum, where it begins.
        meta_learning_rate: of the outer Adam, per unit of the logarithms.
        deterministic: whether one batch serves all look-ahead steps of an update.
        seed: of everything random.
    """

    dataset: str = "digits"
    steps: int = 5000
    num_meta_steps: int = 10
    steps_per_update: int = 100
    look_ahead: int = 5
    learning_rate: float = 0.1
    meta_learning_rate: float = 0.01
    deterministic: bool = False
    seed: int = 0

    def build(self) -> lopt.Experiment:
        """Builds the experiment."""
        if self.steps % self.steps_per_update or self.steps < self.steps_per_update:
            raise ValueError(
                f"steps_per_update={self.steps_per_update} must divide steps={self.steps}; "
                f"try steps={max(1, self.steps // self.steps_per_update) * self.steps_per_update}."
            )
        chosen = setting(self.dataset, 1.0, seed=self.seed)
        learned = constant_momentum(self.learning_rate)
        meta = lopt.LookAhead(
            lopt.InnerTraining(chosen.task, learned, self.steps_per_update),
            steps=self.look_ahead,
            batches=self.look_ahead,
            estimates=self.num_meta_steps,
            stride=self.steps_per_update,
            deterministic=self.deterministic,
        )
        outer = optax.chain(optax.clip(10.0), optax.adam(self.meta_learning_rate), within_ranges())

        # One more update's worth: the last stretch of training is that before it.
        outer_steps = self.num_meta_steps * (self.steps // self.steps_per_update) + 1
        return lopt.Experiment(
            learned, meta, outer, outer_steps, seed=self.seed, record=Halts(chosen.classification)
        )


class Halts(eqx.Module):
    """Records hyperparameters, and how good the network is whenever its training halts."""

    task: AbstractTask

    def __call__(self, step: Step) -> dict[str, Float[Array, ""]]:
        """Returns what is logged of an outer step; not a number where training did not go on."""
        state = step.estimator_state

        def measured() -> dict[str, Float[Array, ""]]:
            return measure(self.task, state.episode.train.params)

        def nothing() -> dict[str, Float[Array, ""]]:
            return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)

        shapes = jax.eval_shape(measured)
        return {**values_of(step.params), **jax.lax.cond(state.estimates == 1, measured, nothing)}
