"""Trainings of fresh tasks: the one place that starts them, on all devices, from named keys."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from jaxtyping import Key as KeyArray

from lopt.core.devices import device_mesh, round_up, spread
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Key, Record
from lopt.core.unroll import Step, TrainState, loss_of, start, unroll
from lopt.experiment.recorded import recorded_together

Keys = KeyArray[Array, " seed"]

# Every stream of random numbers is far from those of meta-training, and from the others.
STREAMS = {
    "evaluation": None,
    "record": 0x5EC,
    "roll-out": 0xD157,
    "dynamics": 0xD1A,
    "symmetry": 0x517,
}

# For `record_size`, where a record is many small operations.
RECORD_SIZE = 2**22


def stream(name: str, seed: int) -> Key:
    """Returns the key of a stream of random numbers that meta-training never used.

    Args:
        name: one of `STREAMS`.
        seed: of a run, or of a command.
    """
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    number = STREAMS[name]
    return key if number is None else jax.random.fold_in(key, number)


def drawn(tasks: AbstractTaskFamily, key: Key) -> AbstractTask:
    """Returns the task that the training with this key trains."""
    return tasks.draw(jax.random.fold_in(key, 2**32 - 3))


def dtype_of(tasks: AbstractTaskFamily) -> Any:
    """Returns the dtype of the params of tasks, in which learning rates are given to Optax."""
    params = jax.eval_shape(lambda key: drawn(tasks, key).init(key), jax.random.key(0))
    return jnp.result_type(*jax.tree.leaves(params))


def begin(
    tasks: AbstractTaskFamily, optimizer: optax.GradientTransformation, key: Key
) -> TrainState:
    """Returns the state in which the training with this key begins."""
    init_key, run_key = jax.random.split(key)
    task = drawn(tasks, key)
    return start(task, optimizer, task.init(init_key), run_key)


@eqx.filter_jit
def trainings(
    tasks: AbstractTaskFamily,
    optimizer: optax.GradientTransformation,
    keys: Keys,
    num_steps: int,
    record: Callable[[Step], Any] = loss_of,
    *,
    states: TrainState | None = None,
    record_size: int = 0,
) -> tuple[TrainState, Record]:
    """Trains a fresh task for each key.

    Args:
        tasks: a family, or a task.
        optimizer: any Optax optimizer.
        keys: of tasks, initial params and batches: optimizers with the same keys are on the same
            terms.
        num_steps: of each training.
        record: what to keep of each step.
        states: by key, to go on with; fresh ones by default.
        record_size: of how many numbers records are computed at once, about; 0 for step by step.

    Returns:
        Final states by key, and records by key and step.
    """
    if states is None:
        states = jax.vmap(lambda key: begin(tasks, optimizer, key))(keys)

    def one(key: Key, state: TrainState) -> tuple[TrainState, Record]:
        task = drawn(tasks, key)
        size = len(keys) * sum(leaf.size for leaf in jax.tree.leaves(state.params))
        at_once = max(1, min(50, record_size // max(1, size)))
        if at_once == 1:
            return unroll(task, optimizer, state, num_steps, record=record)
        return recorded_together(task, optimizer, state, num_steps, record, at_once)

    return jax.vmap(one)(keys, states)


def over_devices(
    function: Callable[[Any, Any], Any], shared: Any, at_once: int
) -> Callable[[Any], Any]:
    """Returns what maps `function(shared, item)` over items, spread over all devices.

    Args:
        function: of what all have in common, and of one item; compiled once.
        shared: a pytree.
        at_once: how many items are computed at once, about.

    Returns:
        A function from items, arrays with one leading axis, to results as NumPy arrays.
    """
    mesh = device_mesh()
    batch = round_up(at_once, mesh.size)
    arrays, static = eqx.partition(shared, eqx.is_array)
    everywhere = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))

    def one(arrays: Any, item: Any) -> Any:
        return function(eqx.combine(arrays, static), item)

    program = jax.jit(jax.vmap(one, (None, 0)))

    def run(items: Any) -> Any:
        count = len(jax.tree.leaves(items)[0])
        # The last batch is filled up with items from the front.
        numbers = np.resize(np.arange(count), round_up(count, batch)).reshape(-1, batch)
        parts = [
            jax.device_get(
                program(everywhere, spread(jax.tree.map(lambda x, n=n: x[n], items), mesh))
            )
            for n in jnp.asarray(numbers)
        ]
        return jax.tree.map(lambda *part: np.concatenate(part)[:count], *parts)

    return run
