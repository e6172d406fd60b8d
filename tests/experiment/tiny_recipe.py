"""A recipe that takes a second: one learned rate, by PES."""

import jax.numpy as jnp
import optax

import lopt


def experiment(
    outer_steps: int = 60,
    learning_rate: float = 0.05,
    truncation: int = 2,
    poison: bool = False,
    note: str = "tiny",
) -> lopt.Experiment:
    task = lopt.tasks.Quadratic(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]), noise_scale=0.1)
    learned = lopt.LearnableSGD(1e25 if poison else 0.02)
    meta = lopt.Mean(lopt.PES(lopt.InnerTraining(task, learned, 8), truncation, 0.05), 4)
    outer = optax.adam(learning_rate)
    return lopt.Experiment(learned, meta, outer, outer_steps, steps_per_chunk=2, note=note)
