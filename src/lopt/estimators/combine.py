"""Combinations of estimators: the mean over particles."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params, State

AXIS = "particles"


class Mean(AbstractGradientEstimator):
    """The mean of `num` independent particles of one estimator.

    Attributes:
        one: the estimator of each particle.
        num: the number of particles.
        at_once: particles computed side by side; a divisor of `num`, all of them by default. Fewer
            at once take less memory, and may be faster when they fit into a processor's cache.
    """

    one: AbstractGradientEstimator
    num: int = eqx.field(static=True)
    at_once: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not isinstance(self.num, int) or self.num < 1:
            raise ValueError(f"Mean(num={self.num!r}) must be a positive integer; try 16.")
        if self.at_once is not None and (self.at_once < 1 or self.num % self.at_once):
            raise ValueError(f"Mean(at_once={self.at_once}) must divide num={self.num}.")

    def prepare(self, params: Params, key: Key) -> State:
        """Returns the particles' states, stacked."""
        keys = jax.random.split(key, self.num)
        return self._spread(jax.vmap(self.one.prepare, (None, 0))(params, self._spread(keys)))

    def estimate(self, params: Params, state: State, key: Key) -> tuple[Estimate, State]:
        """Returns the mean estimate, and the particles' next states."""
        keys = jax.random.split(key, self.num)
        state, keys = self._spread((state, keys))

        def estimate(each: tuple[State, Key]) -> tuple[Estimate, State]:
            return self.one.estimate(params, *each)

        if self.at_once is None:
            estimates, state = jax.vmap(estimate)((state, keys))
        else:
            estimates, state = jax.lax.map(estimate, (state, keys), batch_size=self.at_once)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), estimates), self._spread(state)

    def _spread(self, particles: Any) -> Any:
        devices = dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)
        if devices == 1 or self.at_once is not None:
            return particles
        if self.num % devices:
            raise ValueError(
                f"Mean(num={self.num}) cannot be spread evenly over {devices} devices; "
                "use the mesh of lopt.particle_mesh(estimator)."
            )
        return jax.lax.with_sharding_constraint(particles, PartitionSpec(AXIS))


def particle_mesh(estimator: AbstractGradientEstimator) -> Mesh:
    """Returns a mesh of as many devices as the particles of `estimator` divide among evenly.

    On several accelerators particles then run side by side. On a CPU each core can be made a
    device, before JAX is first used, by `jax.config.update("jax_num_cpu_devices", 2)`: XLA runs
    small programs on one core, and more of them on more cores. `lopt train` does both.

        with jax.set_mesh(lopt.particle_mesh(meta)):
            state, losses = lopt.unroll(meta, optimizer, state, 100)
    """
    means = jax.tree.leaves(estimator, is_leaf=lambda node: isinstance(node, Mean))
    numbers = [mean.num for mean in means if isinstance(mean, Mean)] or [1]
    devices = jax.local_devices()
    count = max(d for d in range(1, len(devices) + 1) if not any(num % d for num in numbers))
    return Mesh(np.array(devices[:count]), (AXIS,))
