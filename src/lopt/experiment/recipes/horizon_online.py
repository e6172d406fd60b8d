"""Meta-optimization while training, by looking ahead."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import lopt
from lopt.experiment.settings import FIELD, check
from lopt.experiment.studies.setting import measure, outer_adam, warm_task
from lopt.experiment.studies.settings import MOMENTUM, NETWORKS
from lopt.learned import momentum_sgd


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Meta-optimization while training: look a few steps ahead, update the learning rate, rewind.

    Greedy by design, see `lopt horizon online`. Wu et al. 2018, arXiv:1803.02021, section 4.2.
    """

    dataset: str = "digits"  # digits, mnist, fashion_mnist or cifar10.
    steps: int = 5000  # of training.
    num_meta_steps: int = 10  # steps of meta-optimization between two stretches of training.
    steps_per_update: int = 100  # inner steps of each stretch of training.
    look_ahead: int = 5  # inner steps, and batches that the loss there is averaged over.
    learning_rate: float = 0.1  # of momentum, where it begins.
    meta_learning_rate: float = 0.01  # of the outer Adam, per unit of the logarithms.
    deterministic: bool = False  # whether one batch serves all look-ahead steps of an update.
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        check(self, FIELD, dataset=NETWORKS, steps_per_update=1, steps=self.steps_per_update)
        if self.steps % self.steps_per_update:
            raise ValueError(f"--set steps={self.steps} must be a multiple of steps_per_update.")
        task = warm_task(self.dataset, self.seed)
        effective: Any = (self.learning_rate / (1 - MOMENTUM), "log")
        learned = lopt.learnable(momentum_sgd, effective_rate=effective, momentum=MOMENTUM)
        meta = lopt.LookAhead(
            lopt.InnerTraining(task, learned, self.steps_per_update),
            steps=self.look_ahead,
            batches=self.look_ahead,
            estimates=self.num_meta_steps,
            stride=self.steps_per_update,
            deterministic=self.deterministic,
        )
        # One more update's worth: the last stretch of training is that before it.
        steps = self.num_meta_steps * (self.steps // self.steps_per_update) + 1
        outer, record = outer_adam(self.meta_learning_rate), MeasuredWhenHalted(task)
        return lopt.Experiment(learned, meta, outer, steps, seed=self.seed, record=record)


class MeasuredWhenHalted(eqx.Module):
    """Records hyperparameters, and whenever training has just halted how good the network is."""

    task: lopt.AbstractTask

    def __call__(self, step: lopt.Step) -> dict[str, Float[Array, ""]]:
        """Returns what is logged of an outer step; NaN where training did not go on."""
        state, one_minus = step.estimator_state, jnp.exp(step.params["momentum"])
        rate = jnp.exp(step.params["effective_rate"]) * one_minus

        def measured() -> dict[str, Float[Array, ""]]:
            return measure(self.task, state.episode.train.params)

        nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), jax.eval_shape(measured))
        found = jax.lax.cond(state.estimates == 1, measured, lambda: nothing)
        return {"learning_rate": rate, "momentum": 1 - one_minus, **found}
