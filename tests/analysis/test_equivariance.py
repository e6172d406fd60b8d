"""The symmetries of update rules that are known in closed form."""

import jax.numpy as jnp
import optax
import pytest

import lopt
from lopt.analysis import equivariances

ALL = {"odd", "row permutation", "column permutation", "left rotation", "right rotation"}
ALL |= {"square transpose", "oblong transpose", "scale-free", "scale-proportional"}
# Of u and 1000 u: their distance over the root mean square of their lengths.
UNEQUAL = 2**0.5 * 999 / (1 + 1000**2) ** 0.5


def broken(found, most=1e-13):
    return {name for name, defect in found.items() if not defect < most}


def test_sgd_has_all_symmetries_and_steps_proportional_to_gradients(key):
    learned = lopt.learnable(optax.sgd, learning_rate=0.1)
    found = equivariances(learned.optimizer(learned.init(key)), key)
    assert set(found) == ALL
    assert broken(found) == {"scale-free"}
    assert found["scale-free"] == pytest.approx(UNEQUAL)


@pytest.mark.standard_promotion
def test_adam_rotates_nothing_and_its_epsilon_sees_the_scale(key):
    found = equivariances(optax.adam(0.1), key)
    turned = {"left rotation", "right rotation"}
    assert broken(found) == {*turned, "scale-free", "scale-proportional"}
    assert broken(found, 1e-2) == {*turned, "scale-proportional"}
    assert broken(equivariances(optax.adam(0.1, eps=0.0), key)) == {*turned, "scale-proportional"}


def test_decay_turns_with_params_and_not_with_the_scale_of_gradients(key):
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    assert broken(equivariances(decay, key)) == {"scale-free", "scale-proportional"}


def test_what_a_rule_makes_of_signs_places_and_losses_is_seen(key):
    sizes = optax.stateless_with_tree_map(lambda g, p: jnp.abs(g))
    assert equivariances(sizes, key)["odd"] == pytest.approx(2)
    places = optax.stateless_with_tree_map(lambda g, p: jnp.cumsum(g, -1))
    kept = {"odd", "scale-proportional", "row permutation", "left rotation"}
    assert broken(equivariances(places, key)) == ALL - kept
    # Polyak's rate is the loss over the square of the gradient, which is all tensors'.
    assert broken(equivariances(optax.polyak_sgd(1e9), key)) == {"scale-proportional"}


def test_moves_of_no_tensor_are_left_out(key):
    found = equivariances(optax.sgd(0.1), key, {"bias": jnp.ones(3, jnp.float32)}, 1)
    assert set(found) == {"odd", "column permutation", "scale-free", "scale-proportional"}
    with pytest.raises(ValueError, match="num_steps=0"):
        equivariances(optax.sgd(0.1), key, num_steps=0)


def test_celo2_is_not_odd_and_turns_no_square(published, key):
    learned, theta = lopt.load_published(published / "celo2" / "weights.npz")
    params = {"square": jnp.ones((7, 7), jnp.float32)}
    found = equivariances(learned.optimizer(theta), key, params)
    # Its factored axes are told apart by their lengths, and squares have none.
    kept = {"row permutation", "column permutation"}
    assert broken(found, 1e-5) == ALL - {"oblong transpose"} - kept
    assert 0.2 < found["odd"] < 0.8
    assert 0.1 < found["square transpose"] < 0.5
