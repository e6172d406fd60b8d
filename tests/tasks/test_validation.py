"""The validation loss that reaches the optimizer, and an optimizer that learns to use it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.tasks import WithValidation, batch_norm_classification, image_data

KEY = jax.random.key(0)


class Overfitted(lopt.AbstractTask):
    """Training pulls x to 1 and says nothing; validation losses are those around `centre`."""

    centre: jax.Array

    def init(self, key):
        return jnp.zeros(())

    def batch(self, key, split="train"):
        return jnp.ones(()) if split == "train" else self.centre

    def loss(self, params, batch):
        return (params - batch) ** 2


class StopsEarly(lopt.AbstractLearnedOptimizer):
    """The step -rate * sigmoid(bias + weight * validation loss) * gradient."""

    def init(self, key):
        return {"bias": jnp.zeros(()), "weight": jnp.zeros(())}

    def begin(self, theta, params, num_steps=None):
        return ()

    def update(self, theta, grads, state, params=None, *, validation_loss, **_):
        rate = 0.2 * jax.nn.sigmoid(theta["bias"] + theta["weight"] * validation_loss)
        return jax.tree.map(lambda grad: -rate * grad, grads), state


def test_it_is_measured_every_few_steps_and_kept_in_between():
    task = WithValidation(lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), 0.5), every=3)
    optimizer = optax.sgd(0.1)
    state = lopt.start(task, optimizer, task.init(KEY), KEY)
    state, steps = lopt.unroll(task, optimizer, state, 7, record=lambda step: step)
    found = steps.extra["validation_loss"]
    assert len(np.unique(found)) == 3
    np.testing.assert_array_equal(found, found[jnp.array([0, 0, 0, 3, 3, 3, 6])])
    for i in (0, 3, 6):
        batch = task.batch(jax.random.fold_in(steps.key[i], 2), "valid_inner")
        np.testing.assert_allclose(found[i], task.task.loss(steps.params[i], batch))
    assert state.estimator_state[1][0] == 7
    assert state.estimator_state[1][1] == found[-1]


def test_the_rest_is_the_task_itself():
    """Running statistics too."""
    images = np.random.default_rng(0).uniform(size=(40, 4, 4, 1))
    data = image_data(images, np.arange(40) % 3, None, None, 3, 4)
    plain = batch_norm_classification(data, (5,), batch_size=8)
    task, optimizer = WithValidation(plain, every=2), optax.sgd(0.1)
    ours, theirs = (
        lopt.unroll(one, optimizer, lopt.start(one, optimizer, one.init(KEY), KEY), 5)
        for one in (task, plain)
    )
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    inner, state = ours[0].estimator_state[0], theirs[0].estimator_state
    jax.tree.map(np.testing.assert_array_equal, inner, state)
    found, expected = (
        lopt.judge(one, end.params, end.estimator_state, KEY)
        for one, (end, _) in ((task, ours), (plain, theirs))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Anywhere(lopt.AbstractTaskFamily):
    """Where validation losses are least differs from task to task."""

    def draw(self, key):
        centre = jax.random.uniform(key, minval=0.2, maxval=0.8)
        return WithValidation(Overfitted(centre), every=1)


@pytest.mark.standard_promotion
def test_an_optimizer_learns_to_use_it():
    """Steps become small where the validation loss is, better than any fixed step."""
    inner = lopt.InnerTraining(Anywhere(), StopsEarly(), 30, lopt.FinalLoss(split="valid_inner"))
    meta, optimizer = lopt.Mean(lopt.MetaTask(inner), 8), optax.adam(0.3)
    state = lopt.start(meta, optimizer, inner.learned.init(KEY), KEY)
    state, losses = lopt.unroll(meta, optimizer, state, 200)
    assert state.params["weight"] > 3
    assert state.params["bias"] < -1
    assert losses[-20:].mean() < 0.1 * losses[0]

    keys = jax.random.split(jax.random.key(1), 50)
    score = jax.jit(
        jax.vmap(lambda theta: jax.vmap(inner.meta_loss, (None, 0))(theta, keys).mean())
    )
    biases = jnp.linspace(-8.0, 2.0, 50)
    fixed = score({"bias": biases, "weight": jnp.zeros(50)})
    ours = score(jax.tree.map(lambda leaf: leaf[None], state.params))
    assert ours[0] < 0.3 * fixed.min()


def test_bad_input():
    with pytest.raises(ValueError, match=r"WithValidation\(every=0\).*try every=10"):
        WithValidation(Overfitted(jnp.zeros(())), every=0)


def test_families_draw_tasks_that_tell_it():
    quadratic = lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), 0.5)
    scaled = lopt.tasks.InitialScale(quadratic, 0.5, 2.0)
    task = WithValidation(scaled).draw(KEY)
    params = task.init(KEY)
    found, _ = task.estimate(params, task.prepare(params, KEY), KEY)
    assert found.extra["validation_loss"] > 0
    np.testing.assert_array_equal(
        task.loss(params, jnp.ones(3)), scaled.draw(KEY).loss(params, jnp.ones(3))
    )
    mixture = lopt.tasks.Mixture([quadratic, lopt.tasks.QuadraticFamily(5)])
    both = WithValidation(mixture).architectures()
    assert [type(each) for each in both] == [WithValidation, WithValidation]
    inner = lopt.InnerTraining(WithValidation(mixture), StopsEarly(), 4)
    meta = lopt.Mean(lopt.Sum((lopt.ES(inner), lopt.PES(inner, 2))), 4)
    theta = StopsEarly().init(KEY)
    estimate, _ = jax.jit(lambda *a: meta.estimate(*a))(theta, meta.prepare(theta, KEY), KEY)
    assert jnp.isfinite(estimate.loss)
