"""Sharded params, Flax and orbax: programs on four CPU devices, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


MOST = {"muon_mlp": 160 * 160, "guarded": 160 * 160, "hierarchical": 256 * 160}


def run(*what):
    environment = os.environ | {"XLA_FLAGS": FLAGS}
    command = [sys.executable, str(Path(__file__).with_name("placed.py")), *what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_sharded(found):
    """No collective moves more than the statistics of a tensor, a number for each feature.

    But Newton and Schulz's products need whole matrices, and a memory of params their rows.
    """
    for name, one in found.items():
        assert one["params"] < 1e-5, name
        assert one["state"] < 1e-5, name
        assert one["largest"] <= MOST.get(name, 160), name
        if name in ("dm", "rnnprop", "symbolic", "Adam"):
            assert one["largest"] == 0, name
        # What is factored may have lost the axis that is sharded.
        factored = any(word in name for word in ("ada", "type", "velo"))
        assert one["spread"] >= (0.7 if factored else 1), name


@pytest.mark.slow
def test_sharded_params_nnx_and_orbax():
    """In one test, so that one process imports and compiles what they have in common.

    One rule of each kind of state: a network's memory, moments, and factored ones.
    """
    found = run("auto", "explicit", "nnx", "orbax", "specs")
    check_sharded(found["auto"])
    check_sharded(found["explicit"])
    for name, one in found["nnx"].items():
        first, last = one["losses"]
        assert last < first, name
        assert one["params"] < 1e-5, name
    assert found["orbax"]["same"]
    assert found["specs"]["same"]
    assert found["specs"]["leaves"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_every_rule_is_sharded_without_moving(axes):
    check_sharded(run(f"{axes}, every rule")[f"{axes}, every rule"])
