"""Symmetries are measured: those that hold pass, those that do not are refused with their slope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import Inputs, images, normalised, perceptron

import lopt
from lopt.analysis.symmetry import (
    DiscreteMap,
    FreeGenerator,
    ModelLoss,
    Place,
    check_symmetry,
    rescale,
    scale,
    symmetries,
    translation,
)
from lopt.analysis.symmetry.check import check_task

W1, B1, W2, B2 = (f".layers[{i}].{name}" for i in (0, 1) for name in ("weight", "bias"))


def test_what_holds_holds_to_rounding(key):
    task = perceptron(jax.nn.relu)
    params = task.init(key)
    for symmetry in (translation(params, W2, B2), rescale(params, (W1, B1), W2)):
        evidence = check_symmetry(symmetry, task, key)
        assert evidence.holds
        assert evidence.slope < 1e-14
        assert evidence.moved < 1e-12
        assert evidence.slopes.shape == (symmetry.units,)


def test_what_does_not_is_refused_with_its_slope(key):
    task = perceptron(jax.nn.sigmoid)
    symmetry = rescale(task.init(key), (W1, B1), W2)
    with pytest.raises(ValueError, match=r"ModelLoss does not have .*rescale.*slope \d.\de-0[123]"):
        check_symmetry(symmetry, task, key)
    # The wrong degree, and half of a symmetry.
    task = perceptron(jax.nn.relu)
    with pytest.raises(ValueError, match="slope"):
        check_symmetry(rescale(task.init(key), (W1, B1), W2, degree=2.0), task, key)
    with pytest.raises(ValueError, match="slope"):
        check_symmetry(rescale(task.init(key), W1, W2), task, key)


def test_a_slope_of_zero_is_not_enough(key):
    # Its tangents are those of rescaling, but its finite moves are not.
    task = perceptron(jax.nn.relu)
    good = rescale(task.init(key), (W1, B1), W2)

    def action(params, amounts):
        return jax.tree.map(jnp.add, params, good.combine(params, amounts))

    linearised = FreeGenerator("linearised", "rescale", good.units, action)
    with pytest.raises(ValueError, match=r"slope \d.\de-1[5-9].*the loss moves by \d.\de-0[0123]"):
        check_symmetry(linearised, task, key)


def test_the_epsilon_of_batch_norm_is_seen(key):
    with_epsilon, without = normalised(1e-5, 128), normalised(0.0, 128)
    symmetry = scale(without.init(key), W1, B1)
    assert check_symmetry(symmetry, without, key).slope < 1e-14
    with pytest.raises(ValueError, match=r"slope \d.\de-0[4567]"):
        check_symmetry(symmetry, with_epsilon, key)
    nearly = check_symmetry(symmetry, with_epsilon, key, tolerance=1e-2)
    assert 1e-7 < nearly.slope < 1e-3


def test_maps_are_measured_too(key):
    places = (Place(W1), Place(B1), Place(W2, axis=1))
    swap, flip = (DiscreteMap(motion, motion, 3, places) for motion in ("permute", "flip"))
    odd, other = perceptron(jnp.tanh), perceptron(jax.nn.relu)
    assert check_symmetry(swap, odd, key).moved < 1e-12
    assert check_symmetry(swap, other, key).moved < 1e-12
    assert check_symmetry(flip, odd, key).moved < 1e-12
    with pytest.raises(ValueError, match="flip: the loss moves by"):
        check_symmetry(flip, other, key)


def test_where_nothing_can_be_told_nothing_is_claimed(key):
    task = perceptron(jax.nn.relu)
    nowhere = jax.tree.map(jnp.zeros_like, task.init(key))
    with pytest.raises(ValueError, match="all its tangents are zero"):
        check_symmetry(rescale(nowhere, (W1, B1), W2), task, key, params=nowhere)
    flat = ModelLoss({"w": jnp.ones((2, 2))}, lambda m, b: 0.0 * jnp.sum(m["w"]), Inputs((1,)))
    with pytest.raises(ValueError, match="gradients of length 0"):
        check_symmetry(translation(flat.init(key), "['w']"), flat, key)


def test_an_action_of_another_structure_is_refused(key):
    task = perceptron(jax.nn.relu)
    wrong = FreeGenerator("wrong", "wrong", 1, lambda params, amounts: jax.tree.leaves(params))
    with pytest.raises(ValueError, match="must move params to params of the same structure"):
        check_symmetry(wrong, task, key)


def test_a_model_without_arrays_is_refused():
    with pytest.raises(ValueError, match="no floating-point arrays"):
        ModelLoss({"n": np.arange(3)}, lambda m, b: jnp.zeros(()), Inputs((1,)))


def test_an_action_must_leave_params_as_they_are_for_amounts_of_zero(key):
    task = perceptron(jax.nn.relu)
    good = rescale(task.init(key), (W1, B1), W2)

    def action(params, amounts):
        return good.act(params, amounts + 0.1)

    shifted = FreeGenerator("shifted", "rescale", good.units, action)
    with pytest.raises(ValueError, match=r"'shifted'\) must leave params as they are.*zero"):
        check_symmetry(shifted, task, key)
    with pytest.raises(ValueError, match="'shifted'"):
        symmetries(task, key, others=(shifted,))


@pytest.mark.parametrize("made_for", [(16,), (4,)])
def test_a_generator_of_another_width_is_refused(key, made_for):
    def task(widths):
        return lopt.tasks.mlp_classification(images(4), widths)

    generator = rescale(task(made_for).init(key), (W1, B1), W2)
    with pytest.raises(ValueError, match=rf"has {made_for[0]} slices on axis 0.*shape \(8, 16\)"):
        check_symmetry(generator, task((8,)), key)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_is_positive_and_finite(key, tolerance):
    task = perceptron(jax.nn.relu)
    symmetry = rescale(task.init(key), (W1, B1), W2)
    with pytest.raises(ValueError, match=rf"check_symmetry\(tolerance={tolerance}\).*try 1e-06"):
        check_symmetry(symmetry, task, key, tolerance=tolerance)
    with pytest.raises(ValueError, match=rf"symmetries\(tolerance={tolerance}\)"):
        symmetries(task, key, tolerance=tolerance)


def test_what_is_no_task_is_named():
    # Under the tests' type checker it never arrives at the functions themselves.
    task = perceptron(jax.nn.relu)
    with pytest.raises(ValueError, match=r"a MLP is none; try lopt\.analysis\.symmetry\.ModelLoss"):
        check_task("symmetries", task.model)
