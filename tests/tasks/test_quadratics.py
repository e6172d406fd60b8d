"""Quadratics against their own closed forms: trajectories, expectations, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import lopt
from lopt.tasks import Quadratic, QuadraticFamily

KEY = jax.random.key(0)
CURVATURES = jnp.array([2.0, 1.0, 0.3, 0.0])
CENTRE = jnp.array([1.0, -2.0, 0.5, 3.0])
START = jnp.array([0.3, 0.2, -1.0, 1.0])


def test_sgd_params_is_where_the_loop_arrives():
    # The learning rate makes factors of all signs: 1 - 1.2 * 2 = -1.4, -0.2, 0.64 and 1.
    task, optimizer = Quadratic(CURVATURES, CENTRE), optax.sgd(1.2)
    state, losses = lopt.unroll(task, optimizer, lopt.start(task, optimizer, START, KEY), 7)
    np.testing.assert_allclose(state.params, task.sgd_params(START, 1.2, 7), rtol=1e-12)
    expected = [task.expected_sgd_loss(START, 1.2, t) for t in range(7)]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_expected_loss_agrees_with_monte_carlo():
    task, optimizer = Quadratic(CURVATURES, CENTRE, noise_scale=0.7), optax.sgd(0.8)

    def losses(key):
        return lopt.unroll(task, optimizer, lopt.start(task, optimizer, START, key), 6)[1]

    samples = jax.vmap(losses)(jax.random.split(KEY, 4000))
    expected = jax.vmap(lambda t: task.expected_sgd_loss(START, 0.8, t))(jnp.arange(6))
    error = np.std(samples, axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(np.mean(samples, axis=0) - expected) < 4 * error)
    # The test has teeth: without the accumulated variance the last step would be far off.
    without = Quadratic(CURVATURES, CENTRE).expected_sgd_loss(START, 0.8, 5) + task.minimum
    assert abs(np.mean(samples[:, 5]) - without) > 10 * error[5]


@pytest.mark.parametrize("learning_rate", [0.3, 1.0, 2.0])
def test_variance_of_singular_rates_equals_the_plain_recursion(learning_rate):
    # learning_rate * curvature = 0, 1 and 2 are where the geometric sum needs care.
    curvatures, noise = jnp.array([0.0, 1.0]), 0.5
    task = Quadratic(curvatures, jnp.zeros(2), noise_scale=noise)
    mean, variance = np.ones(2), np.zeros(2)
    rate = learning_rate * np.asarray(curvatures)
    for _ in range(5):
        mean, variance = (1 - rate) * mean, (1 - rate) ** 2 * variance + (rate * noise) ** 2
    expected = 0.5 * np.sum(np.asarray(curvatures) * (mean**2 + variance + noise**2))
    found, slope = jax.value_and_grad(task.expected_sgd_loss, argnums=1)(
        jnp.ones(2), learning_rate, 5
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isfinite(slope)


def test_gradient_by_learning_rate_and_params():
    task = Quadratic(CURVATURES, CENTRE, noise_scale=0.5)
    expected = jax.jit(lambda x, rate: task.expected_sgd_loss(x, rate, 4))
    check_grads(expected, (START, 0.3), order=1)
    noise = task.batch(KEY)
    check_grads(jax.jit(lambda x: task.loss(x, noise)), (START,), order=2)


def test_minimum_is_the_expected_loss_at_the_centre():
    task = Quadratic(CURVATURES, CENTRE, noise_scale=0.5)
    np.testing.assert_allclose(task.expected_sgd_loss(CENTRE, 0.0, 3), task.minimum)
    losses = jax.vmap(lambda key: task.loss(CENTRE, task.batch(key)))(jax.random.split(KEY, 4000))
    assert abs(np.mean(losses) - task.minimum) < 4 * np.std(losses) / np.sqrt(len(losses))
    assert Quadratic(CURVATURES, CENTRE).batch(KEY) == ()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_loss_has_the_dtype_of_the_parameters(dtype):
    task = Quadratic(CURVATURES, CENTRE, noise_scale=0.5)
    assert task.loss(START.astype(dtype), task.batch(KEY)).dtype == dtype
    assert task.expected_sgd_loss(START.astype(dtype), 0.1, 3).dtype == dtype


def test_family_draws_log_uniform_spectra():
    family = QuadraticFamily(20, 0.01, 10.0, initial_scale=3.0)
    tasks = jax.vmap(family.draw)(jax.random.split(KEY, 200))
    logs = (np.log10(tasks.eigenvalues) + 2) / 3
    assert logs.min() >= 0
    assert logs.max() <= 1
    assert abs(logs.mean() - 0.5) < 4 / np.sqrt(12 * logs.size)
    assert abs(np.var(tasks.centre) - 1) < 4 * np.sqrt(2 / logs.size)
    params = jax.vmap(lambda task: task.init(KEY))(tasks)
    assert params.shape == (200, 20)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Quadratic(jnp.ones(2), jnp.ones(3)), "(?s)Quadratic.*eigenvalues.*centre"),
        (lambda: Quadratic(jnp.ones(2), jnp.ones(2), -1.0), "Quadratic.*noise_scale=-1.0"),
        (lambda: QuadraticFamily(0), "QuadraticFamily.*dim=0.*try"),
        (lambda: QuadraticFamily(3, 0.0, 1.0), "QuadraticFamily.*low=0.0.*try"),
        (lambda: QuadraticFamily(3, 2.0, 1.0), "QuadraticFamily.*high=1.0.*try"),
        (lambda: QuadraticFamily(3, initial_scale=float("nan")).draw(KEY), "initial_scale=nan"),
    ],
)
def test_bad_input(build, words):
    # Under the type checker disagreeing shapes are caught one line earlier.
    with pytest.raises((ValueError, TypeError), match=words):
        build()
