"""Meta-optimization while training: look a few steps ahead, update the learning rate, rewind.

Greedy by design, see `lopt horizon online`. Wu et al. 2018, arXiv:1803.02021, section 4.2.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import lopt
from lopt.core.task import AbstractTask
from lopt.core.unroll import Step
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.studies.setting import (
    constant_momentum,
    measure,
    setting,
    values_of,
    within_ranges,
)


def experiment(
    dataset: str = "digits",
    steps: int = 5000,
    num_meta_steps: int = 10,
    steps_per_update: int = 100,
    look_ahead: int = 5,
    learning_rate: float = 0.1,
    meta_learning_rate: float = 0.01,
    deterministic: bool = False,
    seed: int = 0,
) -> Experiment:
    """Builds the experiment.

    Args:
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
    if steps % steps_per_update or steps < steps_per_update:
        raise ValueError(
            f"steps_per_update={steps_per_update} must divide steps={steps}; "
            f"try steps={max(1, steps // steps_per_update) * steps_per_update}."
        )
    chosen = setting(dataset, 1.0, seed=seed)
    learned = constant_momentum(learning_rate)
    meta = lopt.LookAhead(
        lopt.InnerTraining(chosen.task, learned, steps_per_update),
        steps=look_ahead,
        batches=look_ahead,
        estimates=num_meta_steps,
        stride=steps_per_update,
        deterministic=deterministic,
    )
    outer = optax.chain(optax.clip(10.0), optax.adam(meta_learning_rate), within_ranges())

    # One more update's worth: the last stretch of training is that before it.
    outer_steps = num_meta_steps * (steps // steps_per_update) + 1
    return Experiment(
        learned, meta, outer, outer_steps, seed=seed, record=Halts(chosen.classification)
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
