"""Lanczos' method, and the noisy quadratic of a network, against what is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.analysis import (
    NoisyQuadratic,
    best_fixed_schedule,
    expected_losses,
    fit_noisy_quadratic,
    greedy_schedule,
    lanczos,
    lowest_on_line,
    measured_losses,
    spectral_density,
)


def test_lanczos_gives_moments_exactly(key):
    root = jax.random.normal(key, (30, 30))
    matrix, vector = root + root.T, jnp.ones(30)
    found = lanczos(lambda x: matrix @ x, vector, 6)
    power = vector
    for k in range(12):
        np.testing.assert_allclose(found.moment(k), vector @ power, rtol=1e-9, atol=1e-7)
        power = matrix @ power


def test_lanczos_stops_where_the_space_is_exhausted():
    diagonal = jnp.array([1.0, 1.0, 2.0, 5.0])
    found = lanczos(lambda x: diagonal * x, jnp.array([1.0, 1.0, 2.0, 3.0]), 8)
    for k, known in enumerate((15, 2 + 8 + 45, 2 + 16 + 225)):
        assert found.moment(k) == pytest.approx(known, rel=1e-10)


QUADRATIC = lopt.tasks.Quadratic(jnp.array([0.1, 0.5, 1.0, 3.0]), jnp.zeros(4), noise_scale=0.7)
START = jnp.array([3.0, -2.0, 1.0, 0.5])


def test_the_noisy_quadratic_of_a_quadratic_is_itself(key):
    # A batch of noise zero is the whole data set: the loss without noise, but for a constant.
    fit = fit_noisy_quadratic(QUADRATIC, START, key, whole=jnp.zeros(4), probes=4000, order=4)
    h = np.asarray(QUADRATIC.eigenvalues)
    gradient = h * np.asarray(START)
    assert fit.squared_gradient == pytest.approx(gradient @ gradient)
    assert fit.curvature_along_gradient == pytest.approx(gradient @ (h * gradient))
    assert fit.noise_trace == pytest.approx(0.49 * np.sum(h**2), rel=0.06)
    assert fit.noise_curvature == pytest.approx(0.49 * np.sum(h**3), rel=0.06)
    truth = NoisyQuadratic(h, np.ones(4), np.full(4, 0.49), np.asarray(START) ** 2)
    rate = greedy_schedule(truth, 1, momentum=False).learning_rates[0]
    assert fit.greedy_rate == pytest.approx(rate, rel=0.03)
    ours = greedy_schedule(fit.problem(), 1, momentum=False).learning_rates[0]
    assert ours == pytest.approx(fit.greedy_rate, rel=1e-6)
    schedule = best_fixed_schedule(truth, 4, momentum=False)
    np.testing.assert_allclose(
        expected_losses(fit.problem(), schedule), expected_losses(truth, schedule), rtol=0.05
    )


def test_means_of_batches_serve_where_the_whole_is_not_given(key):
    fit = fit_noisy_quadratic(QUADRATIC, START, key, batches=500, probes=500, order=2)
    h = np.asarray(QUADRATIC.eigenvalues)
    assert fit.squared_gradient == pytest.approx(np.sum((h * np.asarray(START)) ** 2), rel=0.15)
    assert fit.noise_trace == pytest.approx(0.49 * np.sum(h**2), rel=0.2)
    with pytest.raises(ValueError, match="order=0"):
        fit_noisy_quadratic(QUADRATIC, START, key, order=0)


def test_the_spectral_density_of_a_diagonal_is_exact(key):
    # Entries of the random vectors are 1 and -1, whose squares say nothing new.
    found = spectral_density(QUADRATIC, START, key, whole=jnp.zeros(4), probes=3, order=4)
    assert found.moment(0) == pytest.approx(4)
    assert found.moment(1) == pytest.approx(float(jnp.sum(QUADRATIC.eigenvalues)))
    nodes = np.sort(np.asarray(found.nodes).reshape(3, 4), axis=1)
    np.testing.assert_allclose(nodes, np.tile(QUADRATIC.eigenvalues, (3, 1)), rtol=1e-9)


def test_the_lowest_point_of_a_line_lies_between_those_tried():
    rates = np.geomspace(0.1, 10, 9)
    losses = (np.log(rates) - 0.3) ** 2
    losses[-1] = np.nan
    assert lowest_on_line(rates, losses) == pytest.approx(np.exp(0.3))
    assert lowest_on_line(rates, rates) == pytest.approx(0.1)


def test_the_rate_of_the_first_step_is_foretold_for_digits(key):
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), (32,), batch_size=64)
    whole = task.everything("train")
    params = task.init(key)
    fit = fit_noisy_quadratic(task, params, key, whole=whole, order=4)
    rates = jnp.asarray(fit.greedy_rate * np.geomspace(0.25, 4, 17))
    losses = measured_losses(task, params, rates, jax.random.key(1), whole, 1, 64)
    mean = np.asarray(losses).mean(1)
    best = lowest_on_line(rates, mean)
    assert fit.greedy_rate == pytest.approx(best, rel=0.25)
    # What counts is the loss: it falls nearly as far as at the best rate.
    begin = float(task.loss(params, whole))
    assert begin - mean[8] > 0.95 * (begin - mean.min())
