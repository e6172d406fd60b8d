"""Tail indices of stable noise are those it was drawn with; covariances are those of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import (
    covariance_spectrum,
    flatten_samples,
    noise_of,
    noise_samples,
    tail_index,
)


def stable(alpha, shape, seed=0):
    """Symmetric stable values (Chambers, Mallows and Stuck 1976)."""
    generator = np.random.default_rng(seed)
    angle = generator.uniform(-np.pi / 2, np.pi / 2, shape)
    wait = generator.exponential(size=shape)
    curve = np.sin(alpha * angle) / np.cos(angle) ** (1 / alpha)
    return curve * (np.cos((1 - alpha) * angle) / wait) ** ((1 - alpha) / alpha)


@pytest.mark.parametrize("grouping", ["values", "samples"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_the_index_of_stable_noise_is_found(alpha, grouping):
    # The logarithm of a stable variable deviates by pi / sqrt(6) (1 / alpha^2 + 1 / 2)^(1 / 2).
    noise = stable(alpha, (64, 40_000))
    sums = noise.size / 1600 if grouping == "values" else noise.size / 8
    size = 1600 if grouping == "values" else 8
    deviation = np.pi / 6**0.5 * (1 / alpha**2 + 0.5) ** 0.5 / sums**0.5 / np.log(size)
    found = tail_index(noise, grouping)
    assert abs(1 / found - 1 / alpha) < 5 * deviation + 1e-9


def test_gauss_and_cauchy_from_another_source():
    generator = np.random.default_rng(1)
    assert abs(tail_index(generator.normal(size=(100, 20_000))) - 2) < 0.1
    assert abs(tail_index(generator.standard_cauchy((100, 20_000))) - 1) < 0.05


def test_the_index_does_not_depend_on_the_scale_and_of_equal_values_is_one():
    noise = stable(1.5, (64, 300))
    np.testing.assert_allclose(tail_index(1e-7 * noise), tail_index(noise), rtol=1e-12)
    np.testing.assert_allclose(tail_index(np.full((64, 4), 3.0)), 1.0, rtol=1e-12)


def test_samples_alone_need_to_be_independent():
    # Coordinates that are copies: sums over samples do not mind, those over values do.
    noise = np.repeat(np.random.default_rng(0).normal(size=(64, 2_000)), 50, axis=1)
    assert abs(tail_index(noise, "samples") - 2) < 0.1
    assert tail_index(noise, "values") < 1.6


def test_coordinates_without_noise_make_the_published_index_fall():
    noise = np.random.default_rng(0).normal(size=(64, 1_000))
    noise[:, ::2] = 0
    # The published code counts each with the logarithm of 2.2e-16, in X but not in Y.
    floored = tail_index(noise, floor=np.spacing(1.0))
    expected = np.log(250) / (0.5 * np.log(125) + 0.5 * 36)
    assert floored < 0.5
    np.testing.assert_allclose(floored, expected, rtol=0.05)
    assert abs(noise_of(noise).tail_index - 2) < 0.3
    assert noise_of(noise).silent == 500


def test_covariance_is_that_of_numpy():
    samples = np.random.default_rng(0).normal(size=(30, 8)) @ np.diag(np.arange(1.0, 9.0))
    covariance = np.cov(samples.T)
    found = noise_of({"a": samples[:, :3], "b": samples[:, 3:].reshape(30, 5, 1)})
    np.testing.assert_allclose(found.trace, np.trace(covariance), rtol=1e-10)
    np.testing.assert_allclose(found.top_eigenvalue, np.linalg.eigvalsh(covariance)[-1], rtol=1e-10)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(samples.mean(0)), rtol=1e-10)
    spectrum = covariance_spectrum(samples)
    np.testing.assert_allclose(spectrum, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-9)
    # Fewer samples than coordinates: a matrix of samples has the same eigenvalues.
    few = covariance_spectrum(samples[:5])
    np.testing.assert_allclose(few[:4], np.linalg.eigvalsh(np.cov(samples[:5].T))[::-1][:4])
    np.testing.assert_allclose(few[4:], 0, atol=1e-9)


def checkpoint(task, optimizer, key, steps=7):
    state = lopt.start(task, optimizer, task.init(key), key)
    return lopt.unroll(task, optimizer, state, steps)[0]


def test_gradient_noise_of_a_quadratic_is_its_curvature_times_that_of_its_centre(key):
    curvatures = jnp.array([0.5, 1.0, 3.0])
    task = lopt.tasks.Quadratic(curvatures, jnp.ones(3), 0.3)
    optimizer = optax.sgd(0.1)
    state = checkpoint(task, optimizer, key)
    found = noise_samples(task, optimizer, state, key, 4096)
    variances = np.linalg.eigvalsh(np.cov(np.asarray(found.grads).T))
    scatter = jax.vmap(lambda key: jax.grad(task.loss)(state.params, task.batch(key)))
    np.testing.assert_allclose(found.grads, scatter(jax.random.split(key, 4096)), rtol=1e-12)
    # Coordinates are not equally noisy: only samples are alike.
    grads, updates = noise_of(found.grads, "samples"), noise_of(found.updates)
    np.testing.assert_allclose(grads.top_eigenvalue, variances[-1], rtol=1e-9)
    np.testing.assert_allclose(updates.trace, 0.01 * grads.trace, rtol=1e-9)
    assert abs(grads.tail_index - 2) < 0.3


def test_the_optimizer_state_is_frozen_with_the_params(key):
    # u = -rate (g + mu v): the noise of one batch, whatever the velocity; its mean knows it.
    task = lopt.tasks.Quadratic(jnp.ones(4), jnp.ones(4), 0.2)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = checkpoint(task, optimizer, key)
    found = noise_samples(task, optimizer, state, key, 16)
    expected = -0.1 * (found.grads + 0.9 * state.opt_state[0].trace[None])
    np.testing.assert_allclose(found.updates, expected, rtol=1e-12)


@pytest.mark.standard_promotion
def test_a_sign_rule_clips_noise(key):
    task = lopt.tasks.Quadratic(jnp.ones(50), jnp.zeros(50), 1.0)
    optimizer = optax.sign_sgd(0.01)
    found = noise_samples(task, optimizer, checkpoint(task, optimizer, key), key, 64)
    assert noise_of(found.updates).trace <= 50 * 1e-4 * 64 / 63


def test_what_needs_a_loss_gets_it(key):
    task = lopt.tasks.Quadratic(jnp.ones(4), jnp.ones(4), 0.2)
    optimizer = optax.polyak_sgd()
    with jax.numpy_dtype_promotion("standard"):
        found = noise_samples(task, optimizer, checkpoint(task, optimizer, key), key, 5)
    rates = found.losses / jnp.sum(found.grads**2, axis=1)
    np.testing.assert_allclose(
        found.updates, -jnp.minimum(rates, 1.0)[:, None] * found.grads, rtol=1e-6
    )


def test_bad_input_is_named(key):
    task = lopt.tasks.Quadratic(jnp.ones(4), jnp.ones(4), 0.2)
    state = checkpoint(task, optax.sgd(0.1), key)
    with pytest.raises(TypeError, match="optimizer"):
        noise_samples(task, lopt.small_mlp(), state, key, 4)
    with pytest.raises(ValueError, match="num=1"):
        noise_samples(task, optax.sgd(0.1), state, key, 1)
    with pytest.raises(ValueError, match="pass the optimizer that the run was trained with"):
        noise_samples(task, optax.adam(0.1), state, key, 4)
    with pytest.raises(ValueError, match="there is no noise"):
        noise_of(np.ones((4, 3)))
    with pytest.raises(ValueError, match="not finite in 1 of 4 samples"):
        noise_of(np.ones((4, 2)) * np.array([[1.0], [2.0], [np.nan], [3.0]]))
    with pytest.raises(ValueError, match="not zero everywhere"):
        tail_index(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="has 1 sample"):
        noise_of(np.ones((1, 3)))
    with pytest.raises(ValueError, match="7 samples cannot be cut"):
        tail_index(np.ones((7, 6)), "samples")
    with pytest.raises(ValueError, match="floor=-1"):
        tail_index(np.ones((8, 8)), floor=-1.0)
    with pytest.raises(ValueError, match="sums of 8 values that are all zero"):
        tail_index(np.tile([1.0, -1.0], (8, 4)))
    with pytest.raises(ValueError, match="not one number of samples"):
        flatten_samples({"a": np.ones((3, 2)), "b": np.ones((4, 2))})
