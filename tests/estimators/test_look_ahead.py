"""Looking ahead while training: exact for its steps, and without a trace in the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quadratic_toy

import lopt
from lopt.core import mean_loss

CURVATURES, CENTRES = np.array([0.5, 1.0, 3.0]), np.array([1.0, -1.0, 0.5])


def noisy_inner(horizon=6):
    task = lopt.tasks.Quadratic(jnp.asarray(CURVATURES), jnp.asarray(CENTRES), 0.3)
    return lopt.InnerTraining(task, lopt.LearnableSGD(0.1), horizon)


def test_its_gradient_is_that_of_the_loss_a_few_steps_ahead(key):
    steps, rate = 3, 0.1
    estimator = lopt.LookAhead(quadratic_toy(6, rate), steps=steps, stride=4)
    theta = estimator.inner.learned.init(key)
    state = estimator.prepare(theta, key)
    estimate, _ = estimator.estimate(theta, state, key)
    distance = np.asarray(state.episode.train.params) - CENTRES

    def ahead(rate):
        return 0.5 * np.sum(CURVATURES * distance**2 * (1 - rate * CURVATURES) ** (2 * steps))

    np.testing.assert_allclose(estimate.loss, ahead(rate), rtol=1e-10)
    slope = (ahead(rate * np.exp(1e-5)) - ahead(rate * np.exp(-1e-5))) / 2e-5
    np.testing.assert_allclose(estimate.grads["learning_rate"], slope, rtol=1e-8)


@pytest.mark.parametrize("deterministic", [False, True])
def test_forward_mode_agrees_with_backpropagation(key, deterministic):
    estimator = lopt.LookAhead(noisy_inner(), steps=4, stride=3, deterministic=deterministic)
    theta = estimator.inner.learned.init(key)
    state = estimator.prepare(theta, key)
    estimate, _ = estimator.estimate(theta, state, key)
    loss, grads = jax.value_and_grad(estimator.loss_ahead)(theta, state)
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(estimate.grads["learning_rate"], grads["learning_rate"], rtol=1e-10)


@pytest.mark.standard_promotion
def test_the_run_goes_on_as_if_nobody_had_looked_ahead(key):
    inner, estimates, stride = noisy_inner(), 3, 5
    estimator = lopt.LookAhead(inner, steps=2, batches=2, estimates=estimates, stride=stride)
    meta, theta = optax.adam(0.05), inner.learned.init(key)
    state = lopt.start(estimator, meta, theta, key)
    begin = state.estimator_state.episode

    def record(step):
        return step.params, step.estimator_state.loss

    state, (thetas, losses) = lopt.unroll(estimator, meta, state, 3 * estimates, record=record)
    assert len(np.unique(thetas["learning_rate"])) == 3 * estimates
    # Training went on at the outer steps 3 and 6, with theta as it was then.
    episode, means = begin, []
    for outer in (estimates, 2 * estimates):
        at = jax.tree.map(lambda leaf, outer=outer: leaf[outer], thetas)
        trained, episode = inner.advance(at, episode, stride)
        means.append(jnp.mean(trained))
    np.testing.assert_array_equal(state.estimator_state.episode.train.params, episode.train.params)
    assert np.isnan(losses[:estimates]).all()
    np.testing.assert_allclose(losses[estimates : 2 * estimates], means[0], rtol=1e-12)
    np.testing.assert_allclose(losses[2 * estimates :], means[1], rtol=1e-12)


def test_estimates_of_one_halt_share_their_batches_and_those_of_another_do_not(key):
    estimator = lopt.LookAhead(noisy_inner(), steps=2, estimates=2, stride=1)
    theta = estimator.inner.learned.init(key)
    state = estimator.prepare(theta, key)
    losses = []
    for i in range(4):
        estimate, state = estimator.estimate(theta, state, jax.random.key(i))
        losses.append(float(estimate.loss))
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    assert losses[1] != losses[2]


def test_deterministic_means_one_batch(key):
    steps = 4
    estimator = lopt.LookAhead(noisy_inner(), steps=steps, deterministic=True)
    theta = estimator.inner.learned.init(key)
    state = estimator.prepare(theta, key)
    task = estimator.inner.tasks
    batch = task.batch(state.key)
    params = state.episode.train.params
    for _ in range(steps):
        params = params - 0.1 * jax.grad(task.loss)(params, batch)
    np.testing.assert_allclose(
        estimator.loss_ahead(theta, state), task.loss(params, batch), rtol=1e-10
    )


@pytest.mark.parametrize("field", ["steps", "batches", "estimates", "stride"])
def test_a_count_that_is_not_positive_is_refused(field):
    with pytest.raises(ValueError, match=rf"LookAhead\({field}=0\) must be a positive integer"):
        lopt.LookAhead(noisy_inner(), **{field: 0})


def test_final_loss_is_the_loss_after_the_last_step(key):
    horizon = 5
    inner = noisy_inner(horizon)
    final = lopt.InnerTraining(inner.tasks, inner.learned, horizon, lopt.FinalLoss(batches=3))
    theta = inner.learned.init(key)
    episode = final.begin(theta, key)
    losses, after = final.advance(theta, episode, horizon)
    assert not np.any(losses[:-1])
    last_key = jax.random.fold_in(episode.train.key, horizon - 1)
    params = after.train.params
    expected = mean_loss(inner.tasks, params, (), jax.random.fold_in(last_key, 1), 3)
    np.testing.assert_allclose(final.meta_loss(theta, key), expected, rtol=1e-12)
    reverse = jax.grad(final.meta_loss)(theta, key)["learning_rate"]
    forward = lopt.ForwardMode(final).estimate(theta, (), key)[0].grads["learning_rate"]
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)
    assert reverse != 0


def test_final_loss_refuses_a_count_that_is_not_positive():
    with pytest.raises(ValueError, match=r"FinalLoss\(batches=0\) must be a positive integer"):
        lopt.FinalLoss(batches=0)
