"""The detector: missing ranks are exact integers, and named symmetries explain them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import Inputs, cross_entropy, double, normalised, perceptron

from lopt.analysis.symmetry import (
    ModelLoss,
    bias_exchange,
    bias_shift,
    early_translation,
    missing_ranks,
    mixing,
    rescale,
    scale,
    translation,
)

W1, B1, W2, B2, W3, B3 = (f".layers[{i}].{name}" for i in range(3) for name in ("weight", "bias"))
SMOOTH = {"translation": 4}
HOMOGENEOUS = SMOOTH | {"rescale": 3}


def one_hidden(params, degree=1.0):
    return [translation(params, W2, B2), rescale(params, (W1, B1), W2, degree=degree)]


def two_hidden(params):
    pairs = (((W1, B1), W2), ((W2, B2), W3))
    return [translation(params, W3, B3), *(rescale(params, *pair) for pair in pairs)]


def with_norm(params):
    return [
        translation(params, W2, B2),
        scale(params, W1, B1),
        bias_shift(params, B1),
        rescale(params, (".gain", ".shift"), W2, kind="norm rescale"),
    ]


def affine(params):
    return [
        *one_hidden(params),
        mixing(params, (W1, B1), W2),
        bias_exchange(params, B1, W2, B2),
        early_translation(params, W1, W2),
    ]


CASES = {
    "sigmoid": (lambda: perceptron(jax.nn.sigmoid), one_hidden, (27, 23, 4), SMOOTH),
    "gelu": (lambda: perceptron(jax.nn.gelu), one_hidden, (27, 23, 4), SMOOTH),
    "relu": (lambda: perceptron(jax.nn.relu), one_hidden, (27, 20, 7), HOMOGENEOUS),
    "leaky": (lambda: perceptron(jax.nn.leaky_relu), one_hidden, (27, 20, 7), HOMOGENEOUS),
    "squared": (
        lambda: perceptron(lambda z: jax.nn.relu(z) ** 2),
        lambda params: one_hidden(params, 2.0),
        (27, 20, 7),
        HOMOGENEOUS,
    ),
    "two hidden": (
        lambda: perceptron(jax.nn.leaky_relu, 2, seed=11),
        two_hidden,
        (39, 29, 10),
        SMOOTH | {"rescale": 6},
    ),
    "batch norm": (
        lambda: normalised(0.0),
        with_norm,
        (33, 20, 13),
        SMOOTH | {"scale": 3, "bias shift": 3, "norm rescale": 3},
    ),
    "linear": (
        lambda: perceptron(lambda z: z),
        affine,
        (27, 10, 17),
        HOMOGENEOUS | {"mixing": 6, "bias exchange": 3, "early translation": 1},
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("gelu", "leaky") else name
        for name in CASES
    ],
)
def test_missing_ranks_are_exact(name):
    build, generators, expected, kinds = CASES[name]
    task = build()
    key = jax.random.key(1)
    found = missing_ranks(task, key, generators(task.init(key)))
    assert (found.size, found.rank, found.nullity) == expected
    assert found.unexplained == 0
    assert found.gap[0] > 1e-4
    assert found.gap[1] < 1e-14
    assert {kind: n for kind, n in found.added_by_kind().items() if n} == kinds


@pytest.mark.parametrize("name", ["sigmoid", "relu", "linear"])
def test_ranks_in_single_precision(name):
    build, generators, expected, kinds = CASES[name]
    key, inputs = jax.random.key(1), Inputs((4,), dtype=jnp.float32)
    task = ModelLoss(double(build().model, jnp.float32), cross_entropy, inputs)
    params = task.init(key)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    found = missing_ranks(task, key, generators(params))
    assert (found.size, found.rank, found.nullity, found.unexplained) == (*expected, 0)
    assert {kind: n for kind, n in found.added_by_kind().items() if n} == kinds


def test_what_is_not_named_is_counted_and_what_is_wrong_explains_nothing():
    task, key = perceptron(jax.nn.relu), jax.random.key(1)
    params = task.init(key)
    wrong = scale(params, W1, B1)
    found = missing_ranks(task, key, [translation(params, W2, B2), wrong], batches=60)
    assert found.unexplained == 3
    assert found.shares[1].added == 0
    assert found.shares[1].outside > 1e-2
    np.testing.assert_allclose(found.directions @ found.directions.T, np.eye(7), atol=1e-12)


def test_too_few_batches_are_refused():
    task = perceptron(jax.nn.relu)
    with pytest.raises(ValueError, match=r"batches=20.*params, 27.*try batches=54"):
        missing_ranks(task, jax.random.key(0), batches=20)
