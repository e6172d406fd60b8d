"""Trainings of fresh tasks, the tuner, and work that is spread over devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.experiment.baselines import BASELINES, tune, tuned_baseline
from lopt.experiment.trainings import (
    STREAMS,
    OverDevices,
    begin,
    drawn,
    dtype_of,
    mean_estimate,
    stream,
    trainings,
)

pytestmark = pytest.mark.standard_promotion
FAMILY = lopt.tasks.QuadraticFamily(3, noise_scale=0.1)


@pytest.fixture
def keys(key):
    return jax.random.split(key, 3)


def test_each_training_is_an_unroll_of_a_task_of_its_own(keys):
    optimizer = optax.sgd(0.1)
    states, losses = trainings(FAMILY, optimizer, keys, 6)
    assert losses.shape == (3, 6)
    for i, key in enumerate(keys):
        state = begin(FAMILY, optimizer, key)
        state, expected = lopt.unroll(drawn(FAMILY, key), optimizer, state, 6)
        np.testing.assert_allclose(losses[i], expected, rtol=1e-12)
        np.testing.assert_allclose(states.params[i], state.params, rtol=1e-12)
    assert len({float(value) for value in losses[:, 0]}) == 3


def test_trainings_go_on_and_records_are_computed_at_once(keys):
    optimizer = optax.adam(0.1)
    _, whole = trainings(FAMILY, optimizer, keys, 8)
    states, first = trainings(FAMILY, optimizer, keys, 3)
    _, second = trainings(FAMILY, optimizer, keys, 5, states=states)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-12)
    _, together = trainings(FAMILY, optimizer, keys, 8, record_size=100)
    np.testing.assert_allclose(together, whole, rtol=1e-12)


def test_streams_are_apart():
    keys = [jax.random.key_data(stream(name, seed)) for name in STREAMS for seed in (0, 1)]
    plain = [jax.random.key_data(jax.random.key(seed)) for seed in (0, 1)]
    for one, other in itertools.combinations([*keys, *plain], 2):
        assert (one != other).any()


def test_the_tuner_chooses_the_lowest_finite_score():
    grid = np.array([[-1.0, 7.0], [0.5, 7.0], [2.0, 7.0], [3.0, 7.0]])

    def scores(rows):
        return np.where(rows[:, 0] < 0, np.nan, (rows[:, 0] - 1.9) ** 2)

    assert tune(grid, scores, widens=True) == ((2.0, 7.0), False, 4)
    assert tune(grid[:2], scores) == ((0.5, 7.0), False, 2)
    rate = 0.5 * 10**0.5  # 0.5 is at the edge, 1.6 is not, as 5 is worse
    (values, at_edge, trials) = tune(grid[:2], scores, widens=True)
    np.testing.assert_allclose(values, (rate, 7.0))
    assert (at_edge, trials) == (False, 4)
    assert tune(grid, lambda rows: np.nan * rows[:, 0]) == ((-1.0, 7.0), False, 4)
    far = tune(grid[1:3], lambda rows: -rows[:, 0], widens=True)
    assert (far.at_edge, far.trials) == (True, 10)


@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam", "Lion"])
def test_every_baseline_is_tuned_on_a_parabola(name, keys):
    task = lopt.tasks.Quadratic(jnp.ones(2), jnp.array([1.0, 2.0]))
    assert dtype_of(task) == jnp.float64
    rates = np.sort(BASELINES[name].grid[:, 0])
    np.testing.assert_allclose(rates[2:] / rates[:-2], 10)
    found = tuned_baseline(task, keys, 30, name)
    optimizer = BASELINES[name].factory(found.values, 30)
    assert float(trainings(task, optimizer, keys, 30)[1][:, -1].mean()) < 0.5


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_work_is_mapped_over_items_in_batches(at_once):
    shared = {"matrix": jnp.arange(6.0).reshape(2, 3), "name": "not an array"}
    run = OverDevices(lambda s, item: (s["matrix"] @ item["x"], item["n"]), shared, at_once)
    for count in (7, 3):
        items = {"x": np.arange(3.0 * count).reshape(count, 3), "n": np.arange(count)}
        product, numbers = run(items)
        np.testing.assert_allclose(product, items["x"] @ np.arange(6.0).reshape(2, 3).T)
        assert numbers.tolist() == list(range(count))


def test_what_mapped_work_costs_is_measured(keys):
    run = OverDevices(lambda shared, key: jnp.ones(shared.shape) + jax.random.normal(key), keys, 2)
    run.trace(keys)
    traced = run.compile_seconds
    run.compile()
    assert run.compile_seconds > traced > 0
    assert run(keys).shape == (3, 3)
    assert run.seconds > 0
    assert run.memory >= 0


def test_a_mean_estimate_is_taken_where_theta_stays(key):
    task, theta = lopt.tasks.Quadratic(jnp.ones(2), jnp.ones(2)), jnp.array([2.0, 3.0])
    np.testing.assert_allclose(mean_estimate((task, theta), key, 4), theta - 1)
    losses = mean_estimate((task, theta), key, 4, lambda step: step.loss)
    np.testing.assert_allclose(losses, task.loss(theta, task.batch(key)))
