"""The simulation of workers in benchmarks/ agrees with closed forms."""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def sim():
    path = Path(__file__).parents[1] / "benchmarks" / "simulate_workers.py"
    spec = importlib.util.spec_from_file_location("simulate_workers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def exact(sim):
    return sim.Constants(spread=0.0, size=10**5)


def of_driver(c):
    """Seconds of the driver for each call and each estimate."""
    return c.send + c.size / c.bandwidth, c.receive + c.size / c.bandwidth


@pytest.mark.parametrize("stale", [0, 2])
def test_one_worker_takes_the_sum_of_all_costs(sim, exact, stale):
    result = sim.simulate(exact, 1, 3, stale=stale, steps=10)
    window = exact.overhead + 3 * exact.window + 2 * exact.latency
    period = window + sum(of_driver(exact)) + exact.take
    assert result.steps_per_second == pytest.approx(1 / period)
    assert result.windows_per_second == pytest.approx(3 / period)
    assert result.core_hours == pytest.approx(2 * 1000 * period / 3600)
    assert result.cost == pytest.approx(exact.price * result.core_hours)


@pytest.mark.parametrize("workers", [2, 10, 100, 1000])
@pytest.mark.parametrize("receive", [1e-4, 1e-3])
def test_equal_workers_in_step(sim, exact, workers, receive):
    exact = dataclasses.replace(exact, receive=receive)
    result = sim.simulate(exact, workers, 4 * workers, steps=5)
    send, receive = of_driver(exact)
    window = exact.overhead + 4 * exact.window + 2 * exact.latency
    # The last estimate is waited for, or the first and the queue behind it, or the driver.
    last, queue = workers * send + window + receive, send + window + workers * receive
    period = max(last, queue, workers * (send + receive)) + exact.take
    assert result.steps_per_second == pytest.approx(1 / period)
    assert (result.staleness, result.dropped, result.lost) == (0, 0, 0)


def test_the_driver_bounds_many_workers(sim, exact):
    workers = 500
    result = sim.simulate(exact, workers, workers, stale=2, steps=100)
    each = sum(of_driver(exact)) + exact.take / workers
    assert result.windows_per_second == pytest.approx(1 / each, rel=0.02)
    assert result.driver > 0.99


def test_staleness_is_what_is_in_flight_per_step(sim):
    # While an estimate is under way, those of all other workers come, once each.
    result = sim.simulate(sim.Constants(), 10, 40, stale=5, steps=500)
    assert result.staleness == pytest.approx(0.9, abs=0.02)


def test_the_slow_are_dropped_if_no_estimate_may_be_old(sim, exact):
    # While the slow half computes, the fast one takes two to three steps.
    shares = []
    for stale in (1, 3):
        result = sim.simulate(exact, 10, 160, stale=stale, speeds=(1.0, 0.25))
        shares.append(sum(result.used[1::2]) / sum(result.used))
    assert shares[0] < 0.05
    assert shares[1] == pytest.approx(0.2, abs=0.01)


def test_work_is_split_by_speed(sim, exact):
    assert sim.split(9, [1.0, 0.5]) == [6, 3]
    assert sim.split(7, [1.0] * 3) == [3, 2, 2]
    equal = sim.simulate(exact, 2, 30, speeds=(1.0, 0.5))
    fair = sim.simulate(exact, 2, 30, speeds=(1.0, 0.5), by_speed=True)
    assert fair.steps_per_second / equal.steps_per_second == pytest.approx(1.5, rel=0.01)
    with pytest.raises(ValueError, match="particles=3 must be at least"):
        sim.simulate(exact, 4, 3)


def test_failures_cost_the_restart_and_what_was_computed(sim, exact):
    mean, restart = 30.0, 5.0
    failing = dataclasses.replace(exact, between_failures=mean, restart=restart)
    result = sim.simulate(failing, 1, 100, steps=20_000)
    window = (100 * exact.window + exact.overhead) / mean
    # exp(window) tries until a window ends, of which all but one are lost; each is of a worker
    # that works for a mean of mean * (1 - exp(-window)).
    assert 1 / result.steps_per_second == pytest.approx((mean + restart) * math.expm1(window), 0.01)
    assert result.lost / result.sent == pytest.approx(-math.expm1(-window), 0.03)


@pytest.mark.parametrize("by_speed", [False, True])
@pytest.mark.parametrize("stale", [0, 1, 3])
def test_no_window_is_lost_from_the_books(sim, stale, by_speed):
    constants = sim.Constants(between_failures=50.0, restart=1.0)
    result = sim.simulate(
        constants, 7, 30, stale=stale, speeds=(1.0, 0.25), by_speed=by_speed, steps=200
    )
    assert result.lost > 0
    ended = sum(result.used) + result.dropped + result.lost
    assert result.sent == ended + result.in_flight
    assert sum(result.used) >= 30 * 200
    if not stale:
        assert sum(result.used) == 30 * 200
        assert (result.staleness, result.dropped) == (0, 0)


def test_prediction_is_compared_with_what_was_measured(sim, exact, capsys):
    rate = sim.simulate(exact, 2, 16).windows_per_second
    errors = sim.validate({1: 30.0, 2: rate / 1.1}, exact)
    assert errors[2] == pytest.approx(10)
    assert "error" in capsys.readouterr().out
