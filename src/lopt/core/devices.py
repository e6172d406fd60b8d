"""Devices: the one mesh over which independent runs are spread, and models that lie on another.

Particles, samples and episodes are rows along one mesh axis; each device computes its share.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike
from jaxtyping import PyTree

AXIS = "particles"


def device_mesh(count: int | None = None) -> Mesh:
    """Returns a mesh of the first `count` local devices, by default of all."""
    return Mesh(np.array(jax.local_devices()[:count]), (AXIS,))


def place(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    """Puts an array onto devices, also where some are those of other processes.

    They all call this, and each has all of the array.
    """
    if jax.process_count() == 1 or not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(leaf), sharding))
    return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a copy of every array of a tree on each device of a mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> Any:
        return place(jnp.asarray(leaf), everywhere) if eqx.is_array(leaf) else leaf

    return jax.tree.map(put, tree)


def num_devices() -> int:
    """Returns over how many devices the mesh in force spreads rows: 1 if there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)


def spread(tree: PyTree, mesh: Mesh | None = None, axis: int = 0) -> PyTree:
    """Spreads an axis of every array evenly over a mesh, or over the one in force if there is."""
    spec = PartitionSpec(*(None,) * axis, AXIS)
    if mesh is not None:
        return jax.device_put(tree, NamedSharding(mesh, spec))
    return tree if num_devices() == 1 else jax.lax.with_sharding_constraint(tree, spec)


def round_up(number: int, divisor: int) -> int:
    """Returns the least multiple of the divisor that is at least `number`."""
    return -(-number // divisor) * divisor


def is_spread(array: jax.Array) -> bool:
    """Whether an array's rows are spread over the devices of a mesh."""
    return AXIS in getattr(array.sharding, "spec", ())


def is_sharded(array: ArrayLike) -> bool:
    """Whether an array's type says that its model (each particle is one) is on several devices."""
    shape = jax.typeof(array).sharding.mesh.shape
    return any(size > 1 for name, size in shape.items() if name != AXIS)
