"""Convolutional classification: a plain reference twin, derivatives of every kind, learning."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.experiment.data.datasets import load_images
from lopt.tasks import conv_classification, image_data
from lopt.tasks.convolutional import Convolution, ConvolutionalNetwork, max_pool, pool, remaining

KEY = jax.random.key(0)


def make_data(height=6, width=6, channels=2, num_classes=3):
    generator = np.random.default_rng(0)
    images = generator.uniform(size=(40, height, width, channels))
    labels = generator.integers(0, num_classes, 40)
    return image_data(images, labels, None, None, num_classes, height)


def small(**changes):
    """Two blocks on 6x6 images: 6, 3, 1 pixels high, so that pooling leaves out a row."""
    sizes = {"channels": (3, 4), "kernel": 3, "hidden": (5,), "activation": jnp.tanh}
    return conv_classification(make_data(), **sizes | {"batch_size": 4} | changes)


def plain_convolution(image, weight, bias):
    """Pixel by pixel."""
    (height, width, _), kernel = image.shape, weight.shape[-1]
    before = (kernel - 1) // 2
    result = np.zeros((height, width, len(bias))) + bias
    for i, j, a, b in itertools.product(*map(range, (height, width, kernel, kernel))):
        row, column = i + a - before, j + b - before
        if 0 <= row < height and 0 <= column < width:
            result[i, j] += weight[:, :, a, b] @ image[row, column]
    return result


def plain_pool(image):
    height, width, channels = image.shape
    result = np.zeros((height // 2, width // 2, channels))
    for i, j in np.ndindex(*result.shape[:2]):
        result[i, j] = image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1))
    return result


def plain_logits(network, image):
    network = jax.tree.map(np.asarray, network)
    for layer in network.convolutions:
        image = np.tanh(plain_pool(plain_convolution(image, layer.weight, layer.bias)))
    row = image.ravel()
    for i, layer in enumerate(network.perceptron.layers):
        row = layer.weight @ (np.tanh(row) if i else row) + layer.bias
    return row


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_logits_equal_plain_numpy(kernel):
    task = small(kernel=kernel)
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.init(KEY))  # so that biases count
    images = task.batch(KEY).arrays.images
    expected = [plain_logits(params, np.asarray(image, np.float64)) for image in images]
    logits = eqx.filter_jit(task.outputs)(params, (), images.reshape(len(images), -1))
    np.testing.assert_allclose(logits, expected, rtol=1e-10)


def test_a_convolution_is_that_of_jax():
    keys = jax.random.split(KEY, 3)
    layer = Convolution(jax.random.normal(keys[0], (4, 3, 5, 5)), jax.random.normal(keys[1], (4,)))
    image = jax.random.normal(keys[2], (7, 6, 3))
    theirs = jax.lax.conv_general_dilated(
        image[None], layer.weight, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
    )
    np.testing.assert_allclose(layer(image), theirs[0] + layer.bias[None, None], rtol=1e-10)


def test_pixels_that_tie_share_the_derivative():
    image = jnp.array([[1.0, 3.0, 2.0], [3.0, 3.0, 9.0], [9.0, 9.0, 9.0]])[..., None]
    np.testing.assert_array_equal(max_pool(image), [[[3.0]]])
    gradient = jax.grad(lambda image: max_pool(image).sum())(image)[..., 0]
    np.testing.assert_allclose(gradient, np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 3)


def test_initial_weights():
    # Three 5x5 convolutions and 1024-100-10, as in Wu et al. 2018.
    network = ConvolutionalNetwork((32, 32, 3), (32, 32, 64), 5, (100,), 10, jax.nn.relu, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == 182_838
    layers = (*network.convolutions, *network.perceptron.layers)
    wide = ConvolutionalNetwork((32, 32, 3), (32, 32, 64), 5, (100,), 10, jax.nn.relu, KEY, 0.1)
    normal = (*wide.convolutions, *wide.perceptron.layers)
    for layer, other, fan_in in zip(layers, normal, (75, 800, 800, 1024, 100), strict=True):
        for weight, stddev, edge in [
            (layer.weight, 0.8796 / fan_in**0.5, 2 / fan_in**0.5),
            (other.weight, 0.1, 1),
        ]:
            assert abs(weight.std() - stddev) < 5 * stddev / np.sqrt(2 * weight.size)
            assert abs(weight.mean()) < 5 * stddev / np.sqrt(weight.size)
            assert jnp.abs(weight).max() <= edge
        assert jnp.abs(other.weight).max() > 0.25  # not cut at two stddevs
        assert not np.any(layer.bias)
        assert not np.any(other.bias)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu])
def test_derivatives(activation):
    task = small(activation=activation)
    params, batch = task.init(KEY), task.batch(KEY)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    direction = jax.random.normal(jax.random.key(1), flat.shape)
    gradient = jax.grad(lambda flat: task.loss(unravel(flat), batch))

    @jax.jit
    def both(flat):
        return task.loss(unravel(flat), batch), *jax.jvp(gradient, (flat,), (direction,))

    _, first, second = both(flat)
    after, before = (both(flat + step * direction) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(first @ direction, (after[0] - before[0]) / 2e-6, rtol=1e-6)
    np.testing.assert_allclose(second, (after[1] - before[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_networks_are_mapped_over_and_keep_their_dtype():
    task = small()
    params, batch = jax.vmap(task.init)(jax.random.split(KEY, 3)), task.batch(KEY)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    gradients = jax.jit(jax.vmap(jax.grad(task.loss), (0, None)))(params, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    alone = jax.jit(jax.grad(task.loss))(jax.tree.map(lambda leaf: leaf[1], params), batch)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=1e-4, atol=1e-6)
    wide = jax.tree.map(lambda leaf: leaf[0].astype(jnp.float64), params)
    assert jax.eval_shape(task.loss, wide, batch).dtype == jnp.float64


def test_training_on_digits_learns():
    task = conv_classification(load_images("digits"), (8, 16), 3, (), batch_size=64)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), task.init(KEY))
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = lopt.start(task, optimizer, params, KEY)
    state, losses = lopt.unroll(task, optimizer, state, 150)
    assert losses[-10:].mean() < 0.2 * losses[0]
    assert lopt.judge(task, state.params, (), KEY)["accuracy"] > 0.9
    # Another task of the same shape is the same program.
    again = conv_classification(load_images("digits"), (8, 16), 3, (), batch_size=64)
    assert jax.tree.structure(task) == jax.tree.structure(again)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": ()}, r"channels=\(\).*at least one.*try"),
        ({"channels": (2, 2, 2)}, "at most 2 blocks.*6 x 6.*try"),
        ({"channels": (2, 0)}, "ConvolutionalNetwork.*channels=0.*try"),
        ({"kernel": 0}, "kernel=0.*try kernel=5"),
        ({"hidden": (0,)}, "width=0"),
        ({"stddev": -0.1}, "Perceptron.*stddev=-0.1.*try"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_a_network_is_used_by_itself():
    network = ConvolutionalNetwork((4, 6, 1), (2,), 3, (), 3, jnp.tanh, KEY)
    assert eqx.filter_jit(network)(jnp.ones(24)).shape == (3,)
    assert network.perceptron.layers[0].weight.shape == (3, 2 * 3 * 2)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_strides_and_padding_are_those_of_jax(stride, padding):
    layer = Convolution(jax.random.normal(KEY, (4, 3, 3, 3)), None, stride, padding)
    image = jax.random.normal(jax.random.key(1), (7, 6, 3))
    ends = ((1, 1), (1, 1)) if padding == "SAME" else ((0, 0), (0, 0))
    theirs = jax.lax.conv_general_dilated(
        image[None], layer.weight, (stride,) * 2, ends, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )[0]
    np.testing.assert_allclose(layer(image), theirs, rtol=1e-10, atol=1e-10)
    sides = tuple(remaining(side, 3, stride, padding) for side in image.shape[:2])
    assert theirs.shape[:2] == sides


@pytest.mark.parametrize("kind", ["mean", "max", "squared_mean"])
def test_channels_are_pooled(kind):
    how = {"strides": (2, 1), "padding": ("SAME", "VALID"), "pool_all": kind, "bias": False}
    task = small(hidden=(), **how)
    params = task.init(KEY)
    assert all(layer.bias is None for layer in params.convolutions)
    image = task.batch(KEY).arrays.images[0].astype(float)
    network = small(hidden=(), **how).network
    found = network.apply(params, (), lopt.tasks.Rows(image.reshape(1, -1)), True)[0][0]
    for layer in params.convolutions:
        image = jnp.tanh(layer(image))
    assert image.shape == (1, 1, 4)
    pooled = {"mean": image, "max": image, "squared_mean": image**2}[kind][0, 0]
    last = params.perceptron.layers[0]
    np.testing.assert_allclose(found, last.weight @ pooled + last.bias, rtol=1e-6)


def test_pools_equal_plain_numpy():
    image = jax.random.normal(KEY, (3, 4, 2))
    plain = np.asarray(image)
    np.testing.assert_allclose(pool(image, "mean"), plain.mean((0, 1)))
    np.testing.assert_allclose(pool(image, "max"), plain.max((0, 1)))
    np.testing.assert_allclose(pool(image, "squared_mean"), (plain**2).mean((0, 1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strides": (1,)}, r"strides=\(1,\).*one entry for each.*try"),
        ({"strides": (1, 0)}, "strides=0"),
        ({"strides": (2, 2), "padding": ("VALID", "VALID")}, "leaves nothing.*6 x 6.*try padding"),
    ],
)
def test_bad_strides(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)
