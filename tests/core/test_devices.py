"""Meshes: which arrays belong to a sharded model, and how rows are spread."""

import json
import subprocess
import sys

SCRIPT = """
import json, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from lopt.core.devices import AXIS, device_mesh, is_sharded, num_devices, spread

seen, devices = {}, np.array(jax.devices())


def look(name, array):
    inside = []
    jax.jit(lambda x: inside.append(is_sharded(x)))(array)
    jax.jit(lambda x: inside.append(is_sharded(x + 1)))(array)
    seen[name] = [is_sharded(array), *inside]


both = (AXIS, "model")
meshes = ((2, 2), both), ((4, 1), both), ((4,), ("model",)), ((4,), (AXIS,))
for kind in (AxisType.Auto, AxisType.Explicit):
    for shape, axes in meshes:
        mesh = Mesh(devices.reshape(shape), axes, axis_types=(kind,) * len(axes))
        placed = jax.device_put(jnp.zeros((4, 4)), NamedSharding(mesh, PartitionSpec(axes[-1])))
        look(f"{kind} {dict(zip(axes, shape))}", placed)
look("one", jnp.zeros(3))
rows = spread({"a": jnp.arange(8)}, device_mesh())["a"]
with jax.set_mesh(device_mesh(2)):
    inside = jax.jit(lambda x: spread(x, axis=1))(jnp.zeros((3, 4)))
    number = num_devices()
counts = [len(rows.devices()), num_devices(), number, tuple(inside.sharding.spec)]
print(json.dumps([seen, counts]))
"""


def test_sharded_models_are_told_from_spread_rows():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    seen, counts = json.loads(done.stdout.splitlines()[-1])
    for name, found in seen.items():
        expected = "'model': 2" in name or "'model': 4" in name
        assert found == [expected] * 3, name
    assert len(seen) == 9
    assert counts == [4, 1, 2, [None, "particles"]]
