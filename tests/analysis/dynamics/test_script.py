"""Responses to scripted gradients are the closed forms of textbook optimizers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import responses, scripted_updates, signal

pytestmark = pytest.mark.standard_promotion


def test_signals():
    np.testing.assert_array_equal(signal("impulse", 4, 1, 2.0), [0, 2, 0, 0])
    np.testing.assert_array_equal(signal("step", 4, 1), [0, 1, 1, 1])
    np.testing.assert_array_equal(signal("sign flip", 4, 2, 3.0), [3, 3, -3, -3])


def test_momentum_answers_an_impulse_with_its_powers_and_a_step_with_their_sum():
    signals = {"impulse": signal("impulse", 30, 4, 2.0), "step": signal("step", 30)}
    found = responses(optax.sgd(0.1, momentum=0.8), signals)
    times = np.arange(30)
    impulse = np.where(times < 4, 0, -0.2 * 0.8 ** (times - 4.0))
    np.testing.assert_allclose(found["impulse"], impulse, rtol=1e-12)
    np.testing.assert_allclose(found["step"], -0.1 * (1 - 0.8 ** (times + 1)) / 0.2, rtol=1e-12)


def test_adam_answers_a_flip_of_sign_with_its_momentum_alone():
    # The second moment does not see signs: u = -rate m / (1 - b^(t + 1)), m before the flip at s
    # 1 - b^(t + 1), after it b^(t - s + 1) (2 - b^s) - 1.
    grads = signal("sign flip", 40, 20)
    found = responses(optax.adam(0.1, b1=0.9, eps=0.0), {"flip": grads})["flip"]
    times = np.arange(40)
    momentum = np.where(
        times < 20, 1 - 0.9 ** (times + 1.0), 0.9 ** (times - 19.0) * (2 - 0.9**20) - 1
    )
    np.testing.assert_allclose(found, -0.1 * momentum / (1 - 0.9 ** (times + 1)), rtol=1e-9)


def test_params_move_as_they_would():
    # Without gradients decay alone is left: x falls by a factor in each step.
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    found = scripted_updates(decay, jnp.zeros((6, 2)), jnp.array([1.0, -3.0]))
    expected = -0.05 * np.outer(0.95 ** np.arange(6), [1.0, -3.0])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_learned_optimizers_answer_too(key):
    learned = lopt.LearnableSGD(0.3)
    optimizer = learned.optimizer(learned.init(key))
    found = responses(optimizer, {"step": signal("step", 5, 2)})["step"]
    np.testing.assert_allclose(found, [0, 0, -0.3, -0.3, -0.3], rtol=1e-12)


def test_an_optimizer_that_needs_a_loss_gets_one_or_says_so():
    grads = jnp.array([[2.0], [4.0]])
    with pytest.raises(ValueError, match=r"needs the loss as `value`.*pass losses="):
        scripted_updates(optax.polyak_sgd(), grads)
    # Polyak's rate is the loss over the square of the gradient.
    found = scripted_updates(optax.polyak_sgd(), grads, losses=jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(found[:, 0], [-0.5, -1.0])
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(0.5, patience=1))
    with pytest.raises(ValueError, match=r"needs the loss as `value`"):
        scripted_updates(plateau, grads)


def test_bad_input_is_named():
    grads = jnp.ones((3, 2))
    with pytest.raises(TypeError, match="optimizer"):
        scripted_updates(lopt.small_mlp(), grads)
    with pytest.raises(ValueError, match=r"grads has shape \(2,\), but in params"):
        scripted_updates(optax.sgd(0.1), grads, jnp.ones(3))
    with pytest.raises(ValueError, match=r"losses\) has shape \(2,\)"):
        scripted_updates(optax.sgd(0.1), grads, losses=jnp.ones(2))
    with pytest.raises(TypeError, match=r"grads\) must be an array|grads"):
        scripted_updates(optax.sgd(0.1), [1.0, 2.0])
    with pytest.raises((ValueError, TypeError), match=r"grads"):
        scripted_updates(optax.sgd(0.1), jnp.array(1.0))
    with pytest.raises(ValueError, match="at=9"):
        signal("step", 9, 9)
    with pytest.raises(ValueError, match="num_steps=0"):
        signal("step", 0)
    with pytest.raises(ValueError, match="height=0"):
        signal("step", 3, 0, 0.0)
