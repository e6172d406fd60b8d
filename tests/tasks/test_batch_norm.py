"""Batch normalisation: statistics against plain numpy, and its way through the loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import lopt
from lopt.tasks import batch_norm_classification, image_data

KEY = jax.random.key(0)


def make_data(num=200):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, num)
    images = generator.uniform(0, 0.5, (num, 4, 4, 1)) + labels[:, None, None, None] / 4
    return image_data(images, labels, None, None, 3, 4)


def make_task(**options):
    return batch_norm_classification(make_data(), (6, 5), jnp.tanh, 16, **options)


def test_loss_and_statistics_equal_plain_numpy():
    task = make_task()
    params, batch = task.init(KEY), task.batch(KEY)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    state = jax.tree.map(lambda leaf: leaf + 0.5, task.prepare(params, KEY))
    loss, after = task.loss_and_state(params, state, batch)
    rows = np.asarray(batch.arrays.images, np.float64).reshape(16, -1)
    *hidden, last = params["network"].layers
    for i, layer in enumerate(hidden):
        rows = rows @ np.asarray(layer.weight).T + np.asarray(layer.bias)
        mean, variance = rows.mean(0), rows.var(0)
        np.testing.assert_allclose(after.mean[i], 0.9 * 0.5 + 0.1 * mean)
        np.testing.assert_allclose(after.variance[i], 0.9 * 1.5 + 0.1 * variance)
        rows = (rows - mean) / np.sqrt(variance + 1e-5)
        rows = np.tanh(rows * np.asarray(params["gain"][i]) + np.asarray(params["shift"][i]))
    rows = rows @ np.asarray(last.weight).T + np.asarray(last.bias)
    log_normaliser = np.log(np.exp(rows).sum(1))
    expected = np.mean(log_normaliser - rows[np.arange(16), batch.arrays.labels])
    np.testing.assert_allclose(loss, expected)


def test_inference_with_the_moments_of_a_batch_is_training_on_it():
    task = make_task(momentum=0.0)
    params, batch = task.init(KEY), task.everything("valid_inner")
    loss, state = task.loss_and_state(params, task.prepare(params, KEY), batch)
    images, labels = batch.arrays
    logits = task.outputs(params, state, images.reshape(len(images), -1))
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(np.mean(entropies), loss)
    np.testing.assert_allclose(task.metrics(params, state, batch)["loss"], loss)


def test_windows_count_only_what_they_show():
    task = make_task()
    params = task.init(KEY)
    state = task.prepare(params, KEY)
    part = eqx.tree_at(lambda e: (e.first, e.count), task.data.train, (jnp.int32(9), jnp.int32(20)))
    loss, after = task.loss_and_state(params, state, part.everything())
    small = lopt.tasks.Rows(jax.tree.map(lambda leaf: leaf[9:29], part.arrays))
    expected, expected_after = task.loss_and_state(params, state, small)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(after.variance[1], expected_after.variance[1], rtol=1e-5)


def test_gradient():
    task = make_task()
    params, batch = task.init(KEY), task.batch(KEY)
    state = task.prepare(params, KEY)
    loss = jax.jit(lambda params: task.loss_and_state(params, state, batch)[0])
    check_grads(loss, (params,), order=1, modes=["rev"], rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_many_particles_train_and_statistics_travel(dtype):
    task, optimizer = make_task(), optax.sgd(0.1, momentum=0.9)

    def train(key):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), task.init(key))
        state, losses = lopt.unroll(task, optimizer, lopt.start(task, optimizer, params, key), 300)
        statistics, test = state.estimator_state, task.everything("test")
        return losses, statistics, task.metrics(state.params, statistics, test)["accuracy"]

    losses, statistics, accuracy = eqx.filter_jit(jax.vmap(train))(jax.random.split(KEY, 3))
    assert losses.dtype == dtype
    assert statistics.mean[0].dtype == dtype
    assert np.all(losses[:, -1] < 0.5 * losses[:, 0])
    # Running averages lag behind the weights, so inference is good later than training is.
    assert np.all(accuracy > 0.9)
    # Running means left zero and particles differ.
    assert np.all(np.abs(statistics.mean[0]).max(1) > 0.1)
    assert not np.allclose(statistics.mean[0][0], statistics.mean[0][1])


def test_meta_gradients_flow_through_training():
    task = make_task()
    params = task.init(KEY)

    def final_loss(rate):
        optimizer = optax.sgd(rate)
        _, losses = lopt.unroll(task, optimizer, lopt.start(task, optimizer, params, KEY), 4)
        return losses[-1]

    check_grads(jax.jit(final_loss), (0.1,), order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 1}, "batch_norm_classification.*batch_size=1.*try"),
        ({"widths": ()}, "widths=.*try widths"),
        ({"widths": (3, 0)}, "width=0"),
        ({"momentum": 1.0}, "momentum=1.0.*try"),
        ({"epsilon": 0.0}, "epsilon=0.0.*try"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        batch_norm_classification(make_data(), **options)
