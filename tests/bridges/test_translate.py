"""JAX functions as source in the words of PyTorch and of jax.numpy, against JAX."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.export import symbolic_shape

import lopt
from lopt.bridges import translate
from lopt.bridges.operations import JAX, TORCH
from lopt.bridges.trace import LARGEST_CONSTANT

torch = pytest.importorskip("torch")
KEY = jax.random.key(0)


def in_torch(function, *arguments):
    """Returns what the translation of a function returns, as a list of NumPy's arrays."""
    program, _ = translate(function, *arguments)
    constants = [torch.tensor(array) for array in program.constants]
    inputs = [torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(arguments)]
    found = program.function(torch=torch, math=math)(constants, inputs)
    return [tensor.numpy() for tensor in found]


def agree(function, *arguments, rtol=1e-12):
    ours, theirs = in_torch(function, *arguments), jax.tree.leaves(function(*arguments))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14)


X = jax.random.normal(KEY, (5, 4))
FUNCTIONS = {
    "elementary": lambda x: [f(x) for f in (jnp.tanh, jnp.exp, jnp.sin, jnp.cosh, jnp.log1p)],
    "roots": lambda x: (jnp.sqrt(jnp.abs(x)), jax.lax.rsqrt(x * x), jnp.abs(x) ** 0.3, x**-3),
    "errors": lambda x: (jax.lax.erf(x), jax.lax.erfc(x), jax.nn.sigmoid(x)),
    "bounds": lambda x: (jnp.clip(x, -0.5, 0.5), jnp.maximum(x, x[:1]), jax.nn.relu(x)),
    "choices": lambda x: (
        jnp.where(x > 0, x, -1.0),
        jnp.where(x[0] > 9, 1.0, 2.0),
        jnp.sign(jnp.log(x)),
    ),
    "reductions": lambda x: (x.sum(1), x.max(0), jnp.mean(x), jnp.all(x > 0)),
    "shapes": lambda x: (x.T, x[1:3, ::2], x.reshape(2, 10), jnp.stack([x, x]), x[:, None]),
    "products": lambda x: (x @ x.T, jnp.einsum("ij,kj->ki", x, x), jnp.stack([x, x]) @ x.T),
    "rows": lambda x: (x[jnp.asarray([3, 0, 3])], x[2], jnp.split(x, [1, 3], axis=1)),
    "integers": lambda x: (
        x.astype(jnp.int32) + 1,
        0.9 ** jnp.asarray(3),
        jnp.arange(x.size) * 2 + x.astype(int).ravel(),
    ),
    "averages": lambda x: (x + 0.1 * (x[:1] - x), 0.1 * (x - x[:1]) + x[:1], x - 0.2 * (x - 1.0)),
    "own memory": lambda x: (jnp.exp(-(x * x)) + x, (x + 1) * (x + 1) - (x + 1)),
    "remainders": lambda x: (jnp.fmod(x, 0.3), jnp.round(10 * x), jnp.power(-1.0, 3 * jnp.sign(x))),
    "sums": lambda x: (jnp.cumsum(x, 1), jnp.cumprod(x, 0), (x > 0).astype(jnp.int32).sum()),
    "whole numbers": lambda x: (lambda i: i + 3 * (i[:1] - i))(x.astype(jnp.int32)),
    "slices": lambda x: jax.lax.dynamic_slice_in_dim(x, 4, 3),
    "branches": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "map": lambda x: jax.lax.map(lambda row: row @ x.T, x),
    "scan": lambda x: jax.lax.scan(lambda c, r: (c * r + 1.0, c.sum()), x[0], x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_primitives(name):
    agree(FUNCTIONS[name], X)
    # Many numbers are worked on in place.
    agree(FUNCTIONS[name], jnp.tile(X, (20, 60))) if name not in ("shapes", "roots") else None


def test_a_loop_over_slabs_writes_them_in_place():
    rows = jax.random.normal(KEY, (12, 3))

    def put(total, first):
        part = jax.lax.dynamic_slice_in_dim(rows, first, 4) ** 2 + total[:1]
        return jax.lax.dynamic_update_slice_in_dim(total, part, first, 0), None

    agree(lambda x: (jax.lax.scan(put, x, jnp.arange(3) * 4)[0], x), jnp.ones((12, 3)))


def test_slabs_are_as_wide_as_asked_also_where_others_were_before():
    """JAX remembers what it has traced; it must not remember it for other slabs."""
    rule = lopt.adafactor_mlp()
    optimizer = rule.optimizer(rule.init(KEY))
    params = {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    loops = [
        translate(optimizer.update, params, state, params, slabs=slabs)[0].source.count("for ")
        for slabs in (1.0, 128.0, 1.0)
    ]
    assert loops[0] == loops[2] > loops[1] == 0


def test_a_part_is_written_into_a_copy_of_what_is_still_read():
    def function(x):
        first = jax.lax.dynamic_update_slice_in_dim(x, x[:2] * 9, 0, 0)
        return first, jax.lax.dynamic_update_slice_in_dim(first, x[:2] * 7, 3, 0), x

    agree(function, X)


def test_what_a_loop_goes_over_is_computed_once():
    def function(x):
        y = jnp.tanh(x) * 2
        a = jnp.sum(y * y * y, 0) / (1 + jnp.sum(y * y, 0))
        return jax.lax.scan(lambda c, row: (c + row * a, row.sum()), x[0], jnp.exp(y))

    agree(function, jnp.tile(X, (1, 1024)))


def test_what_depends_on_no_input_is_computed_once():
    table = jnp.linspace(0.0, 1.0, 50)
    program, _ = translate(lambda x: x * jnp.exp(jnp.sin(table)).sum() + jnp.eye(50)[0, 1], X)
    assert len(program.source.splitlines()) == 3
    assert not program.constants
    big = LARGEST_CONSTANT + 1
    program, _ = translate(lambda x: x + jnp.ones(big) * jnp.arange(1.0 * big), jnp.ones(big))
    assert sum(array.size for array in program.constants) <= big + 1


def test_no_result_is_an_input():
    x = torch.ones(3)
    program, _ = translate(lambda x, y: (y, x[None], x + y), jnp.ones(3), jnp.ones(3))
    y, row, _ = program.function(torch=torch, math=math)([], [x, 2 * x])
    x.zero_()
    assert y.tolist() == [2.0] * 3
    assert row.tolist() == [[1.0] * 3]


def test_numbers_are_those_of_their_precision():
    largest = float(jnp.finfo(jnp.float32).max)
    agree(lambda x: jnp.where(x > 0, x, -largest), X.astype(jnp.float32))
    half = X.astype(jnp.bfloat16)
    program, _ = translate(lambda x: x * jnp.asarray([0.1, 0.2], jnp.bfloat16).sum(), half)
    assert "0.30" in program.source


def test_inputs_that_are_not_read_are_known():
    assert translate(lambda x, y, z: x + z, 1.0, 2.0, 3.0)[0].reads == [True, False, True]


def test_sizes_may_be_unknown():
    a, b = symbolic_shape("a, b", constraints=["a*b <= 1024"])
    shape = jax.ShapeDtypeStruct((a, b), jnp.float64)

    def function(x):
        return x / jnp.mean(x * x, axis=1, keepdims=True) + jnp.zeros_like(x).sum()

    for language, names in ((TORCH, {"torch": torch}), (JAX, {"jnp": jnp, "jax": jax})):
        program, _ = translate(function, shape, language=language)
        run = program.function(math=math, a=3, b=7, **names)
        constants = [torch.tensor(c) if language is TORCH else c for c in program.constants]
        x = np.arange(21.0).reshape(3, 7)
        given = torch.tensor(x) if language is TORCH else x
        np.testing.assert_allclose(np.asarray(run(constants, [given])[0]), function(x), rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "contrib.muon", "lion", "adafactor", "rmsprop"])
@pytest.mark.standard_promotion
def test_optimizers_of_optax(name):
    maker = optax.contrib.muon if name == "contrib.muon" else getattr(optax, name)
    optimizer = maker(0.01)
    params = {"w": X, "b": X[0]}
    state = optimizer.init(params)
    for _ in range(3):
        step = optimizer.update(params, state, params)
        ours = in_torch(optimizer.update, params, state, params)
        for a, b in zip(ours, jax.tree.leaves(step), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
        _, state = step


def test_a_primitive_without_a_translation_is_named():
    with pytest.raises(NotImplementedError, match="The primitive 'sort' of JAX"):
        translate(jnp.sort, X)


def test_source_is_the_same_every_time():
    learned = lopt.small_mlp()
    theta = learned.init(KEY)
    made = learned.optimizer(theta)
    arguments = X, made.init(X), X
    first, second = (translate(made.update, *arguments)[0].source for _ in range(2))
    assert first == second
