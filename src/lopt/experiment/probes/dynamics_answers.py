"""What an optimizer answers to: scripted gradients, and for a learned rule each of its features."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lopt.analysis.dynamics import (
    partial_dependence,
    recorded_inputs,
    response_curves,
    scripted_updates,
    sensitivities,
    signal,
)
from lopt.analysis.dynamics.script import Signal
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key, Theta
from lopt.experiment.probes.dynamics_watch import Seen
from lopt.experiment.trainings import begin, drawn

# Of the tensor in which a coordinate is sent signals: rules that normalise need others to go by.
COMPANY = 63
MOST_FEATURES = 8
SIGNALS: tuple[Signal, ...] = ("impulse", "step", "sign flip")


@dataclasses.dataclass(frozen=True)
class Feature:
    """What the learned rule makes of one feature.

    Attributes:
        name: of the feature.
        spread: its standard deviation over recorded inputs.
        slope: the mean derivative of the update in it.
        swing: spread times the root mean square of that derivative: how much it moves updates.
        values: that it took, evenly from nearly the least to nearly the largest.
        curves: the update at these values, for some recorded inputs; None of features that matter
            less than others, as is `mean`.
        mean: over these inputs, the partial dependence.
    """

    name: str
    spread: float
    slope: float
    swing: float
    values: Float[np.ndarray, " point"]
    curves: Float[np.ndarray, "row point"] | None
    mean: Float[np.ndarray, " point"] | None


def unfit(learned: AbstractLearnedOptimizer, theta: Theta) -> str:
    """Returns why an optimizer cannot be used on a vector, as one made for other tensors."""
    optimizer, vector = learned.optimizer(theta), jnp.zeros(2)

    def step(vector: Array) -> Any:
        return optimizer.update(vector, optimizer.init(vector), vector, value=vector[0])

    try:
        jax.eval_shape(step, vector)
    except ValueError as error:
        return str(error)
    return ""


@dataclasses.dataclass(frozen=True)
class Scripts:
    """Signals to one coordinate, among others that have gradients and params as in training."""

    signals: dict[str, Float[Array, " time"]]
    others: Float[Array, "time other"]
    params: Float[Array, " coordinate"]
    losses: Float[Array, " time"]

    def answer(self, optimizer: optax.GradientTransformation, kind: str) -> Float[Array, " time"]:
        """Returns the updates of the coordinate that is sent a signal of this kind."""
        grads = jnp.concatenate([self.signals[kind][:, None], self.others], axis=1)
        return scripted_updates(optimizer, grads, self.params, self.losses)[:, 0]


def scripts_like(seen: Seen, coordinates: int, steps: int, key: Key) -> Scripts:
    """Returns signals of the size that gradients had in a run, among others of that size.

    Args:
        seen: of the run.
        coordinates: of all its tensors together.
        steps: of the run; signals last so long, but at most 100.
        key: of what the other coordinates are given.
    """
    length = min(steps, 100)
    height = _typical(np.asarray(seen.gradient_norm)) / coordinates**0.5
    norms = np.linalg.norm(np.asarray(seen.updates.param_norm, float), axis=-1)
    size = _typical(norms) / coordinates**0.5
    first, second = jax.random.split(key)
    signals: dict[str, Array] = {
        kind: signal(kind, length, length // 4, height) for kind in SIGNALS
    }
    signals["quiet"] = jnp.zeros(length)
    params = size * jax.random.normal(second, (COMPANY + 1,))
    return Scripts(
        signals,
        height * jax.random.normal(first, (length, COMPANY)),
        params.at[0].set(0.0),
        jnp.full(length, _typical(np.asarray(seen.loss))),
    )


def _typical(values: np.ndarray) -> float:
    finite = values[np.isfinite(values) & (values > 0)]
    return float(np.median(finite)) if finite.size else 1.0


def features_of(
    tasks: AbstractTaskFamily,
    learned: Coordinatewise,
    theta: Theta,
    run_key: Key,
    key: Key,
    steps: int,
    rows: int,
) -> tuple[Feature, ...]:
    """Returns what the rule does with each feature that differs between recorded inputs."""
    state = begin(tasks, optax.set_to_zero(), run_key)
    task, params = drawn(tasks, run_key), state.params
    inputs = recorded_inputs(task, learned, theta, params, state.key, steps, coordinates=32)
    chosen = jax.random.permutation(key, len(inputs.columns))
    # For slopes and spreads more than for curves, of which one sees no thousand.
    many, few = (
        jax.tree.map(lambda leaf, count=count: leaf[chosen[:count]], inputs)
        for count in (10 * rows, rows)
    )
    slopes = np.asarray(sensitivities(learned, theta, many), float)
    table = np.asarray(jnp.concatenate([many.columns, many.shared], axis=1), float)
    found = []
    for i, name in enumerate(learned.features.names()):
        spread = float(np.std(table[:, i]))
        swing = spread * float(np.sqrt(np.mean(slopes[:, i] ** 2)))
        low, high = np.quantile(table[:, i], [0.005, 0.995])
        values = np.linspace(float(low), float(high), 41)
        if spread > 0:
            slope = float(slopes[:, i].mean())
            found.append(Feature(name, spread, slope, swing, values, None, None))
    found.sort(key=lambda one: -one.swing)
    for i, one in enumerate(found[:MOST_FEATURES]):
        points = jnp.asarray(one.values, few.columns.dtype)
        curves = np.asarray(response_curves(learned, theta, few, one.name, points))
        mean = np.asarray(partial_dependence(learned, theta, few, one.name, points))
        found[i] = dataclasses.replace(one, curves=curves, mean=mean)
    return tuple(found)
