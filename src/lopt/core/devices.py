"""Devices: the one mesh over which independent runs are spread, and models that lie on another.

Particles, samples and episodes are rows along one mesh axis; each device computes its share.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PyTree

AXIS = "particles"


def device_mesh(count: int | None = None) -> Mesh:
    """Returns a mesh of the first `count` local devices, by default of all."""
    return Mesh(np.array(jax.local_devices()[:count]), (AXIS,))


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


def is_sharded(array: ArrayLike) -> bool:
    """Whether an array's type says that its model (each particle is one) is on several devices."""
    shape = jax.typeof(array).sharding.mesh.shape
    return any(size > 1 for name, size in shape.items() if name != AXIS)
