"""Optimizers of optimizers of optimizers: a rule's weights are params like any others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from toys import quick_jit

import lopt

KEY = jax.random.key(0)
TASK = lopt.tasks.Quadratic(jnp.array([1.0, 3.0]), jnp.array([0.5, -0.5]))


def storey(task, rate, horizon):
    """Returns SGD with a learned rate that trains the storey below, as a task."""
    return lopt.MetaTask(lopt.InnerTraining(task, lopt.LearnableSGD(rate), horizon))


def test_the_derivative_passes_through_three_storeys():
    top = storey(storey(storey(TASK, 0.05, 2), 0.5, 2), 0.5, 2)
    theta, loss = top.init(KEY), quick_jit(lambda theta: top.loss(theta, KEY))
    slope = quick_jit(jax.grad(lambda theta: top.loss(theta, KEY)))(theta)["learning_rate"]
    raw = theta["learning_rate"]
    above, below = (loss({"learning_rate": raw + step}) for step in (1e-4, -1e-4))
    assert slope < 0
    np.testing.assert_allclose(slope, (above - below) / 2e-4, rtol=1e-5)


def test_a_learned_optimizer_trains_the_optimizer_of_an_optimizer():
    """By PES, and just as SGD at the rate that its weights stand for."""
    inner = lopt.InnerTraining(storey(TASK, 0.05, 2), lopt.LearnableSGD(0.5), 4)
    meta, learned = lopt.Mean(lopt.PES(inner, 2, sigma=0.1), 4), lopt.LearnableSGD(0.3)

    def train(optimizer):
        state = lopt.start(meta, optimizer, inner.learned.init(KEY), KEY)
        return lopt.unroll(meta, optimizer, state, 6)

    state, losses = quick_jit(lambda theta: train(learned.optimizer(theta)))(learned.init(KEY))
    other, theirs = quick_jit(lambda: train(optax.sgd(0.3)))()
    np.testing.assert_allclose(losses, theirs, rtol=1e-9)
    np.testing.assert_allclose(
        state.params["learning_rate"], other.params["learning_rate"], rtol=1e-9
    )
    assert state.params["learning_rate"] > jnp.log(0.5)
