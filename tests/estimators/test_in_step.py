"""Episodes and their keys: what begins when, with what, and who shares it with whom."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Drift, estimate_of, quick_jit

import lopt
from lopt.estimators import LogUniformHorizon

SIGMA = 1e-3


class BeginsAtTheta(lopt.AbstractLearnedOptimizer):
    """SGD whose state is its rate: theta when the episode begins, and never looked at again."""

    def init(self, key):
        return jnp.asarray(0.3)

    def begin(self, theta, params, num_steps=None):
        return theta

    def update(self, theta, grads, state, params=None, *, value=None, **_):
        return -state * grads, state


def at_theta(horizon):
    task = lopt.tasks.Quadratic(jnp.array([1.0, 0.5]), jnp.array([0.0, 1.0]))
    return lopt.InnerTraining(task, BeginsAtTheta(), horizon)


# Windows as long as the episode, and what they then are.
WHOLE = {
    "TruncatedBackprop": (lopt.TruncatedBackprop, lopt.MetaTask),
    "TruncatedBackprop, at once": (
        lambda inner, t: lopt.TruncatedBackprop(inner, t, stagger=False),
        lopt.MetaTask,
    ),
    "OnlineForwardMode": (lopt.OnlineForwardMode, lopt.MetaTask),
    "OnlineForwardMode, random": (
        lambda inner, t: lopt.OnlineForwardMode(inner, t, 2),
        lambda inner: lopt.ForwardMode(inner, 2),
    ),
    "PES": (lopt.PES, lopt.ES),
    "NRES": (lopt.NRES, lopt.ES),
    "TruncatedES": (lopt.TruncatedES, lopt.ES),
    "Reparameterized": (
        lambda inner, t: lopt.Reparameterized(lopt.TruncatedBackprop(inner, t)),
        lambda inner: lopt.Reparameterized(lopt.MetaTask(inner)),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_window_as_long_as_the_episode_is_the_episode_from_the_first_on(name, key):
    """Law 2, also where the state that an optimizer begins with depends on theta."""
    inner = at_theta(6)
    windowed, whole = (
        build(*arguments)
        for build, arguments in zip(WHOLE[name], ((inner, 6), (inner,)), strict=True)
    )
    theta = inner.learned.init(key)
    state, estimate = windowed.prepare(theta, key), estimate_of(windowed)
    for i in range(2):
        this = jax.random.fold_in(key, i)
        ours, state = estimate(theta, state, this)
        truth = whole.estimate(theta, whole.prepare(theta, key), this)[0]
        np.testing.assert_allclose(ours.loss, truth.loss, rtol=1e-9)
        np.testing.assert_allclose(ours.grads, truth.grads, rtol=1e-8)
        assert abs(ours.grads) > 1e-6


FAMILY = lopt.InnerTraining(lopt.tasks.QuadraticFamily(2, 0.1, 1.0, 0.3), lopt.LearnableSGD(0.1), 4)
THETA = FAMILY.learned.init(jax.random.key(0))
PAIRS = LogUniformHorizon(2, 12)


def windowed_mix(inner=FAMILY):
    es = lopt.TruncatedES(inner, 2, SIGMA, schedule=PAIRS)
    backprop = lopt.TruncatedBackprop(inner, 2, schedule=PAIRS)
    return lopt.InverseVariance(es, lopt.Reparameterized(backprop, SIGMA), 3)


def assert_in_step(state):
    """Both terms have the same tasks, batches and clocks, and so have the two arms of the other."""
    first, second = state
    for node in (
        lambda s: jax.random.key_data(s.episode.task_key),
        lambda s: jax.random.key_data(s.episode.train.key),
        lambda s: s.episode.train.step,
        lambda s: s.clock.age,
        lambda s: s.clock.length,
    ):
        for arm in range(2):
            np.testing.assert_array_equal(node(first), node(second)[:, arm])


def test_both_terms_of_a_mix_walk_through_the_same_episodes(key):
    mix = windowed_mix()
    state, estimate = mix.prepare(THETA, key), estimate_of(mix)
    tasks = set()
    for i in range(12):
        _, state = estimate(THETA, state, jax.random.fold_in(key, i))
        assert_in_step(state)
        tasks |= set(map(tuple, jax.random.key_data(state[0].episode.task_key).tolist()))
    assert len(tasks) > 3 * 2


@pytest.mark.parametrize("term", [0, 1])
def test_what_is_compared_restarts_together(term, key):
    """When the run of one term breaks, or of one of its arms, nobody is left behind."""
    mix = windowed_mix()
    state, estimate = mix.prepare(THETA, key), estimate_of(mix)
    _, state = estimate(THETA, state, key)
    at = (slice(None),) if term == 0 else (slice(None), 1)
    state = eqx.tree_at(
        lambda s: s[term].episode.train.params,
        state,
        replace_fn=lambda p: p.at[at].set(jnp.nan),
    )
    for i in range(6):
        _, state = estimate(THETA, state, jax.random.key(i))
        assert_in_step(state)
    assert jnp.isfinite(state[term].episode.train.params).all()


def test_arms_restart_together(key):
    estimator = lopt.Reparameterized(lopt.TruncatedBackprop(FAMILY, 2, stagger=False), SIGMA)
    state = estimator.prepare(THETA, key)
    _, state = estimator.estimate(THETA, state, key)
    state = eqx.tree_at(
        lambda s: s.episode.train.params, state, replace_fn=lambda p: p.at[0].set(jnp.nan)
    )
    for i in range(3):
        _, state = estimator.estimate(THETA, state, jax.random.key(i))
        assert state.clock.age[0] == state.clock.age[1]
        keys = jax.random.key_data(state.episode.task_key)
        np.testing.assert_array_equal(keys[0], keys[1])


class NormalStart(lopt.AbstractTask):
    """The loss is the parameter, which starts at a normal number."""

    def init(self, key):
        return jax.random.normal(key)

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return params


def test_random_directions_are_independent_of_the_episode(key):
    """L = x_0^2 theta: the mean of v x_0^2 v is that of x_0^2, which is 1. Were v x_0: 3."""
    objective = lambda task, step, _: step.params**2 * step.updates  # noqa: E731
    inner, num = lopt.InnerTraining(NormalStart(), Drift(), 1, objective), 20_000
    for build in (
        lambda: lopt.ForwardMode(inner, 1),
        lambda: lopt.OnlineForwardMode(inner, 1, 1),
    ):
        one, keys = build(), jax.random.split(key, num)

        def estimate(key, one=one):
            theta = jnp.asarray(0.2)
            return one.estimate(theta, one.prepare(theta, jax.random.key(1)), key)[0].grads

        grads = np.asarray(quick_jit(jax.vmap(estimate))(keys))
        # E v^4 E x^4 - 1 = 8.
        assert abs(grads.mean() - 1) < 4 * (8 / num) ** 0.5


def test_lengths_are_independent_of_the_episode(key):
    """As the parameter never moves, where an episode started is seen in its state."""
    inner, num = lopt.InnerTraining(NormalStart(), Drift(), 1), 1_000
    pes = lopt.PES(inner, 1, SIGMA, schedule=LogUniformHorizon(1, 1_000))
    theta = jnp.asarray(0.0)

    def restarted(key):
        state = pes.prepare(theta, key)
        ended = lambda s: (s.clock.age, s.clock.outer_step)  # noqa: E731
        state = eqx.tree_at(ended, state, (state.clock.length, jnp.asarray(5, jnp.int32)))
        _, state = pes.estimate(theta, state, jax.random.fold_in(key, 1))
        return state.clock.length, state.episodes.train.params.mean()

    lengths, starts = quick_jit(jax.vmap(restarted))(jax.random.split(key, num))
    assert len(set(lengths.tolist())) > 100
    assert abs(np.corrcoef(np.log(lengths), starts)[0, 1]) < 4 / num**0.5


def test_partners_past_a_restart_differ_by_theta_alone(key):
    """With noise in the task, a difference between batches would be divided by sigma."""
    task = lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), noise_scale=5.0)
    inner = lopt.InnerTraining(task, lopt.LearnableSGD(0.1), 4)
    theta, sigma = inner.learned.init(key), 1e-7
    es = lopt.TruncatedES(inner, 2, sigma)
    smooth = lopt.Reparameterized(lopt.TruncatedBackprop(inner, 2), sigma)
    states = es.prepare(theta, key), smooth.prepare(theta, key)
    for i in range(5):
        this = jax.random.fold_in(key, i)
        estimate, first = es.estimate(theta, states[0], this)
        assert float(jnp.abs(estimate.grads["learning_rate"])) < 1e4
        _, second = smooth.estimate(theta, states[1], this)
        arms = second.episode.train.params
        assert 0 < float(jnp.abs(arms[0] - arms[1]).max()) < 1e-4
        states = first, second
