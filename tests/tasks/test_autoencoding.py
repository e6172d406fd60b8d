"""Autoencoders: losses against plain formulas, the lower bound against its closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import quick_jit

from lopt.tasks import image_data, mlp_autoencoder, variational_autoencoder

KEY = jax.random.key(0)


def compiled(function):
    return quick_jit(lambda *arguments: function(*arguments))


def make_data(size=2):
    images = np.random.default_rng(0).uniform(size=(40, size, size, 1))
    return image_data(images, np.arange(40) % 3, None, None, 3, size)


@pytest.mark.parametrize("output", ["tanh", "sigmoid", "linear_center", "linear"])
@pytest.mark.parametrize(("distance", "reduce"), [("l2", "mean"), ("l1", "sum")])
def test_reconstruction_errors_equal_plain_numpy(output, distance, reduce):
    how = {"output": output, "distance": distance, "reduce": reduce}
    task = mlp_autoencoder(make_data(), (3,), jnp.tanh, batch_size=5, **how)
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.init(KEY))
    batch = task.batch(KEY)
    pixels = np.asarray(batch.arrays.images, np.float64).reshape(5, 4)
    pixels = 2 * pixels - 1 if output in ("tanh", "linear_center") else pixels
    first, last = jax.tree.map(np.asarray, params.layers)
    outputs = np.tanh(pixels @ first.weight.T + first.bias) @ last.weight.T + last.bias
    squash = {"tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}
    errors = np.abs(squash.get(output, lambda x: x)(outputs) - pixels)
    errors = errors**2 if distance == "l2" else errors
    expected = errors.mean() if reduce == "mean" else errors.sum(1).mean()
    np.testing.assert_allclose(compiled(task.loss)(params, batch), expected, rtol=1e-6)


def test_the_lower_bound_of_a_linear_autoencoder():
    """Its mean over draws, of latent variables and places within bins, in closed form."""
    task = variational_autoencoder(make_data(), encoder=(2,), decoder=(), batch_size=4)
    params = task.init(KEY)
    weight = params.decoder.layers[0].weight.at[4:].set(0.0)  # log sigmas of pixels are constant
    bias = params.decoder.layers[0].bias + jnp.array([0.1, 0.2, 0.3, 0.4, -1.0, -0.5, 0.0, -2.0])
    where = lambda network: (network.decoder.layers[0].weight, network.decoder.layers[0].bias)  # noqa: E731
    params = eqx.tree_at(where, params, (weight, bias))
    batch = task.batch(KEY)
    keys = jax.random.split(KEY, 20_000)
    measure = quick_jit(
        jax.vmap(lambda key: task.metrics(params, (), eqx.tree_at(lambda b: b.key, batch, key)))
    )
    found = measure(keys)

    x = np.asarray(batch.arrays.images, np.float64).reshape(4, 4)
    encoder = params.encoder.layers[0]
    mean, log_sigma = np.split(x @ np.asarray(encoder.weight).T + np.asarray(encoder.bias), 2, 1)
    slopes, offset, scale = np.asarray(weight)[:4], np.asarray(bias)[:4], np.asarray(bias)[4:]
    misfit = (x - mean @ slopes.T - offset) ** 2 + np.exp(2 * log_sigma) @ (slopes**2).T
    misfit += 1 / 255**2 / 12  # the variance of a place within its bin
    expected = -misfit / 2 / np.exp(2 * scale) - scale - np.log(2 * np.pi) / 2 - np.log(255)
    kl = (np.exp(2 * log_sigma) + mean**2 - 1) / 2 - log_sigma
    np.testing.assert_allclose(found["kl"], kl.sum(1).mean(), rtol=1e-6)
    likelihood = np.asarray(found["log_likelihood"])
    error = likelihood.std() / np.sqrt(len(keys))
    assert abs(likelihood.mean() - expected.sum(1).mean()) < 4 * error
    np.testing.assert_allclose(found["loss"], found["kl"] - likelihood)


def test_what_is_random_is_in_the_batch():
    task = variational_autoencoder(make_data(), (3, 2), (3,), batch_size=4)
    params, loss = task.init(KEY), compiled(task.loss)
    batch, other = task.batch(KEY), task.batch(KEY)
    assert loss(params, batch) == loss(params, other)
    other = eqx.tree_at(lambda batch: batch.key, batch, jax.random.key(9))
    assert loss(params, batch) != loss(params, other)
    whole = task.everything("test")
    assert loss(params, whole) == loss(params, task.everything("test"))


def test_clipping_keeps_losses_finite():
    for clip in (True, False):
        task = variational_autoencoder(make_data(), (2,), (), batch_size=4, clip=clip)
        params = jax.tree.map(lambda leaf: 1e4 * (leaf + 1), task.init(KEY))
        assert bool(jnp.isfinite(compiled(task.loss)(params, task.batch(KEY)))) == clip


def test_bad_input():
    with pytest.raises(ValueError, match=r"encoder=\(\).*try encoder=\(128, 32\)"):
        variational_autoencoder(make_data(), encoder=())
    with pytest.raises(ValueError, match="width=0"):
        mlp_autoencoder(make_data(), (0,))
