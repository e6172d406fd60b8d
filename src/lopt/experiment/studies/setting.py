"""The networks on which short horizons are studied, and how their training is parametrised.

As in Wu et al. 2018, arXiv:1803.02021, section 4: momentum with the rate lr (1 + t / K)^-power,
begun from weights that have been trained for a few steps.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import lopt
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, State, Theta
from lopt.experiment.data.datasets import load_images
from lopt.experiment.horizon_settings import MOMENTUM
from lopt.learned import Learnable, inverse_time_momentum, momentum_sgd
from lopt.learned.forms import Form
from lopt.tasks import conv_classification, mlp_classification, warm_start

WARM_STEPS = 50

# The ranges of learning rate and power that surfaces cover.
LEARNING_RATES = (1e-3, 0.5)
POWERS = (0.01, 200.0)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and the data set it is trained on.

    Attributes:
        size: pixels on each side.
        warm_rate: learning rate of the warm start.
    """

    size: int
    warm_rate: float

    def task(self, dataset: str) -> AbstractTask:
        """Returns the task on a data set."""
        data = load_images(dataset, self.size)
        if dataset == "cifar10":
            return conv_classification(data, stddev=0.1, batch_size=100)
        if dataset == "digits":
            return mlp_classification(data, (32,), batch_size=128)
        return mlp_classification(data, (100, 100), batch_size=100, stddev=0.05)


NETWORKS = {
    "digits": Network(8, 0.1),
    "mnist": Network(28, 0.1),
    "fashion_mnist": Network(28, 0.1),
    "cifar10": Network(32, 5e-3),
}


class Setting(eqx.Module):
    """Training with two hyperparameters, from a warm start.

    Attributes:
        classification: the network's task.
        task: the same, begun from the warm start.
        learned: momentum with inverse-time decay; theta is that of (learning rate, power).
    """

    classification: AbstractTask
    task: AbstractTask
    learned: Learnable

    def inner(self, horizon: int, batches: int = 10) -> lopt.InnerTraining:
        """Returns training for a horizon, judged by its final loss."""
        return lopt.InnerTraining(self.task, self.learned, horizon, lopt.FinalLoss(batches))


def setting(
    dataset: str,
    time_constant: float,
    learning_rate: float = 0.01,
    power: float = 1.0,
    seed: int = 0,
) -> Setting:
    """Loads a data set and trains its network for its first few steps.

    Args:
        dataset: "digits", "mnist", "fashion_mnist" or "cifar10".
        time_constant: K, in inner steps.
        learning_rate: where theta begins; the rate of plain momentum, not its effective one.
        power: where theta begins.
        seed: of the warm start.

    Raises:
        ValueError: if there is no such data set.
    """
    if dataset not in NETWORKS:
        raise ValueError(f"--dataset {dataset} must be one of {', '.join(NETWORKS)}.")
    network = NETWORKS[dataset]
    task = network.task(dataset)
    params = warm_params(task, network.warm_rate, jax.random.key(seed))
    return Setting(
        task, warm_start(task, params), momentum_with_decay(learning_rate, power, time_constant)
    )


def momentum_with_decay(learning_rate: float, power: float, time_constant: float) -> Learnable:
    """Returns the optimizer whose learning rate and power are theta; its momentum is fixed."""
    learn = ("learning_rate", "power")
    return inverse_time_momentum(
        learning_rate, MOMENTUM, power, time_constant, learn, effective=False
    )


def constant_momentum(learning_rate: float) -> Learnable:
    """Returns the optimizer whose effective learning rate and momentum are theta."""
    effective: tuple[float, Form] = (learning_rate / (1 - MOMENTUM), "log")
    return lopt.learnable(momentum_sgd, effective_rate=effective, momentum=MOMENTUM)


def theta_at(log_rate: Array, log_power: Array) -> Theta:
    """Returns the theta of `momentum_with_decay`."""
    return {"learning_rate": {"initial": log_rate, "power": log_power}}


def values_of(theta: Theta) -> dict[str, Float[Array, ""]]:
    """Returns the hyperparameters that theta stands for, by name."""
    if "momentum" in theta:
        one_minus = jnp.exp(theta["momentum"])
        rate = jnp.exp(theta["effective_rate"]) * one_minus
        return {"learning_rate": rate, "momentum": 1 - one_minus}
    rate, power = theta["learning_rate"]["initial"], theta["learning_rate"]["power"]
    return {"learning_rate": jnp.exp(rate), "power": jnp.exp(power)}


def within_ranges() -> optax.GradientTransformation:
    """Returns the last part of an outer optimizer: hyperparameters never leave their ranges.

    They are those of the paper, of what has its logarithm learned: rates from 1e-4 to 10, powers
    from 1e-4 to 1e3, one minus momentum from 1e-4 to 1.
    """

    def update(updates: Theta, state: State, params: Theta | None = None) -> tuple[Theta, State]:
        def cut(path: Any, change: Array, leaf: Array) -> Array:
            highest = {"power": 1e3, "momentum": 1.0}.get(path[-1].key, 10.0)
            return jnp.clip(leaf + change, math.log(1e-4), math.log(highest)) - leaf

        return jax.tree_util.tree_map_with_path(cut, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def warm_params(task: AbstractTask, rate: float, key: Key) -> Params:
    """Returns the weights after the warm start."""
    init_key, run_key = jax.random.split(key)
    optimizer = optax.sgd(rate, momentum=MOMENTUM)
    state = lopt.start(task, optimizer, task.init(init_key), run_key)
    return lopt.unroll(task, optimizer, state, WARM_STEPS)[0].params


def measure(task: AbstractTask, params: Params) -> dict[str, Float[Array, ""]]:
    """Measures a network on all of its training and test images."""
    train, test = (task.metrics(params, (), task.everything(name)) for name in ("train", "test"))
    return {
        "train_loss": train["loss"],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
    }
