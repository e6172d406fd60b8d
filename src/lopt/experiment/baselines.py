"""Reference optimizers with their grids of learning rates, and the one tuner."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Scalar
from lopt.experiment.trainings import Keys, dtype_of, trainings


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A hand-made optimizer.

    Attributes:
        factory: from a learning rate to the optimizer.
        rates: those to choose from: half decades, wide enough that the best is never at an end on
            the tasks of the recipes.
    """

    factory: Callable[[Any], optax.GradientTransformation]
    rates: Float[np.ndarray, " rate"]


def _half_decades(low: float, high: float) -> Float[np.ndarray, " rate"]:
    return 10.0 ** np.arange(low, high + 0.25, 0.5)


BASELINES = {
    "SGD": Baseline(optax.sgd, _half_decades(-3.0, 2.0)),
    "momentum": Baseline(functools.partial(optax.sgd, momentum=0.9), _half_decades(-4.0, 1.0)),
    "Adam": Baseline(optax.adam, _half_decades(-4.5, 0.5)),
    "Lion": Baseline(functools.partial(optax.lion, weight_decay=0.0), _half_decades(-5.5, 0.0)),
}
DEFAULT_ADAM = 1e-3


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was chosen from a grid.

    Attributes:
        value: the choice.
        at_edge: whether it is the first or last of the grid.
        result: of the training with it, as NumPy arrays.
        results: of all, by value.
    """

    value: Any
    at_edge: bool
    result: Any
    results: Any


def tune(
    factory: Callable[[Any], Any],
    grid: Float[np.ndarray, "value ..."],
    train: Callable[[Any], tuple[Scalar, Any]],
    extra: Float[np.ndarray, "more ..."] | None = None,
) -> Tuned:
    """Trains with every value of a grid, side by side, and chooses the one with the lowest score.

    Args:
        factory: from a value to what is trained with.
        grid: the values, of the dtype of params; where no score is finite the first is chosen.
        train: from that to a score and anything; traced once.
        extra: more values that are tried, but not chosen.
    """
    tried = grid if extra is None else np.concatenate([grid, extra])

    @jax.jit
    def every(values: Float[Array, "value ..."]) -> tuple[Float[Array, " value"], Any]:
        return jax.vmap(lambda value: train(factory(value)))(values)

    scores, results = jax.device_get(every(jnp.asarray(tried)))
    own = np.asarray(scores, float)[: len(grid)]
    best = int(np.argmin(np.where(np.isfinite(own), own, np.inf)))
    value = float(grid[best]) if grid.ndim == 1 else grid[best]
    chosen = jax.tree.map(lambda leaf: leaf[best], results)
    return Tuned(value, best in (0, len(grid) - 1), chosen, results)


def tuned_baseline(tasks: AbstractTaskFamily, keys: Keys, num_steps: int, name: str) -> Tuned:
    """Returns the learning rate of a baseline with the lowest mean loss over all steps and keys.

    It is the published criterion (Sobotka et al. 2024, arXiv:2312.07174).

    Args:
        tasks: a family, or a task.
        keys: of the trainings that it is chosen for.
        num_steps: of each.
        name: one of `BASELINES`.
    """
    baseline = BASELINES[name]

    def train(optimizer: optax.GradientTransformation) -> tuple[Scalar, tuple[()]]:
        return jnp.mean(trainings(tasks, optimizer, keys, num_steps)[1]), ()

    return tune(baseline.factory, baseline.rates.astype(dtype_of(tasks)), train)
