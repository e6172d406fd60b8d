"""A sweep shows for each truncation what truncated backpropagation with it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import linear_toy

import lopt
from lopt.analysis.truncation import Knob, TruncationSweep, truncations_of

HORIZON, TRUNCATIONS = 12, (1, 3, 6, 12)


def inner():
    task = lopt.tasks.Quadratic(jnp.array([0.5, 3.0]), jnp.array([1.0, -1.0]), 0.3)
    return lopt.InnerTraining(task, lopt.LearnableSGD(0.1), HORIZON)


def sweep_of(subject, position, key):
    sweep = TruncationSweep(subject, TRUNCATIONS)
    still = optax.set_to_zero()
    begin = lopt.start(sweep, still, jnp.asarray(position), key)
    _, slopes = lopt.unroll(
        sweep, still, begin, HORIZON, record=lambda step: step.estimator_state.slopes
    )
    return slopes.mean(0)


def knob_of(subject):
    theta = subject.learned.init(jax.random.key(0))
    knob = Knob(subject.learned, theta, {"learning_rate": jnp.ones(())})
    return lopt.InnerTraining(subject.tasks, knob, HORIZON)


def test_each_slope_is_the_mean_of_truncated_backpropagation(key):
    turned, still = knob_of(inner()), optax.set_to_zero()
    slopes = sweep_of(turned, 0.2, key)
    for slope, truncation in zip(slopes, TRUNCATIONS, strict=True):
        estimator = lopt.TruncatedBackprop(turned, truncation, stagger=False)
        state = lopt.start(estimator, still, jnp.asarray(0.2), key)
        _, grads = lopt.unroll(
            estimator, still, state, HORIZON // truncation, record=lambda step: step.grads
        )
        np.testing.assert_allclose(slope, grads.mean(), rtol=1e-10, atol=1e-14)


def test_the_bias_of_a_linear_task_is_known(key):
    # The loss at step t is t theta; a window of n sees the derivative (n - 1) / 2 on average.
    turned = lopt.InnerTraining(
        linear_toy(HORIZON).tasks, Knob(linear_toy(HORIZON).learned, jnp.ones(()), jnp.ones(())),
        HORIZON,
    )  # fmt: skip
    np.testing.assert_allclose(sweep_of(turned, 0.0, key), [(n - 1) / 2 for n in TRUNCATIONS])


def test_a_knob_without_direction_scales_the_updates(key):
    subject = inner()
    knob = Knob(subject.learned, subject.learned.init(key))
    params, grads = jnp.ones(3), jnp.arange(3.0)
    state = knob.begin(jnp.asarray(0.7), params)
    updates, _ = knob.update(jnp.asarray(0.7), grads, state, params)
    np.testing.assert_allclose(updates, -0.1 * np.exp(0.7) * grads, rtol=1e-12)


@pytest.mark.parametrize("horizon", [1, 7, 40, 97, 200, 1000])
def test_default_truncations_are_ones(horizon):
    found = truncations_of(horizon)
    assert found[-1] == horizon
    assert len(found) <= 7
    subject = inner()
    TruncationSweep(lopt.InnerTraining(subject.tasks, subject.learned, horizon), found)


@pytest.mark.parametrize("truncations", [(), (5, 12), (6, 3, 12), (4, 6, 12)])
def test_truncations_that_do_not_fit_are_refused(truncations):
    with pytest.raises(ValueError, match="must increase, divide InnerTraining"):
        TruncationSweep(inner(), truncations)
