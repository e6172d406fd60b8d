"""Optimizers that Optax lacks, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.learned import aggmo

KEY = jax.random.key(0)


def test_aggmo_is_its_formula():
    velocities, params, optimizer = np.zeros(3), 1.0, aggmo(0.2, damping=0.5)
    state, ours = optimizer.init(jnp.ones(())), jnp.ones(())
    for _ in range(5):
        updates, state = optimizer.update(3 * ours, state)
        ours = optax.apply_updates(ours, updates)
        velocities = np.array([0.0, 0.5, 0.75]) * velocities - 3 * params
        params = params + 0.2 * velocities.mean()
        np.testing.assert_allclose(ours, params, rtol=1e-12)


def test_one_velocity_is_sgd_and_its_hyperparameters_are_learned():
    task = lopt.tasks.Quadratic(jnp.array([1.0, 10.0]), jnp.array([1.0, -1.0]))
    learned = lopt.learnable(aggmo, learning_rate=0.02, damping=(0.1, "log"))
    meta = lopt.MetaTask(lopt.InnerTraining(task, learned, 10))
    theta, loss = learned.init(KEY), quick_jit(lambda *arguments: meta.loss(*arguments))
    slopes = quick_jit(jax.grad(meta.loss))(theta, KEY)
    for name, slope in slopes.items():
        along = [loss(theta | {name: theta[name] + step}, KEY) for step in (1e-5, -1e-5)]
        np.testing.assert_allclose(slope, (along[0] - along[1]) / 2e-5, rtol=1e-6)
    updates, _ = aggmo(0.1, count=1).update(jnp.ones(2), aggmo(0.1, count=1).init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.1)
    with pytest.raises(ValueError, match=r"aggmo\(count=0\) must be a positive integer"):
        aggmo(0.1, count=0)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        (lopt.learned.InverseTime(0.1, power=0.5, time_constant=2.0), [1, 1.5**-0.5, 2**-0.5]),
        (lopt.learned.Polynomial(0.1, steps=4, power=2.0), [1, 0.75**2, 0.5**2]),
    ],
    ids=["inverse time", "polynomial"],
)
def test_adam_decays_and_its_decay_is_learned(decay, factors):
    """The Adam variants that others are compared with are Adam and a schedule."""
    learned, adam = lopt.learnable(optax.adam, learning_rate=decay), optax.adam(0.1)
    theta, params = learned.init(KEY), jnp.array([1.0, -2.0])
    assert set(theta["learning_rate"]) == {"initial", "power"}
    state, other = learned.begin(theta, params), adam.init(params)
    for i, factor in enumerate(factors):
        grads = jnp.cos(params + i)
        ours, state = learned.update(theta, grads, state, params)
        theirs, other = adam.update(grads, other)
        np.testing.assert_allclose(ours, factor * theirs, rtol=1e-10)
