"""Odd rules that ignore params stay where they are along the valley; the others' drift is known."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Drift

import lopt
from lopt.analysis.dynamics import Valley, valley_portrait, valley_starts

pytestmark = pytest.mark.standard_promotion
STEPS = 60


def decayed(rate, decay):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.sgd(0.05, momentum=0.9),
        optax.adam(0.05),
        optax.rmsprop(0.05),
        optax.lion(0.05, weight_decay=0.0),
    ],
    ids=["sgd", "momentum", "adam", "rmsprop", "lion"],
)
def test_odd_rules_that_ignore_params_conserve_the_sum_to_rounding(optimizer):
    starts = valley_starts(2.0, 4)
    found = valley_portrait(optimizer, starts, STEPS)
    assert found.paths.shape == (16, STEPS + 1, 2)
    np.testing.assert_array_equal(found.paths[:, 0], starts)
    np.testing.assert_allclose(found.sums - found.sums[:, :1], 0, atol=1e-13)
    moves = np.abs(starts[:, 0] - starts[:, 1]) > 0
    assert np.all(found.oddness[moves, 0] == 0)
    assert np.all(found.reflection[moves] == 0)
    assert np.all(found.swap[moves] == 0)


def test_sgd_goes_to_the_nearest_minimum_at_its_rate():
    found = valley_portrait(optax.sgd(0.1), jnp.array([[2.0, -1.0], [0.5, 0.0]]), STEPS)
    gaps = np.array([3.0, 0.5])[:, None] * 0.8 ** np.arange(STEPS)
    np.testing.assert_allclose(found.losses, gaps**2 / 2, rtol=1e-9)
    np.testing.assert_allclose(found.paths[:, -1], [[0.5, 0.5], [0.25, 0.25]], atol=1e-5)
    np.testing.assert_allclose(found.field, [[-0.3, 0.3], [-0.05, 0.05]], rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [(decayed(0.1, 0.2), 0.98), (optax.adamw(0.05, weight_decay=0.1), 0.995)],
    ids=["coupled", "decoupled"],
)
def test_weight_decay_drifts_by_its_law(optimizer, factor):
    starts = jnp.array([[2.0, -1.0], [1.0, 0.3], [-1.5, -1.5]])
    found = valley_portrait(optimizer, starts, STEPS)
    np.testing.assert_allclose(found.drift, 1 - factor**STEPS, rtol=1e-10)
    sums = found.sums[:, :1] * factor ** jnp.arange(STEPS + 1)[None]
    np.testing.assert_allclose(found.sums, sums, rtol=1e-10)
    # Decay turns around with the params, and not with gradients alone.
    assert np.all(found.reflection == 0)
    assert np.all(found.oddness > 0)


def test_a_bias_is_a_drift_that_does_not_turn_around():
    found = valley_portrait(Drift().optimizer(jnp.asarray(0.02)), jnp.array([[2.0, -1.0]]), STEPS)
    np.testing.assert_allclose(found.displacement, 2 * 0.02 * STEPS, rtol=1e-10)
    np.testing.assert_allclose(found.oddness, 2.0)
    np.testing.assert_allclose(found.reflection, 2.0)
    np.testing.assert_allclose(found.swap, 0.0)


def test_a_rule_that_knows_its_coordinate_minds_a_swap():
    first = optax.stateless(lambda updates, params: -0.1 * updates * jnp.array([1.0, 0.0]))
    found = valley_portrait(first, jnp.array([[2.0, -1.0]]), 1)
    # (-0.3, 0) against (0, 0.3).
    np.testing.assert_allclose(found.swap, 2**0.5, rtol=1e-12)


def test_the_drift_of_a_learned_rule_is_measured(key):
    learned = lopt.small_mlp(step_multiplier=0.01)
    optimizer = learned.optimizer(learned.init(key))
    found = valley_portrait(optimizer, valley_starts(2.0, 2), 20)
    assert np.all(np.isfinite(found.drift[jnp.abs(found.sums[:, 0]) > 0]))
    assert np.all(found.oddness > 0)
    assert np.max(np.abs(found.displacement)) > 1e-3


def test_what_needs_a_loss_gets_it():
    found = valley_portrait(optax.polyak_sgd(0.1), jnp.array([[2.0, -1.0]]), STEPS)
    assert found.losses[0, -1] < 1e-3 * found.losses[0, 0]
    np.testing.assert_allclose(found.displacement, 0, atol=1e-13)


def test_the_valley_is_a_task(key):
    start = Valley(3.0).init(key)
    assert np.all(np.abs(start) <= 3)
    assert Valley().loss(jnp.array([3.0, 1.0]), ()) == 2


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="optimizer"):
        valley_portrait(lopt.small_mlp(), valley_starts(), 5)
    with pytest.raises(ValueError, match=r"valley_portrait\(num_steps=0"):
        valley_portrait(optax.sgd(0.1), valley_starts(), 0)
    with pytest.raises(ValueError, match=r"rows of x and y; it has shape \(0, 2\)"):
        valley_portrait(optax.sgd(0.1), jnp.ones((0, 2)), 5)
    with pytest.raises(ValueError, match=r"Valley\(reach=-1"):
        Valley(-1.0)
    with pytest.raises(ValueError, match=r"valley_starts\(count=1"):
        valley_starts(count=1)
