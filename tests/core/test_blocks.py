"""Slabs: `in_slabs` computes what the function computes, in bounded memory."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.core.tensors import in_slabs, slabs_of

KEY = jax.random.key(0)


def normal(index, shape):
    return jax.random.normal(jax.random.fold_in(KEY, index), shape)


def function(arrays, kept):
    """Elementwise in the coordinates, but for a sum; uses whatever it is given."""
    whole, leading, factored, scalar = arrays
    row, col = factored
    stack = jnp.sin(leading) * (whole + scalar)[None] + row * col
    return {"one": whole * scalar, "sum": jnp.sum(stack**2), "none": ()}, (stack + kept[0],)


@pytest.mark.parametrize(
    "shape", [(7,), (1000,), (13, 50), (50, 13), (3, 3, 16, 40), (1, 600), (24, 24)]
)
@pytest.mark.parametrize("block_size", [1, 64, 300])
def test_equals_the_function_of_everything(shape, block_size):
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
    kept = (normal(5, (2, *shape)),)
    expected = function(arrays, kept)
    cut = slabs_of(shape, block_size)
    blocked = jax.jit(lambda arrays, kept: in_slabs(function, arrays, kept, *cut))(arrays, kept)
    assert jax.tree.structure(blocked) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(blocked), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_slab_is_about_a_block_and_is_compiled_once_if_it_fits():
    assert slabs_of((13, 50), 100) == (-1, 50, 5)
    assert slabs_of((784, 800), 2**15) == (-2, 784, 28)  # contiguous slabs, all of one size
    assert slabs_of((3, 3, 64, 128), 2**13) == (-2, 64, 4)
    assert slabs_of((10_007,), 1000) == (-1, 10_007, 1000)  # a prime: the last slab is shorter
    assert slabs_of((10**6,), 2**15) == (-1, 10**6, 31250)


def test_what_is_kept_is_replaced_in_place():
    """The program allocates no second copy of a donated memory of 40 MB."""

    def update(array, memory):
        result, (memory,) = in_slabs(
            lambda array, kept: (array[0] * kept[0][0], (kept[0] + array,)),
            array,
            (memory,),
            *slabs_of((1000, 1000), 2**15),
        )
        return result, memory

    shapes = [jax.ShapeDtypeStruct((n, 1000, 1000), jnp.float32) for n in (1, 10)]
    compiled = jax.jit(update, donate_argnums=1).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5e6


def test_derivatives_are_those_of_the_function():
    arrays = normal(0, (9, 31)), normal(1, (9, 1))

    def total(block_size, forward=jnp.tanh):
        def loss(arrays):
            product, _ = in_slabs(
                lambda a, _: (forward(a[0] * a[1]), ()), arrays, (), *slabs_of((9, 31), block_size)
            )
            return jnp.sum(product**2)

        return jax.jit(jax.grad(loss))(arrays), jax.jit(jax.hessian(loss))(arrays)

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
