"""The training on which short horizons are studied: a network, two hyperparameters, a warm start.

As in Wu et al. 2018, arXiv:1803.02021, section 4: momentum with the rate lr (1 + t / K)^-power,
begun from weights that have been trained for a few steps.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import lopt
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, State, Theta
from lopt.experiment.data.named_tasks import named_task
from lopt.experiment.studies.settings import MOMENTUM, NETWORKS
from lopt.experiment.trainings import trainings
from lopt.learned import inverse_time_momentum
from lopt.tasks import warm_start

WARM_STEPS = 50


def warm_task(dataset: str, seed: int = 0) -> AbstractTask:
    """Returns the task of a data set, one of `NETWORKS`, begun from the warm start of a seed."""
    network, size, batch_size, rate = NETWORKS[dataset]
    keys = jax.random.key(seed)[None]
    task = named_task(f"{dataset}_{network}", size, batch_size).draw(keys[0])
    state, _ = trainings(task, optax.sgd(rate, momentum=MOMENTUM), keys, WARM_STEPS)
    return warm_start(task, jax.tree.map(lambda leaf: leaf[0], state.params))


def decayed_training(
    task: AbstractTask,
    horizon: int,
    time_constant: float,
    learning_rate: float = 0.01,
    power: float = 1.0,
    batches: int = 10,
) -> lopt.InnerTraining:
    """Returns training judged by its final loss, the mean over some batches.

    Theta is the learning rate, of plain momentum, and the power; K is the time constant.
    """
    constants, learn = (learning_rate, MOMENTUM, power, time_constant), ("learning_rate", "power")
    learned = inverse_time_momentum(*constants, learn=learn, effective=False)
    return lopt.InnerTraining(task, learned, horizon, lopt.FinalLoss(batches))


def theta_at(log_rate: Array, log_power: Array) -> Theta:
    """Returns the theta of `decayed_training`."""
    return {"learning_rate": {"initial": log_rate, "power": log_power}}


def outer_adam(learning_rate: float, clip: float = 10.0) -> optax.GradientTransformation:
    """Returns Adam on clipped derivatives by logarithms, which keeps them in the paper's ranges.

    Rates stay between 1e-4 and 10, powers 1e-4 and 1e3, one minus momentum 1e-4 and 1.
    """

    def update(updates: Theta, state: State, params: Theta | None = None) -> tuple[Theta, State]:
        def cut(path: Any, change: Array, leaf: Array) -> Array:
            highest = {"power": 1e3, "momentum": 1.0}.get(path[-1].key, 10.0)
            return jnp.clip(leaf + change, math.log(1e-4), math.log(highest)) - leaf

        return jax.tree_util.tree_map_with_path(cut, updates, params), state

    ranges = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.clip(clip), optax.adam(learning_rate), ranges)


def measure(
    task: AbstractTask, params: Params, state: State = (), key: Key | None = None
) -> dict[str, Float[Array, ""]]:
    """Returns metrics on all training and all test images, such as "train_loss"."""
    return {
        f"{split}_{name}": value
        for split in ("train", "test")
        for name, value in task.metrics(params, state, task.everything(split)).items()
    }
