"""Reference optimizers with their grids of learning rates, and the one tuner."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Scalar
from lopt.experiment.trainings import Keys, dtype_of, trainings


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A hand-made optimizer, by its learning rate, and rates to choose from.

    They are half decades, wide enough that the best is at no end on the tasks of the recipes.
    """

    factory: Callable[[Any], optax.GradientTransformation]
    rates: Float[np.ndarray, " rate"]


def _baseline(low: float, high: float, factory: Any, **fixed: float) -> Baseline:
    rates = 10.0 ** np.arange(low, high + 0.25, 0.5)
    return Baseline(functools.partial(factory, **fixed), rates)


BASELINES = {
    "SGD": _baseline(-3.0, 2.0, optax.sgd),
    "momentum": _baseline(-4.0, 1.0, optax.sgd, momentum=0.9),
    "Adam": _baseline(-4.5, 0.5, optax.adam),
    "Lion": _baseline(-5.5, 0.0, optax.lion, weight_decay=0.0),
}
DEFAULT_ADAM = 1e-3


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was chosen from a grid, and what training with it, and with each value, resulted in."""

    value: Any
    at_edge: bool  # the first or last of the grid
    result: Any
    results: Any


def tune(
    factory: Callable[[Any], Any],
    grid: Float[np.ndarray, "value ..."],
    train: Callable[[Any], tuple[Scalar, Any]],
    extra: Float[np.ndarray, "more ..."] | None = None,
) -> Tuned:
    """Trains with every value of a grid, side by side, and chooses the one with the lowest score.

    `train` maps what the factory makes of a value to a score and anything; it is traced once.
    Where no score is finite the first value is chosen. Values of `extra` are tried, not chosen.
    """
    tried = grid if extra is None else np.concatenate([grid, extra])

    every = jax.jit(jax.vmap(lambda value: train(factory(value))))
    scores, results = jax.device_get(every(jnp.asarray(tried)))
    own = np.asarray(scores, float)[: len(grid)]
    best = int(np.argmin(np.where(np.isfinite(own), own, np.inf)))
    value = float(grid[best]) if grid.ndim == 1 else grid[best]
    chosen = jax.tree.map(lambda leaf: leaf[best], results)
    return Tuned(value, best in (0, len(grid) - 1), chosen, results)


def tuned_baseline(tasks: AbstractTaskFamily, keys: Keys, num_steps: int, name: str) -> Tuned:
    """Returns the learning rate of a baseline with the lowest mean loss over all steps and keys.

    It is the published criterion (Sobotka et al. 2024, arXiv:2312.07174).
    """
    baseline = BASELINES[name]

    def train(optimizer: optax.GradientTransformation) -> tuple[Scalar, tuple[()]]:
        return jnp.mean(trainings(tasks, optimizer, keys, num_steps)[1]), ()

    return tune(baseline.factory, baseline.rates.astype(dtype_of(tasks)), train)
