"""Trainings of fresh tasks: the one place that starts them, on all devices, from named keys."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from jaxtyping import Key as KeyArray

from lopt.core.devices import device_mesh, replicate, round_up, spread
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Key, Record, Theta
from lopt.core.unroll import Step, TrainState, loss_of, start, unroll

Keys = KeyArray[Array, " seed"]
# Records of so many numbers are computed at once: of fewer steps of large networks.
RECORD_SIZE = 2**22

# Every stream of random numbers is far from those of meta-training, and from the others.
STREAMS = {
    "evaluation": None,
    "record": 0x5EC,
    "roll-out": 0xD157,
    "dynamics": 0xD1A,
    "symmetry": 0x517,
}


def stream(name: str, seed: int) -> Key:
    """Returns the key of a stream of random numbers that meta-training with a seed never uses."""
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


def bytes_per_param(
    tasks: AbstractTaskFamily, optimizer: Callable[[], optax.GradientTransformation]
) -> float:
    """Returns the bytes of an optimizer's state for each number that it trains."""

    def made(key: Key) -> Any:
        params = drawn(tasks, key).init(key)
        return params, optimizer().init(params)

    params, state = map(jax.tree.leaves, jax.eval_shape(made, jax.random.key(0)))
    return sum(x.size * x.dtype.itemsize for x in state) / sum(x.size for x in params)


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
    """Trains a fresh task for each key; returns states by key, and records by key and step.

    Keys give tasks, initial params and batches: the same ones put optimizers on the same terms.
    Training goes on with `states`, if given. Records are computed step by step, or of about
    `record_size` numbers at once.
    """
    if states is None:
        states = jax.vmap(lambda key: begin(tasks, optimizer, key))(keys)

    def one(key: Key, state: TrainState) -> tuple[TrainState, Record]:
        task = drawn(tasks, key)
        size = len(keys) * sum(leaf.size for leaf in jax.tree.leaves(state.params))
        at_once = max(1, min(50, record_size // max(1, size)))
        return recorded_together(task, optimizer, state, num_steps, record, at_once)

    return jax.vmap(one)(keys, states)


def recorded_together(
    estimator: AbstractGradientEstimator,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    num_steps: int,
    record: Callable[[Step], Any],
    at_once: int,
) -> tuple[TrainState, Record]:
    """Returns what `lopt.unroll` does, with records of some steps computed at once.

    A record of many small operations takes as long as a step of a small network; mapped over the
    steps of a window it costs much less. By the semigroup law a run is one of windows. They have
    `at_once` steps, cut to a divisor of `num_steps`; memory holds as many states.
    """
    window = max(size for size in range(1, at_once + 1) if num_steps % size == 0)
    if window == 1:
        return unroll(estimator, optimizer, state, num_steps, record=record)

    def advance(state: TrainState, _: None) -> tuple[TrainState, Record]:
        state, steps = unroll(estimator, optimizer, state, window, record=lambda step: step)
        return state, jax.vmap(record)(steps)

    state, kept = jax.lax.scan(advance, state, length=num_steps // window)
    return state, jax.tree.map(lambda leaf: leaf.reshape(num_steps, *leaf.shape[2:]), kept)


def mean_estimate(
    shared: tuple[AbstractGradientEstimator, Theta],
    key: Key,
    count: int,
    record: Callable[[Step], Any] = lambda step: jnp.where(
        step.dropped > 0, jnp.nan, ravel_pytree(step.grads)[0]
    ),
) -> Any:
    """Returns the mean record, by default the whole gradient, of estimates in a row at a theta."""
    (estimator, theta), still = shared, optax.set_to_zero()
    begun = start(estimator, still, theta, key)
    _, records = unroll(estimator, still, begun, count, record=record)
    return jax.tree.map(lambda x: x.mean(0), records)


class OverDevices:
    """What maps `function(shared, item)` over items, spread over all devices, and what that costs.

    About `at_once` items, precisely `batch`, are computed at once, by one compiled program.
    """

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any, at_once: int) -> None:
        self._mesh = device_mesh()
        self.batch = round_up(at_once, self._mesh.size)
        static = eqx.filter(shared, eqx.is_array, inverse=True)
        self.share(shared)

        def one(arrays: Any, item: Any) -> Any:
            return function(eqx.combine(arrays, static), item)

        self._mapped = jax.jit(jax.vmap(one, (None, 0)))
        self._traced: Any = None
        self._compiled: Any = None
        self._seconds: list[float] = []
        self.compile_seconds = 0.0  # of tracing and compiling

    def share(self, shared: Any) -> None:
        """Shares other arrays, of the same shapes, from now on."""
        self._shared = replicate(eqx.filter(shared, eqx.is_array), self._mesh)

    @property
    def seconds(self) -> float:
        """How long a batch takes, the median over those computed."""
        return float(np.median(self._seconds))

    @property
    def memory(self) -> float:
        """Bytes of temporary arrays for a batch, on all devices; NaN if XLA does not say."""
        analysis = self._compiled.memory_analysis()
        return np.nan if analysis is None else float(analysis.temp_size_in_bytes * self._mesh.size)

    def trace(self, items: Any) -> None:
        """Gets ready for `compile`; items are such as it will be called with."""
        began = time.perf_counter()
        self._traced = self._mapped.lower(self._shared, next(self._batches(items)))
        self.compile_seconds += time.perf_counter() - began

    def compile(self) -> None:
        """Compiles what was traced; unlike tracing, this may be done in another thread."""
        began = time.perf_counter()
        self._compiled = self._traced.compile()
        self.compile_seconds += time.perf_counter() - began

    def __call__(self, items: Any) -> Any:
        """Returns results as NumPy arrays, by item; items are arrays with one leading axis."""
        if self._traced is None:
            self.trace(items)
        if self._compiled is None:
            self.compile()
        parts = []
        for some in self._batches(items):
            began = time.perf_counter()
            parts.append(jax.device_get(self._compiled(self._shared, some)))
            self._seconds.append(time.perf_counter() - began)
        count = len(jax.tree.leaves(items)[0])
        return jax.tree.map(lambda *part: np.concatenate(part)[:count], *parts)

    def _batches(self, items: Any) -> Iterator[Any]:
        count = len(jax.tree.leaves(items)[0])
        # The last batch is filled up with items from the front.
        numbers = np.resize(np.arange(count), round_up(count, self.batch)).reshape(-1, self.batch)
        for n in jnp.asarray(numbers):
            yield spread(jax.tree.map(lambda x, n=n: x[n], items), self._mesh)
