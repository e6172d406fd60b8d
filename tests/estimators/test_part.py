"""Gradients by a part of theta: those of the whole, cut; and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import estimate_of

import lopt
from lopt.estimators import Part

KEY = jax.random.key(0)
TASK = lopt.tasks.Quadratic(jnp.array([0.5, 1.0, 3.0]), jnp.array([1.0, -1.0, 0.5]), 0.3)
INNER = lopt.InnerTraining(TASK, lopt.LearnableAdam(0.1), 4)
# Nested, so that whole nodes and leaves can be parts.
LEARNED = lopt.learned.muon_mlp(1)
MUON = lopt.InnerTraining(lopt.tasks.Quadratic(jnp.ones(3), jnp.ones(3), 0.3), LEARNED, 4)


@pytest.mark.parametrize(
    ("inner", "where"),
    [
        (INNER, lambda theta: theta["learning_rate"]),
        (MUON, lambda theta: [theta["sizes"], theta["schedule"]]),
    ],
)
def test_exact_gradients_are_those_of_the_whole_cut(inner, where):
    theta = jax.tree.map(lambda leaf: leaf + 0.01, inner.learned.init(KEY))
    whole = estimate_of(lopt.MetaTask(inner))(theta, (), KEY)[0]
    kept = {id(leaf) for leaf in jax.tree.leaves(where(whole.grads))}
    expected = jax.tree.map(lambda g: g if id(g) in kept else 0 * g, whole.grads)
    for one in (lopt.MetaTask(inner), lopt.ForwardMode(inner)):
        found, _ = estimate_of(Part(one, where))(theta, (), KEY)
        np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9),
            found.grads,
            expected,
        )


def test_evolution_strategies_of_a_part_are_unbiased_and_perturb_nothing_else():
    theta, keys = INNER.learned.init(KEY), jax.random.split(KEY, 4000)
    part = Part(lopt.ES(INNER, sigma=1e-3), lambda theta: [theta["learning_rate"]])

    def grads(estimator):
        found = jax.vmap(lambda key: estimator.estimate(theta, (), key)[0].grads)(keys)
        return {name: np.asarray(leaf) for name, leaf in found.items()}

    found, slopes = grads(part), grads(lopt.MetaTask(INNER))["learning_rate"]
    rates = found.pop("learning_rate")
    error = (rates.var() + slopes.var()) ** 0.5 / len(keys) ** 0.5
    assert abs(rates.mean() - slopes.mean()) < 4 * error < 0.3 * abs(slopes.mean())
    # The variance of e^2 times a slope; noise in the other weights would add that of theirs.
    np.testing.assert_allclose(rates.var(), 2 * slopes.mean() ** 2 + 3 * slopes.var(), rtol=0.2)
    assert not any(np.any(leaf) for leaf in found.values())


def test_a_part_is_of_inner_training_and_has_weights():
    with pytest.raises(ValueError, match=r"Part\(one=Quadratic.*no inner training; try lopt.ES"):
        Part(TASK, lambda theta: theta)
    with pytest.raises(ValueError, match="no weights to change"):
        Part(lopt.MetaTask(INNER), lambda theta: []).prepare(INNER.learned.init(KEY), KEY)


def test_online_forward_mode_has_a_direction_for_each_weight_of_the_part():
    online = lopt.OnlineForwardMode(MUON, truncation=2)
    theta = LEARNED.init(KEY)
    state = Part(online, lambda theta: theta["schedule"]).prepare(theta, KEY)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.tangents)} == {9}
