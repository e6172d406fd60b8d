"""What a learned rule is given: its features, by name, and its memory, as recorded or as put.

Recorded inputs are those of `lopt.Coordinatewise.inputs`, a row for each coordinate and step.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.checks import check_integer, check_key
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.types import Key, Params, Theta
from lopt.core.unroll import Step, start, unroll


class InputRows(eqx.Module):
    """What a rule was given: a row for each coordinate and step.

    Attributes:
        columns: features that differ between coordinates, as the rule sees them, normalised if it
            has them so.
        shared: features that all coordinates share.
        memory: the rule's memory before it, laid end to end.
    """

    columns: Float[Array, "*row column"]
    shared: Float[Array, "*row shared"]
    memory: Float[Array, "*row entry"]


class InputRecord(eqx.Module):
    """Records the inputs of some coordinates: `lopt.unroll(..., record=InputRecord(...))`.

    The run's optimizer has to be `learned.optimizer(theta)`.

    Attributes:
        learned: the optimizer.
        theta: its weights.
        coordinates: numbers in the order of the params laid end to end; inputs of those that are
            not there are no numbers.
    """

    learned: Coordinatewise
    theta: Theta
    coordinates: Int[Array, " coordinate"]

    def __call__(self, step: Step) -> InputRows:
        """Returns the inputs at this step, a row for each of the coordinates."""
        inputs = self.learned.inputs(self.theta, step.grads, step.opt_state, step.params)
        chosen = inputs.at(self.coordinates)
        rows, dtype = len(self.coordinates), chosen.columns.dtype
        shared = jnp.broadcast_to(chosen.shared, (rows, len(chosen.shared)))
        entries = [jnp.zeros((0, rows), dtype), *jax.tree.leaves(chosen.memory)]
        return InputRows(chosen.columns.T, shared, jnp.concatenate(entries).T)


def recorded_inputs(
    estimator: AbstractGradientEstimator,
    learned: Coordinatewise,
    theta: Theta,
    params: Params,
    key: Key,
    num_steps: int,
    coordinates: int = 64,
) -> InputRows:
    """Trains with a learned optimizer and returns what its rule was given on the way.

    Args:
        estimator: a task.
        learned: the optimizer.
        theta: its weights.
        params: where training starts.
        key: of the run, and of the choice of coordinates.
        num_steps: how many.
        coordinates: how many are followed, at most; drawn at random.

    Returns:
        A row for each step and coordinate, all those of a step together.

    Raises:
        TypeError: if `key` is no key.
    """
    check_key("recorded_inputs", key)
    check_integer("recorded_inputs", "coordinates", coordinates, hint=64)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    run_key, choice_key = jax.random.split(key)
    chosen = jax.random.permutation(choice_key, total)[:coordinates]
    optimizer = learned.optimizer(theta, num_steps)
    state = start(estimator, optimizer, params, run_key)
    record = InputRecord(learned, theta, chosen)
    _, inputs = unroll(estimator, optimizer, state, num_steps, record=record)
    # Not -1, as there may be no memory at all.
    rows = num_steps * len(chosen)
    return jax.tree.map(lambda leaf: leaf.reshape(rows, leaf.shape[-1]), inputs)


def given_inputs(
    learned: Coordinatewise, theta: Theta, features: Mapping[str, float] | None = None
) -> InputRows:
    """Returns one row of inputs: these features, zero for all others, and fresh memory.

    Features are meant as the rule sees them: of those that are normalised, 1 is the root mean
    square over the tensor.

    Raises:
        ValueError: if it has no feature of such a name.
    """
    columns, shared, _ = input_sizes(learned, theta)
    dtype = _dtype(theta)
    row = jnp.zeros(columns + shared, dtype)
    for name, value in (features or {}).items():
        row = row.at[feature_place("given_inputs", learned, name)].set(value)
    memory = learned.rule.begin(theta["rule"], (1,))
    parts = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(memory)]
    entries = jnp.concatenate([*parts, jnp.zeros(0, dtype)])
    return InputRows(row[None, :columns], row[None, columns:], entries[None])


def input_sizes(learned: Coordinatewise, theta: Theta) -> tuple[int, int, int]:
    """Returns how many columns, shared features and entries of memory there are."""
    shared = jax.eval_shape(
        lambda step: learned.features.shared(step, _dtype(theta)), jnp.zeros((), jnp.int32)
    ).size
    memory = jax.eval_shape(lambda theta: learned.rule.begin(theta, (1,)), theta["rule"])
    entries = sum(leaf.size for leaf in jax.tree.leaves(memory))
    return len(learned.features.names()) - shared, shared, entries


def feature_place(owner: str, learned: Coordinatewise, name: str) -> int:
    """Returns the number of the feature of this name.

    Raises:
        ValueError: if there is none.
    """
    names = learned.features.names()
    if name not in names:
        raise ValueError(f"{owner}: there is no feature {name!r}; there are {', '.join(names)}.")
    return names.index(name)


def check_inputs(owner: str, learned: Coordinatewise, theta: Theta, inputs: InputRows) -> None:
    """Refuses rows of inputs that are not this optimizer's.

    Raises:
        ValueError: if widths differ, or if there are no rows.
    """
    expected = input_sizes(learned, theta)
    found = tuple(part.shape[-1] for part in (inputs.columns, inputs.shared, inputs.memory))
    if found != expected or inputs.columns.ndim != 2:
        raise ValueError(
            f"{owner}(inputs) has {found} columns, shared features and entries of memory in rows "
            f"of rank {inputs.columns.ndim - 1}, but this optimizer's have {expected} in rows of "
            "rank 1; try recorded_inputs(...) or given_inputs(learned, theta)."
        )
    if not len(inputs.columns):
        raise ValueError(
            f"{owner}(inputs) has no rows; try recorded_inputs(...) or "
            "given_inputs(learned, theta)."
        )


def _dtype(theta: Theta) -> Any:
    leaves = jax.tree.leaves(theta)
    return leaves[0].dtype if leaves else jnp.zeros(()).dtype
