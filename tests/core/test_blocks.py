"""Slabs: `map_blocks` computes what the function computes, in bounded memory."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.core.tensors import map_blocks

KEY = jax.random.key(0)


def normal(index, shape):
    return jax.random.normal(jax.random.fold_in(KEY, index), shape)


def function(arrays):
    """Elementwise in the coordinates, but for a sum; uses whatever it is given."""
    whole, leading, factored, scalar = arrays
    row, col = factored
    stack = jnp.sin(leading) * (whole + scalar)[None] + row * col
    return {"one": whole * scalar, "stack": stack, "sum": jnp.sum(stack**2), "none": ()}


@pytest.mark.parametrize(
    "shape", [(7,), (1000,), (13, 50), (50, 13), (3, 3, 16, 40), (1, 600), (24, 24)]
)
@pytest.mark.parametrize("block_size", [1, 64, 300])
def test_equals_the_unblocked_function(shape, block_size):
    # A row without the longest axis, and a column without another one, behind a leading axis.
    longest, other = np.argsort(shape)[-1], np.argsort(shape)[0]
    row, col = (
        [1 if axis == left_out and len(shape) > 1 else n for axis, n in enumerate(shape)]
        for left_out in (longest, other)
    )
    arrays = (
        normal(0, shape),
        normal(1, (2, *shape)),
        (normal(2, (2, *row)), normal(3, (1, *col))),
        normal(4, ()),
    )
    expected = function(arrays)
    blocked = jax.jit(lambda arrays: map_blocks(function, arrays, shape, block_size))(arrays)
    assert jax.tree.structure(blocked) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(blocked), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_slab_is_about_a_block():
    seen = []

    def spy(array):
        seen.append(array.shape)
        return array + 1

    array = normal(0, (13, 50))
    np.testing.assert_array_equal(map_blocks(spy, array, (13, 50), 100), array + 1)
    assert all(np.prod(shape) <= 104 for shape in seen), seen
    # An axis of 50 in 7 slabs: six of 8 columns, and 2 left over.
    assert set(seen) == {(13, 8), (13, 2)}
    seen.clear()
    map_blocks(spy, array, (13, 50), 650)
    assert seen == [(13, 50)]  # what fits is not cut


def test_derivatives_of_slabs():
    arrays = normal(0, (9, 31)), normal(1, (9, 1))

    def total(block_size):
        def loss(arrays):
            product = map_blocks(lambda a: jnp.tanh(a[0] * a[1]), arrays, (9, 31), block_size)
            return jnp.sum(product**2)

        return jax.jit(jax.grad(loss))(arrays)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), total(20), total(1000))


def rule(preset, block_size):
    """Returns the preset with slabs of a few coordinates, and steps that are not tiny."""
    learned = preset(hidden=(5,), exp_multiplier=0.1, step_multiplier=0.1)
    return lopt.Coordinatewise(learned.features, learned.rule, learned.scale, block_size=block_size)


PRESETS = [lopt.small_mlp, lopt.adafactor_mlp]
# Below 10 coordinates tensors go together, above it in slabs.
SHAPES = {"b": (3,), "conv": (3, 2, 4), "s": (), "v": (17,), "x": (1, 9)}


def trajectory(learned, theta, params, grads):
    """Returns updates and state after two steps."""
    optimizer = learned.optimizer(theta)
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    grads = jax.tree.map(lambda g: g * g - 0.3, grads)
    return optimizer.update(grads, state, params)


def example(preset, names=tuple(SHAPES)):
    theta = rule(preset, 10).init(KEY)
    theta = jax.tree.map(lambda leaf: leaf + 0.05 * normal(leaf.size, leaf.shape), theta)
    params = {name: normal(i, SHAPES[name]) for i, name in enumerate(names)}
    grads = {name: normal(10 + i, SHAPES[name]) for i, name in enumerate(names)}
    return theta, params, grads


def assert_close(ours, theirs, rtol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), ours, theirs)


@pytest.mark.parametrize("preset", PRESETS)
def test_block_size_changes_nothing(preset):
    theta, params, grads = example(preset)

    def run(block_size):
        learned = rule(preset, block_size)
        updates, state = jax.jit(lambda *a: trajectory(learned, *a))(theta, params, grads)
        # Accumulators are grouped as tensors are; the second updates depend on them.
        return updates, state.step

    assert_close(run(10), run(2**18), 1e-11)


@pytest.mark.parametrize("preset", PRESETS)
def test_block_size_changes_no_meta_gradient(preset):
    theta, params, grads = example(preset, ("b", "conv"))

    def run(block_size):
        def loss(theta, params, grads):
            updates, _ = trajectory(rule(preset, block_size), theta, params, grads)
            return sum(jnp.sum(jnp.sin(update)) for update in jax.tree.leaves(updates))

        return jax.jit(jax.grad(loss))(theta, params, grads)

    assert_close(run(10), run(2**18), 1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_block_size_changes_nothing_under_vmap(preset):
    theta, params, grads = example(preset, ("b", "conv"))
    thetas = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), theta)

    def run(block_size, theta):
        return trajectory(rule(preset, block_size), theta, params, grads)[0]

    together = jax.jit(jax.vmap(lambda theta: run(10, theta)))(thetas)
    for i in range(2):
        alone = run(2**18, jax.tree.map(lambda leaf, i=i: leaf[i], thetas))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, 1e-11)


MEMORY = """
import json, sys
import jax, jax.numpy as jnp
import lopt

def memory(field):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))

shape = tuple(json.loads(sys.argv[1]))
learned = lopt.adafactor_mlp()
theta = learned.init(jax.random.key(0))
params = jax.random.normal(jax.random.key(1), shape)
grads = jax.random.normal(jax.random.key(2), shape)
state = jax.jit(lambda theta, params: learned.optimizer(theta).init(params))(theta, params)

def update(theta, grads, state, params):
    return learned.optimizer(theta).update(grads, state, params)

compiled = jax.jit(update, donate_argnums=2).lower(theta, grads, state, params).compile()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
jax.block_until_ready((params, grads, state))
before = memory("VmRSS")
updates, state = jax.block_until_ready(compiled(theta, grads, state, params))
# The peak since the process began, with the compiler and the random numbers. (That of
# resource.getrusage would count what the parent process held when it started this one.)
peak = memory("VmHWM")
print(json.dumps({
    "state": size,
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "beyond": peak - before,
    "finite": bool(jnp.isfinite(updates).all()),
    "moved": float(jnp.abs(updates).max()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shape", [(2500, 4000), (10_000_000,)])
def test_ten_million_weights_take_less_than_a_gigabyte_beyond_their_state(shape):
    command = [sys.executable, "-c", MEMORY, json.dumps(shape)]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = json.loads(finished.stdout)
    print(measured)
    assert measured["finite"]
    assert measured["moved"] > 0
    assert measured["temporary"] < 1e9
    assert measured["beyond"] < 1e9
