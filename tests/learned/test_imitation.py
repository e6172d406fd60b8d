"""An expert beside a rule: shares of the path, differences, and what is learned from them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.learned import Guided, Imitation

KEY = jax.random.key(0)
PARAMS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])}
RULE = lopt.LearnableSGD(0.1)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_updates_are_shared_and_differences_are_those_of_the_parts(share):
    learned = Guided(RULE, optax.sgd(0.2), share)
    theta = learned.init(KEY)
    updates, state = learned.update(theta, PARAMS, learned.begin(theta, PARAMS), PARAMS)
    jax.tree.map(
        lambda u, p: np.testing.assert_allclose(u, -(0.1 + 0.1 * share) * p), updates, PARAMS
    )
    np.testing.assert_allclose(state.direction, 0, atol=1e-12)
    np.testing.assert_allclose(state.magnitude, np.log(2) ** 2)


def test_the_direction_is_a_mean_over_tensors():
    learned = Guided(RULE, optax.sign_sgd(0.1))
    theta = learned.init(KEY)
    _, state = learned.update(theta, PARAMS, learned.begin(theta, PARAMS), PARAMS)
    cosine = 7 / 5 / 2**0.5
    np.testing.assert_allclose(state.direction, (1 - cosine + 0) / 2)
    mean = (np.log(5 / 2**0.5) ** 2 + np.log(2) ** 2) / 2
    np.testing.assert_allclose(state.magnitude, mean)


def test_imitation_alone_learns_the_rate_of_the_expert_on_the_experts_path():
    task = lopt.tasks.Quadratic(jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]))
    learned = Guided(RULE, optax.sgd(0.02), 1.0)
    inner = lopt.InnerTraining(task, learned, 5, Imitation(direction=0.0, magnitude=1.0))
    meta = lopt.MetaTask(inner)
    theta = learned.init(KEY)
    losses = jax.vmap(lambda key: meta.loss(theta, key))(jax.random.split(KEY, 2))
    np.testing.assert_allclose(losses, np.log(5) ** 2, rtol=1e-9)

    @quick_jit
    def train(theta):
        state = lopt.start(meta, optax.sgd(0.25), theta, KEY)
        return lopt.unroll(meta, optax.sgd(0.25), state, 30)[0].params

    rate = RULE.hyperparameters(train(theta)[0])["learning_rate"]
    np.testing.assert_allclose(rate, 0.02, rtol=1e-6)


def test_weights_mix_imitation_with_the_objective():
    task = lopt.tasks.Quadratic(jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]))
    learned = Guided(RULE, optax.sign_sgd(0.1))
    theta, values = learned.init(KEY), []
    for direction, magnitude in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.2)):
        objective = Imitation(direction=direction, magnitude=magnitude)
        inner = lopt.InnerTraining(task, learned, 3, objective)
        values.append(inner.meta_loss(theta, KEY))
    plain = lopt.InnerTraining(task, RULE, 3).meta_loss(theta[0], KEY)
    np.testing.assert_allclose(values[0], plain)
    mixed = 0.3 * values[0] + 0.5 * values[1] + 0.2 * values[2]
    np.testing.assert_allclose(values[3], mixed)


def test_imitation_without_an_expert_is_refused():
    inner = lopt.InnerTraining(lopt.tasks.QuadraticFamily(2), RULE, 3, Imitation())
    with pytest.raises(ValueError, match="Imitation needs an expert"):
        inner.meta_loss(RULE.init(KEY), KEY)
