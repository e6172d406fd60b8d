"""Networks of every kind, on data of every kind."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.tasks import (
    AbstractNetwork,
    Build,
    EquinoxNetwork,
    InitApply,
    NetworkTask,
    Rows,
    array_data,
)

KEY = jax.random.key(0)


def make_data(num=100, dtype=np.float64):
    x = np.random.default_rng(0).normal(size=(num, 3)).astype(dtype)
    return array_data({"x": x, "y": x @ np.array([[1.0], [-2.0], [0.5]], dtype)})


def squared_error(predict, rows):
    return {"loss": rows.mean(jnp.sum((predict(rows.arrays["x"]) - rows.arrays["y"]) ** 2, axis=1))}


LINEAR = Build(eqx.nn.Linear, 3, 1, use_bias=False)
PAIR = InitApply(
    lambda key: eqx.nn.Linear(3, 1, use_bias=False, key=key).weight, lambda weight, x: x @ weight.T
)


def train(task, steps=200, rate=0.1):
    optimizer = optax.sgd(rate)
    return lopt.unroll(task, optimizer, lopt.start(task, optimizer, task.init(KEY), KEY), steps)


def test_equinox_and_a_pair_of_functions_are_the_same_network():
    one, other = (
        NetworkTask(make_data(), network, squared_error, 16) for network in (LINEAR, PAIR)
    )
    (state, losses), (_, others) = train(one), train(other)
    np.testing.assert_allclose(losses, others, rtol=1e-6, atol=1e-12)
    assert losses[-1] < 1e-5 * losses[0]
    whole = lopt.judge(one, state.params, (), KEY)
    test = one.data.test.arrays
    found = one.outputs(state.params, (), test["x"])
    np.testing.assert_allclose(whole["loss"], np.mean((found - test["y"]) ** 2), rtol=1e-9)


@pytest.mark.standard_promotion
def test_flax():
    linen = pytest.importorskip("flax.linen")
    network, example = linen.Dense(1), jnp.zeros((1, 3))
    pair = InitApply(lambda key: network.init(key, example), network.apply)
    _, losses = train(NetworkTask(make_data(), pair, squared_error, 16))
    assert losses[-1] < 1e-5 * losses[0]


class Counting(AbstractNetwork):
    """A linear map that counts its batches, and adds up weights of rows."""

    def init(self, key):
        return jnp.ones((3, 1))

    def prepare(self, params):
        return jnp.zeros(())

    def apply(self, params, state, inputs, inference):
        return inputs.arrays @ params, state + (0 if inference else 1)


def test_a_network_with_a_state():
    def twice(predict, rows):
        difference = predict(rows.arrays["x"]) - predict(-rows.arrays["x"])
        return {"loss": rows.mean(difference[:, 0] ** 2)}

    task = NetworkTask(make_data(), Counting(), twice, 16)
    state, _ = train(task, 5, 0.0)
    assert state.estimator_state == 10  # two batches a step
    np.testing.assert_allclose(
        task.metrics(state.params, state.estimator_state, task.everything("test"))["loss"],
        task.loss(state.params, task.everything("test")),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inputs_are_taken_in_the_dtype_of_the_parameters(dtype):
    def objective(predict, rows):
        outputs = predict(rows.arrays["x"])
        assert outputs.dtype == dtype
        return {"loss": rows.mean(jnp.sum(outputs**2, axis=1))}

    network = InitApply(lambda key: jnp.ones((3, 1), dtype), lambda weight, x: x @ weight)
    task = NetworkTask(make_data(), network, objective, 4)
    assert task.loss(task.init(KEY), task.batch(KEY)).dtype == dtype


def test_integers_are_left_as_they_are():
    text = np.arange(200).reshape(50, 4) % 7
    network = InitApply(lambda key: jax.random.normal(key, (7, 7)), lambda table, x: table[x])

    def next_one(predict, rows):
        logits, targets = predict(rows.arrays[:, :-1]), jax.nn.one_hot(rows.arrays[:, 1:], 7)
        losses = optax.softmax_cross_entropy(logits, targets)
        return {"loss": rows.mean(losses.mean(axis=1))}

    _, losses = train(NetworkTask(array_data(text), network, next_one, 16), 100, 5.0)
    assert losses[-1] < 0.1 * losses[0]


def test_builders_compare_equal():
    assert Build(eqx.nn.MLP, 3, 1, 4, depth=1, width_size=2) == Build(
        eqx.nn.MLP, 3, 1, 4, width_size=2, depth=1
    )
    assert Build(eqx.nn.Linear, 3, 1) != LINEAR
    assert hash(LINEAR) == hash(Build(eqx.nn.Linear, 3, 1, use_bias=False))
    tasks = [NetworkTask(make_data(), Build(eqx.nn.Linear, 3, 1), squared_error) for _ in "ab"]
    assert jax.tree.structure(tasks[0]) == jax.tree.structure(tasks[1])


def test_augmentation_of_training_batches_alone():
    def negated(key, example):
        return {"x": -example["x"], "y": example["y"]}

    task = NetworkTask(make_data(), LINEAR, squared_error, 8, negated)
    rows = task.batch(KEY)
    weights = np.array([[1.0], [-2.0], [0.5]])
    np.testing.assert_allclose(-rows.arrays["x"] @ weights, rows.arrays["y"])
    valid = task.batch(KEY, "valid_inner")
    np.testing.assert_allclose(valid.arrays["x"] @ weights, valid.arrays["y"])


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda predict, rows: {"error": jnp.zeros(())}, "'error'.*try {\"loss\""),
        (lambda predict, rows: jnp.zeros(()), "must be a dict"),
        (lambda predict, rows: {"loss": jnp.zeros(3)}, "scalar"),
        (lambda predict, rows: {"loss": jnp.zeros((), int)}, "floating-point scalar"),
    ],
)
def test_objectives_without_a_loss_are_refused(objective, words):
    with pytest.raises(ValueError, match=r"NetworkTask\(objective=.*" + words):
        NetworkTask(make_data(), LINEAR, objective)


def test_weights_of_a_window_count():
    data = make_data()
    part = lopt.tasks.Examples(data.train.arrays, 5, 7)
    weighted, plain = part.everything(), Rows({k: v[5:12] for k, v in part.arrays.items()})
    task = NetworkTask(data, LINEAR, squared_error)
    params = task.init(KEY)
    np.testing.assert_allclose(task.loss(params, weighted), task.loss(params, plain))


def test_a_network_with_integers_is_refused():
    def with_integers(key):
        return eqx.tree_at(lambda n: n.weight, LINEAR(key), jnp.ones((1, 3), int))

    with pytest.raises(ValueError, match=r"EquinoxNetwork.*dtype int.*try"):
        EquinoxNetwork(with_integers)
