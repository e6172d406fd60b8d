"""Trainings of fresh tasks, the tuner, and work that is spread over devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.experiment.baselines import BASELINES, tune
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
    grid = np.array([-1.0, 0.5, 2.0, 3.0])

    def train(value):
        return jnp.where(value < 0, jnp.nan, (value - 1.9) ** 2), {"twice": 2 * value}

    found = tune(lambda value: value, grid, train)
    assert (found.value, found.at_edge) == (2.0, False)
    assert found.result["twice"] == 4.0
    np.testing.assert_allclose(found.results["twice"], [-2, 1, 4, 6])
    assert tune(lambda value: value, grid[:2], train).at_edge
    nothing = tune(lambda value: value, grid, lambda value: (jnp.nan * value, ()))
    assert (nothing.value, nothing.at_edge) == (-1.0, True)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_tuned_on_a_parabola(name, keys):
    task = lopt.tasks.Quadratic(jnp.ones(2), jnp.array([1.0, 2.0]))
    baseline = BASELINES[name]
    assert baseline.rates.dtype == dtype_of(task) == jnp.float64
    np.testing.assert_allclose(baseline.rates[2:] / baseline.rates[:-2], 10)

    def train(optimizer):
        return jnp.mean(trainings(task, optimizer, keys, 30)[1][:, -1]), ()

    found = tune(baseline.factory, baseline.rates, train)
    assert float(train(baseline.factory(found.value))[0]) < 0.2


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
