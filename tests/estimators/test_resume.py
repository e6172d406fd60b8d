"""Resumed episodes against closed forms, and schedules over estimates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Drift, Faulty, Position, estimate_of, linear_toy, particles, quick_jit

import lopt
from lopt.estimators import Resume, Scheduled

KEY = jax.random.key(0)


class Valley(Position):
    """The loss is (x - 2)^2: it falls and then rises, as x drifts past the middle."""

    def loss(self, params, batch):
        return (params - 2.0) ** 2


def walk(estimator, theta, num, num_windows):
    """Returns the gradients, and the ages after and losses of the windows, of some particles."""

    def one(key):
        def window(state, i):
            estimate, state = estimator.estimate(theta, state, jax.random.fold_in(key, i))
            return state, (estimate.grads, state.now.clock.age, estimate.loss, state)

        return jax.lax.scan(window, estimator.prepare(theta, key), jnp.arange(num_windows))[1]

    *arrays, states = quick_jit(jax.vmap(one))(jax.random.split(KEY, num))
    return *map(np.asarray, arrays), states


def test_pes_is_unbiased_at_every_age_of_episodes_that_were_resumed():
    """On this toy the loss at step t is t theta, and struggles wherever theta is positive.

    A window of two steps that ends at age n has the derivative n - 3/2. Without the sum of
    perturbations that belongs to a stored state it would be 1/2 after each resumption.
    """
    pes = lopt.PES(linear_toy(4), truncation=2, sigma=0.1, stagger=False)
    grads, ages, losses, _ = walk(Resume(pes, 0.7), jnp.full((), 0.3), 4000, 9)
    np.testing.assert_allclose(losses, 0.3 * (ages - 1.5), rtol=1e-9)
    assert set(np.unique(ages)) >= {2, 4, 6, 8}
    for age in (2, 4, 6, 8):
        found = grads[ages == age]
        error = found.std() / len(found) ** 0.5
        assert 8 * error < age - 1.5  # so that a missing perturbation would be seen
        assert abs(found.mean() - (age - 1.5)) < 4 * error
    assert (ages > 4).mean() > 0.2


def test_the_latest_struggling_state_is_stored_and_gone_on_from():
    """With theta = 1/2 the loss falls for four steps, rises in the next two, and ends."""
    inner = lopt.InnerTraining(Valley(), Drift(), 8)
    pes = lopt.PES(inner, truncation=2, sigma=1e-6, stagger=False)
    _, ages, losses, states = walk(Resume(pes, 0.999), jnp.full((), 0.5), 1, 8)
    np.testing.assert_array_equal(ages[0, :4], [2, 4, 6, 8])
    np.testing.assert_allclose(losses[0, :4], [3.125, 0.625, 0.125, 1.625], rtol=1e-4)
    # The window from age 6 rose: its beginning is stored, and resumed for another eight steps.
    np.testing.assert_array_equal(states.stored.clock.age[0, 2:4], [9, 6])
    np.testing.assert_array_equal(ages[0, 4:], [8, 10, 12, 14])
    np.testing.assert_array_equal(states.now.episodes.num_steps[0, 4:], 14)
    np.testing.assert_array_equal(states.now.episodes.train.step[0, 4:], ages[0, 4:])


class Timed(Drift):
    """Drift for runs of a known length, which it has in its state."""

    @property
    def needs_num_steps(self):
        return True

    def begin(self, theta, params, num_steps=None):
        return num_steps


def test_a_run_of_known_length_goes_on_to_its_own_end():
    inner = lopt.InnerTraining(Valley(), Timed(), 8)
    pes = lopt.PES(inner, truncation=2, sigma=1e-6, stagger=False)
    _, ages, _, states = walk(Resume(pes, 0.999), jnp.full((), 0.5), 1, 10)
    # The window from age 6 rose, and is resumed once; the end at 8 is not stored.
    np.testing.assert_array_equal(ages[0], [2, 4, 6, 8, 8, 2, 4, 6, 8, 8])
    assert (states.now.episodes.num_steps == 8).all()
    assert (states.now.episodes.train.opt_state == 8).all()


def test_pes_is_unbiased_where_runs_of_known_length_are_resumed():
    inner = lopt.InnerTraining(Position(), Timed(), 6)
    pes = lopt.PES(inner, truncation=2, sigma=0.1, stagger=False)
    grads, ages, losses, _ = walk(Resume(pes, 0.7), jnp.full((), 0.3), 4000, 9)
    np.testing.assert_allclose(losses, 0.3 * (ages - 1.5), rtol=1e-9)
    for age in (2, 4, 6):
        found = grads[ages == age]
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - (age - 1.5)) < 4 * error < 0.5 * (age - 1.5)
    assert (ages == 6).mean() > 0.36  # more than a third: resumed from there


def test_without_a_chance_it_is_the_estimator_itself():
    pes = lopt.PES(linear_toy(4), truncation=2)
    theta = jnp.full((), 0.3)
    ours, theirs = (particles(each, theta, KEY, 5, 4) for each in (Resume(pes, 0.0), pes))
    np.testing.assert_array_equal(ours, theirs)


def test_broken_episodes_are_not_stored():
    inner = lopt.InnerTraining(Faulty(1.0), lopt.LearnableSGD(), 4)
    estimator = Resume(lopt.TruncatedES(inner, truncation=2, stagger=False), 0.9)
    *_, states = walk(estimator, inner.learned.init(KEY), 3, 4)
    assert (states.stored.clock.age > states.stored.clock.length).all()


def test_what_cannot_be_resumed_is_refused():
    with pytest.raises(ValueError, match=r"Resume\(one=ES\) has no windows"):
        Resume(lopt.ES(linear_toy(4)))
    with pytest.raises(ValueError, match=r"Resume\(probability=1.0\) must be in \[0, 1\)"):
        Resume(lopt.PES(linear_toy(4), 2), 1.0)
    learned = lopt.learnable(
        lopt.learned.momentum_sgd,
        effective_rate=(lopt.learned.PerStep(0.1, length=4), "log"),
        momentum=0.9,
    )
    inner = lopt.InnerTraining(Position(), learned, 4)
    with pytest.raises(ValueError, match="without an end"):
        Resume(lopt.PES(inner, 2))


class Weighted(eqx.Module):
    weight: jax.Array

    def __call__(self, task, step, num_steps):
        return self.weight * step.loss


def test_a_number_follows_its_schedule_over_outer_steps():
    inner = lopt.InnerTraining(Position(), Drift(), 3, Weighted(jnp.zeros(())))
    meta = Scheduled(
        lopt.MetaTask(inner), lambda one: one.inner.objective.weight, lambda n: 1 + 10 * n
    )
    state = meta.prepare(jnp.ones(()), KEY)
    for weight in (1, 11, 21):
        estimate, state = estimate_of(meta)(jnp.ones(()), state, KEY)
        np.testing.assert_allclose(estimate.loss, weight)
        np.testing.assert_allclose(estimate.grads, weight)
    with pytest.raises(ValueError, match="must lead to arrays"):
        Scheduled(lopt.MetaTask(inner), lambda one: one.inner.horizon, float)
