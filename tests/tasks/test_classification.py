"""Classification: initial statistics, losses against plain formulas, gradients, any network."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import lopt
from lopt.tasks import MultilayerPerceptron, classification, image_data, mlp_classification

KEY = jax.random.key(0)


def make_data(num=200, size=8, num_classes=10):
    """Noise, with a bright pixel that tells the class."""
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 0.5, (num, size, size, 1))
    labels = generator.integers(0, num_classes, num)
    images[np.arange(num), labels % size, labels // size, 0] = 1
    return image_data(images, labels, None, None, num_classes, size)


def test_initial_weights_have_the_published_statistics():
    # 64-32-10 over 64 keys: standard deviations 0.1102 and 0.1561, cut at 2 / sqrt(fan in).
    task = mlp_classification(make_data())
    params = jax.vmap(task.init)(jax.random.split(KEY, 64))
    for layer, fan_in, stddev in zip(params.layers, (64, 32), (0.1102, 0.1561), strict=True):
        weights = np.asarray(layer.weight)
        error = stddev / np.sqrt(2 * weights.size)
        assert abs(weights.std() - stddev) < 5 * error + 1e-4
        assert abs(weights.mean()) < 5 * stddev / np.sqrt(weights.size)
        assert 0.99 * 2 / fan_in**0.5 < np.abs(weights).max() <= 2 / fan_in**0.5
        assert not np.any(layer.bias)
    # Layers are different parts of the draw.
    first, second = (np.asarray(layer.weight).ravel() for layer in params.layers)
    assert abs(np.corrcoef(first[: second.size], second)[0, 1]) < 5 / np.sqrt(second.size)


def test_initial_weights_of_one_deviation():
    # 784-100-100-10 from N(0, 0.05), as in Wu et al. 2018 (arXiv:1803.02021).
    task = mlp_classification(make_data(20, 28), (100, 100), stddev=0.05)
    for layer in task.init(KEY).layers:
        error = 0.05 / np.sqrt(2 * layer.weight.size)
        assert abs(layer.weight.std() - 0.05) < 5 * error
        assert jnp.abs(layer.weight).max() > 0.12
        assert not np.any(layer.bias)


@pytest.mark.parametrize("normalised", [False, True])
def test_uniform_initial_weights_are_those_of_pytorch(normalised):
    """Between -1 and 1 over sqrt(fan in), of a third of its square as variance; biases too."""
    task = mlp_classification(make_data(), (20,), init="torch")
    if normalised:
        task = lopt.tasks.batch_norm_classification(make_data(), (20,), init="torch")
    params = jax.vmap(task.init)(jax.random.split(KEY, 64))
    layers = (params["network"] if normalised else params).layers
    for layer, fan_in in zip(layers, (64, 20), strict=True):
        for values in map(np.asarray, (layer.weight, layer.bias)):
            assert 0.97 / fan_in**0.5 < np.abs(values).max() <= 1 / fan_in**0.5
            # The fourth moment of a uniform on -1 to 1 is 1/5.
            error = np.sqrt((1 / 5 - 1 / 9) / values.size) / fan_in
            assert abs(np.mean(values**2) - 1 / (3 * fan_in)) < 4 * error


def test_initial_weights_are_not_both_uniform_and_normal():
    with pytest.raises(ValueError, match=r"stddev=0.1\) needs.*try stddev=None"):
        mlp_classification(make_data(), stddev=0.1, init="torch")
    for task in (mlp_classification, lopt.tasks.batch_norm_classification):
        with pytest.raises((ValueError, TypeError), match="init"):
            task(make_data(), init="no")


def test_loss_and_accuracy_equal_plain_numpy():
    task = mlp_classification(make_data(), widths=(7, 5), activation=jnp.tanh, batch_size=6)
    params, batch = task.init(KEY), task.batch(KEY)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # so that biases count
    rows = np.asarray(batch.arrays.images, np.float64).reshape(6, -1)
    for i, layer in enumerate(params.layers):
        rows = (np.tanh(rows) if i else rows) @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    probabilities = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    loss = -np.mean(np.log(probabilities[np.arange(6), batch.arrays.labels]))
    np.testing.assert_allclose(task.loss(params, batch), loss, rtol=1e-6)
    accuracy = np.mean(rows.argmax(1) == np.asarray(batch.arrays.labels))
    np.testing.assert_allclose(task.metrics(params, (), batch)["accuracy"], accuracy)


@pytest.mark.parametrize("widths", [(), (4,), (5, 4)])
def test_gradient(widths):
    task = mlp_classification(make_data(), widths, activation=jnp.tanh, batch_size=8)
    params, batch = task.init(KEY), task.batch(KEY)
    assert len(params.layers) == len(widths) + 1
    check_grads(
        jax.jit(lambda p: task.loss(p, batch)), (params,), order=1, modes=["rev"], rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_loss_has_the_dtype_of_the_parameters(dtype):
    task = mlp_classification(make_data(), batch_size=8)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), task.init(KEY))
    for batch in (task.batch(KEY, "test"), task.everything("valid_inner")):
        assert task.loss(params, batch).dtype == dtype
        assert task.metrics(params, (), batch)["accuracy"].dtype == dtype


def test_training_learns_and_does_not_compile_again():
    task, optimizer = mlp_classification(make_data(), batch_size=64), optax.sgd(0.1, momentum=0.9)
    state = lopt.start(task, optimizer, task.init(KEY), KEY)
    state, losses = lopt.unroll(task, optimizer, state, 150)
    assert losses[-1] < 0.3 * losses[0]
    assert lopt.judge(task, state.params, (), KEY)["accuracy"] > 0.5
    # Another task of the same shape is the same program.
    assert jax.tree.structure(task) == jax.tree.structure(
        mlp_classification(make_data(), batch_size=64)
    )


class Listed(eqx.Module):
    """A network as users write them: with a list, and with functions among its fields."""

    parts: list

    def __init__(self, key):
        self.parts = [eqx.nn.Linear(64, 10, key=key), jnp.tanh]

    def __call__(self, image):
        return self.parts[1](self.parts[0](image))


def test_any_network_can_be_trained():
    task, optimizer = classification(make_data(), Listed, 16), optax.sgd(0.1)
    state = lopt.start(task, optimizer, task.init(KEY), KEY)
    _, losses = lopt.unroll(task, optimizer, state, 2)
    assert np.all(np.isfinite(losses))


def with_integers(key):
    return eqx.tree_at(lambda n: n.parts[1], Listed(key), jnp.arange(3))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: mlp_classification(make_data(), batch_size=0), "NetworkTask.*batch_size=0"),
        (lambda: mlp_classification(make_data(), widths=(8, 0)), "Perceptron.*width=0.*try"),
        (lambda: classification(make_data(num_classes=3), Listed), "shape .10,.*3 classes"),
        (lambda: classification(make_data(), with_integers), "dtype int.*floating-point"),
        (lambda: mlp_classification(make_data(), stddev=-1.0), "Perceptron.*stddev=-1.*try"),
        (lambda: MultilayerPerceptron(0, (), 3, jnp.tanh, KEY), "inputs=0"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ---------------------------------------------------------------------------------------------
# Dropout, layer norm, initialisers
# ---------------------------------------------------------------------------------------------


def test_dropout_is_random_by_the_batch_and_in_training_only():
    task = mlp_classification(make_data(), (400,), batch_size=6, dropout=0.25)
    plain = mlp_classification(make_data(), (400,), batch_size=6)
    params, batch = task.init(KEY), task.batch(KEY)
    np.testing.assert_array_equal(batch.arrays.labels, plain.batch(KEY).arrays.labels)
    loss = jax.jit(lambda params, batch: task.loss(params, batch))
    assert loss(params, batch) == loss(params, task.batch(KEY))
    other = eqx.tree_at(lambda batch: batch.key, batch, jax.random.key(5))
    assert loss(params, batch) != loss(params, other)
    # In inference no unit is dropped; `plain` has parameters of the same shapes.
    alike = jax.tree.unflatten(jax.tree.structure(plain.init(KEY)), jax.tree.leaves(params))
    found, expected = task.metrics(params, (), batch), plain.metrics(alike, (), batch)
    np.testing.assert_allclose(found["loss"], expected["loss"])


def test_dropout_keeps_the_mean_of_units():
    network = MultilayerPerceptron(1, (4000,), 1, lambda x: 1 + 0 * x, KEY, dropout=0.25)
    summing = eqx.tree_at(lambda n: n.layers[-1].weight, network, jnp.full((1, 4000), 1 / 4000))
    found = summing(jnp.ones(1), key=KEY)[0]
    assert abs(found - 1) < 4 * (0.25 / 0.75 / 4000) ** 0.5
    assert found != 1
    np.testing.assert_allclose(summing(jnp.ones(1))[0], 1)


def test_layer_norm_equals_plain_numpy():
    network = MultilayerPerceptron(3, (5,), 2, jnp.tanh, KEY, layer_norm=True)
    network = jax.tree.map(lambda leaf: leaf + 0.1, network)
    x, (first, last) = np.array([0.5, -1.0, 2.0]), network.layers
    z = np.asarray(first.weight) @ x + np.asarray(first.bias)
    z = 1.1 * (z - z.mean()) / np.sqrt(z.var() + 1e-5) + 0.1
    expected = np.asarray(last.weight) @ np.tanh(z) + np.asarray(last.bias)
    np.testing.assert_allclose(network(jnp.asarray(x)), expected)


def test_a_function_draws_initial_weights():
    shapes = []

    def init(key, shape):
        shapes.append(shape)
        return jnp.full(shape, len(shapes) + 0.0)

    network = MultilayerPerceptron(3, (5,), 2, jnp.tanh, KEY, init=init)
    assert shapes == [(5, 3), (2, 5)]
    assert [float(layer.weight[0, 0]) for layer in network.layers] == [1, 2]


def test_pixels_are_centred():
    task, data = mlp_classification(make_data(), (5,), batch_size=6, centre=True), make_data()
    plain = mlp_classification(data, (5,), batch_size=6)
    params, batch = task.init(KEY), task.batch(KEY)
    shifted = eqx.tree_at(lambda b: b.arrays.images, batch, 2 * batch.arrays.images - 1)
    np.testing.assert_allclose(task.loss(params, batch), plain.loss(params, shifted))


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match=r"dropout=.*try 0\.5"):
        mlp_classification(make_data(), dropout=dropout)
