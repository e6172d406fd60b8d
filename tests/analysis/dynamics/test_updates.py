"""Distributions of updates are counts of what was added, whatever the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import UpdateHistogram, tensor_names
from lopt.core import Step


def step_with(updates, params=None):
    params = jax.tree.map(jnp.ones_like, updates) if params is None else params
    zero = jnp.zeros(())
    key = jax.random.key(0)
    return Step(jnp.zeros((), jnp.int32), key, params, (), (), zero, params, updates)


def test_counts_are_those_of_numpy(key):
    updates = {"a": jax.random.normal(key, (30, 40)) ** 5, "b": jnp.full(7, 1e-3)}
    histogram = UpdateHistogram(1e-6, 1.0, 12)
    found = histogram(step_with(updates))
    assert found.counts.shape == (2, 14)
    for counts, update in zip(found.counts, jax.tree.leaves(updates), strict=True):
        sizes = np.abs(np.ravel(update))
        inside, _ = np.histogram(sizes, histogram.edges)
        np.testing.assert_array_equal(counts[1:-1], inside)
        np.testing.assert_array_equal(counts[0], np.sum(sizes < 1e-6))
        np.testing.assert_array_equal(counts[-1], np.sum(sizes > 1.0))
    np.testing.assert_array_equal(found.largest, [np.abs(updates["a"]).max(), 1e-3])


def test_zeros_and_what_is_not_finite_have_their_places():
    found = UpdateHistogram()(step_with(jnp.array([0.0, jnp.nan, jnp.inf, -jnp.inf, -1.0])))
    assert found.counts[0, 0] == 1
    assert found.counts[0, -1] == 3
    assert found.counts.sum() == 5


def test_relative_steps_are_quotients_of_norms():
    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}
    params = {"a": jnp.array([0.0, 10.0]), "b": jnp.array([[0.0]])}
    found = UpdateHistogram()(step_with(updates, params))
    np.testing.assert_allclose(found.relative, [0.5, np.inf])
    np.testing.assert_allclose(found.overall_relative, 1.3)


def test_a_sign_rule_has_one_bar_at_every_step(key):
    task = lopt.tasks.Quadratic(jnp.linspace(0.5, 2.0, 6), jnp.ones(6))
    optimizer, histogram = optax.lion(0.02, weight_decay=0.0), UpdateHistogram()
    state = lopt.start(task, optimizer, task.init(key), key)
    with jax.numpy_dtype_promotion("standard"):
        _, found = lopt.unroll(task, optimizer, state, 8, record=histogram)
    place = np.searchsorted(histogram.edges, 0.02)
    np.testing.assert_array_equal(found.counts[:, 0, place], 6)
    np.testing.assert_array_equal(found.largest, np.full((8, 1), 0.02))


def test_the_record_maps_over_runs(key):
    task = lopt.tasks.Quadratic(jnp.ones(3), jnp.ones(3))
    optimizer = optax.sgd(0.1)

    def run(key):
        state = lopt.start(task, optimizer, task.init(key), key)
        return lopt.unroll(task, optimizer, state, 4, record=UpdateHistogram())[1]

    found = jax.vmap(run)(jax.random.split(key, 5))
    assert found.counts.shape == (5, 4, 1, 32)
    np.testing.assert_array_equal(found.counts.sum(axis=-1), 3)
    assert found.overall_relative.shape == (5, 4)


def test_tensors_have_names():
    assert tensor_names({"w": jnp.ones(2), "b": [jnp.ones(1)]}) == ("['b'][0]", "['w']")
    assert tensor_names(jnp.ones(2)) == ("params",)


@pytest.mark.parametrize(
    "fields", [{"lowest": 0.0}, {"lowest": 1.0, "highest": 0.1}, {"bins": 0}, {"bins": True}]
)
def test_what_is_no_range_is_refused(fields):
    with pytest.raises(ValueError, match=r"UpdateHistogram.*try"):
        UpdateHistogram(**fields)


def test_a_range_of_words_is_named():
    with pytest.raises((ValueError, TypeError), match="lowest"):
        UpdateHistogram("a", "b")
