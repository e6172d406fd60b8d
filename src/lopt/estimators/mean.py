"""The mean over particles: of several architectures, on several devices, some at once."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.devices import AXIS, device_mesh, num_devices, round_up, spread
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Params, State
from lopt.estimators.finite import alike, mean_of_finite
from lopt.estimators.truncation import nodes

# Measured on two cores, in operations of one inner step (benchmarks/README.md). Particles that take
# more than the first side by side leave the caches of a CPU's core; particles that take less than
# the second, all together, finish before a second device pays.
FITS_CACHE, PAYS_DEVICES = 4_000_000, 500_000
# What a core computes side by side however large one is, and what it does not go below.
MANY, FEW = 12, 4


class Mean(AbstractGradientEstimator):
    """The mean of `num` independent particles of one estimator.

    Under the mesh of `particle_mesh`, particles are spread over its devices. A device of a CPU
    computes as many at once as its caches hold, an accelerator all of its share.

    Where tasks are of several architectures (`AbstractTaskFamily.architectures`), each has its
    share of the particles, the earlier ones one more if `num` does not divide evenly. The state is
    then a tuple with an entry for each.

    Attributes:
        one: the estimator of each particle.
        num: the number of particles.
        at_once: particles computed side by side on each device, a divisor of `num`; by default as
            many as is fastest. Fewer take less memory.
        rows: which of the particles are computed here, from the first to before the second; by
            default all. The others are computed elsewhere: the mean is over these alone.
    """

    one: AbstractGradientEstimator
    num: int = eqx.field(static=True)
    at_once: int | None = eqx.field(static=True, default=None)
    rows: tuple[int, int] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        check_integer("Mean", "num", self.num)
        if self.at_once is not None:
            check_integer("Mean", "at_once", self.at_once, hint=1)
            if self.num % self.at_once:
                raise ValueError(f"Mean(at_once={self.at_once}) must divide num={self.num}; try 1.")
        first, stop = self.rows or (0, self.num)
        if not 0 <= first < stop <= self.num:
            raise ValueError(f"Mean(rows={self.rows}) must be within num={self.num}; try (0, 1).")
        count = len(_architectures(self.one))
        if self.num < count:
            raise ValueError(
                f"Mean(num={self.num}) must be at least the number of architectures; try {count}."
            )

    @override
    def prepare(self, params: Params, key: Key) -> State:
        keys = jax.random.split(key, self.num)
        states = tuple(
            spread(jax.vmap(one.prepare, (None, 0))(params, spread(keys[rows])))
            for one, rows in self.shares()
        )
        return states if len(states) > 1 else states[0]

    @override
    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        every, state = self.particles(params, state, key)
        return mean_of_finite(every), state

    def particles(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the estimates of all particles, by particle, and the next state."""
        keys, shares = jax.random.split(key, self.num), self.shares()
        states = state if len(shares) > 1 else (state,)
        found = [
            _map(one, params, old, keys[rows], self._side_by_side(one, rows.stop - rows.start))
            for (one, rows), old in zip(shares, states, strict=True)
        ]
        estimates, states = zip(*found, strict=True)
        every = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *estimates)
        return every, states if len(states) > 1 else states[0]

    def shares(self) -> list[tuple[AbstractGradientEstimator, slice]]:
        """Returns the estimator of each architecture, and which of the particles it has here."""
        ones, (first, stop) = _architectures(self.one), self.rows or (0, self.num)
        ends = [-(-self.num * i // len(ones)) for i in range(len(ones) + 1)]
        cut = np.clip(ends, first, stop).tolist()
        rows = [slice(*cut[i : i + 2]) for i in range(len(ones))]
        return [(one, row) for one, row in zip(ones, rows, strict=True) if row.stop > row.start]

    def _side_by_side(self, one: AbstractGradientEstimator, num: int) -> int:
        """Returns how many of `num` particles each device computes at once."""
        share, rest = divmod(num, num_devices())
        if rest:
            devices = f"{num_devices()} devices; use the mesh of lopt.particle_mesh(estimator)."
            raise ValueError(f"Mean(num={self.num}) cannot be spread evenly over {devices}")
        most = self.at_once or share
        if self.at_once is None and share > MANY and jax.default_backend() == "cpu":
            cost = step_cost(one)
            most = max(MANY, int(FITS_CACHE / cost)) if math.isfinite(cost) else share
        size = max(d for d in range(1, min(most, share) + 1) if share % d == 0)
        return share if self.at_once is None and size < FEW else size


def particle_mesh(estimator: AbstractGradientEstimator) -> Mesh:
    """Returns a mesh of as many devices as the particles of `estimator` divide among evenly.

    It is one device if an inner step of all particles is too small to be shared. On a CPU each core
    can be made a device, before JAX is first used, by `jax.config.update("jax_num_cpu_devices",
    2)`: XLA runs small programs on one core, and more of them on more cores. `lopt train` does so,
    and runs its loop under `jax.set_mesh(lopt.particle_mesh(meta))`.
    """
    shares = [share for mean in nodes(estimator, Mean) for share in mean.shares()]
    counts = [rows.stop - rows.start for _, rows in shares] or [1]
    if jax.process_count() > 1:
        return _mesh_of_processes(counts)
    most = len(jax.local_devices())
    count = max(d for d in range(1, most + 1) if not any(n % d for n in counts))
    if count > 1 and jax.default_backend() == "cpu":
        costs = (n * step_cost(one) for n, (one, _) in zip(counts, shares, strict=True))
        count = count if any(cost >= PAYS_DEVICES for cost in itertools.accumulate(costs)) else 1
    return device_mesh(count)


def _mesh_of_processes(counts: Sequence[int]) -> Mesh:
    """Returns a mesh of all devices of all processes."""
    devices = jax.devices()
    if any(count % len(devices) for count in counts):
        raise ValueError(
            f"{' + '.join(map(str, counts))} particles cannot be spread evenly over the "
            f"{len(devices)} devices of {jax.process_count()} processes; try "
            f"{sum(round_up(count, len(devices)) for count in counts)} particles in all."
        )
    return Mesh(np.array(devices), (AXIS,))


@eqx.filter_jit
def _map(
    one: AbstractGradientEstimator, params: Params, states: State, keys: Array, size: int
) -> tuple[Estimate, State]:
    """Returns the estimates of particles, which each device computes `size` at a time.

    Every device goes through chunks of its own particles, so that none of them moves.
    """

    def particle(row: tuple[State, Key]) -> tuple[Estimate, State]:
        estimate, state = one.estimate(params, *row)
        return alike([estimate])[0], state

    devices, num = num_devices(), len(keys)
    if devices * size == 1:
        # An axis of length one, as `vmap` has it, costs products of recurrent rules a third.
        return jax.lax.map(particle, (states, keys))

    def fold(leaf: Any) -> Any:
        chunks = leaf.reshape(devices, -1, size, *leaf.shape[1:]).swapaxes(0, 1)
        return spread(chunks.reshape(-1, devices * size, *leaf.shape[1:]), axis=1)

    def unfold(leaf: Any) -> Any:
        parts = leaf.reshape(-1, devices, size, *leaf.shape[2:]).swapaxes(0, 1)
        return spread(parts.reshape(-1, *leaf.shape[2:]))

    def chunk(rows: tuple[State, Array]) -> tuple[Estimate, State]:
        return spread(jax.vmap(particle)(spread(rows)))

    if num == devices * size:
        return chunk((states, keys))
    return jax.tree.map(unfold, jax.lax.map(chunk, jax.tree.map(fold, (states, keys))))


def _architectures(one: AbstractGradientEstimator) -> list[AbstractGradientEstimator]:
    """Returns an estimator for each architecture that the tasks of its inner training are of."""
    families = [inner.tasks.architectures() for inner in nodes(one, InnerTraining)]
    if all(len(each) == 1 for each in families):
        return [one]

    def tasks(tree: Any) -> list[Any]:
        return [inner.tasks for inner in nodes(tree, InnerTraining)]

    count = max(map(len, families))
    families = [each * count if len(each) == 1 else each for each in families]
    return [eqx.tree_at(tasks, one, list(each)) for each in zip(*families, strict=True)]


def step_cost(one: AbstractGradientEstimator) -> float:
    """Returns about how many operations an inner step takes: infinitely many if it is not known.

    They are those of the task's gradient, and two for each pair of a weight of the network and one
    of theta. Nothing is compiled.
    """
    return max(map(_inner_cost, nodes(one, InnerTraining)), default=math.inf)


def _inner_cost(inner: InnerTraining) -> float:
    # Shapes alone: a data set is no constant of the program.
    arrays, static = eqx.partition(inner.tasks, eqx.is_array)

    def begin(arrays: Any, key: Key) -> tuple[Params, State]:
        task = eqx.combine(arrays, static).draw(key)
        params = task.init(key)
        return params, task.prepare(params, key)

    def step(arrays: Any, params: Params, state: State, key: Key) -> Any:
        return eqx.combine(arrays, static).draw(key).estimate(params, state, key)

    arrays, key = jax.eval_shape(lambda: (arrays, jax.random.key(0)))
    params, state = jax.eval_shape(begin, arrays, key)
    found = jax.jit(step).lower(arrays, params, state, key).cost_analysis() or {}
    trees = params, jax.eval_shape(inner.learned.init, key)
    pairs = math.prod(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees)
    return max(1.0, found.get("flops", math.inf)) + 2.0 * pairs
