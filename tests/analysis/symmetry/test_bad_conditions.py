"""What is no number, hardly matters, or is not what it should be."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lopt
from lopt.analysis.dynamics import mirrored
from lopt.analysis.symmetry import (
    broken_component,
    deviation,
    missing_ranks,
    symmetries,
    translation,
)
from lopt.analysis.symmetry.laws import check_law

PARAMS = {"w": jnp.ones((3, 2), jnp.float32)}


@pytest.mark.parametrize("size", [jnp.nan, jnp.inf, 1e30])
def test_no_cosine_of_what_is_no_number(size):
    direction = {"w": jnp.full((3, 2), size, jnp.float32)}
    assert jnp.isnan(deviation(translation(PARAMS, "['w']"), PARAMS, direction).cosine)


@pytest.mark.parametrize(("size", "cosine"), [(0.0, 0), (1e-20, 0), (1e-10, 1), (1e15, 1)])
def test_cosines_are_never_more_than_one(size, cosine):
    direction = {"w": jnp.full((3, 2), size, jnp.float32)}
    found = deviation(translation(PARAMS, "['w']"), PARAMS, direction).cosine
    assert found == pytest.approx(cosine, abs=1e-6)


def test_layers_that_hardly_matter_have_no_false_symmetries(key):
    images = lopt.load_images("digits")
    task = lopt.tasks.mlp_classification(images, widths=(16,) * 6, activation=jax.nn.sigmoid)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), task.init(key))
    found = symmetries(task, key, params=params)
    kinds = [generator.kind for generator in (*found.generators, *found.nearly)]
    assert kinds == ["translation"]


def test_a_task_without_batches_can_be_examined(key):
    assert symmetries(lopt.tasks.Rosenbrock(), key).generators == ()


def test_a_missing_loss_value_is_named():
    optimizer = mirrored(optax.contrib.reduce_on_plateau())
    with pytest.raises(ValueError, match="needs value"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_what_laws_and_ranks_cannot_use_is_refused(key):
    shift = translation(PARAMS, "['w']")
    with pytest.raises(ValueError, match="must be a HeavyBall"):
        check_law("exact_law", shift, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"threshold=5\.0"):
        missing_ranks(lopt.tasks.Rosenbrock(), key, (), threshold=5.0)
    with pytest.raises(ValueError, match="at least one symmetry"):
        broken_component((), PARAMS, PARAMS)
