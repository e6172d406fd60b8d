"""Moments of the noisy quadratic against other derivations of them, and against sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.analysis import (
    ExcessLoss,
    NoisyQuadratic,
    NoisyQuadraticTask,
    Schedule,
    advance,
    begin,
    chebyshev_quadratic,
    component_losses,
    constant_schedule,
    expected_loss,
    expected_losses,
    fit_inverse_time,
    inverse_time_schedule,
    optimal_schedule,
    scheduled_momentum,
    spectral_density,
)
from lopt.analysis.horizon.quadratic import band_shares


def random_schedule(steps, seed=0):
    rng = np.random.default_rng(seed)
    return Schedule(rng.uniform(0.05, 1.5, steps), rng.uniform(0, 0.95, steps))


def test_moments_agree_with_means_and_variances():
    """Theorem 1 of Wu et al. 2018, written down as it stands there, in a plain loop."""
    problem, schedule = chebyshev_quadratic(7), random_schedule(30)
    h, noise = problem.curvatures, problem.noise
    mean, mean_v = np.full(7, 8.0), np.zeros(7)
    var, var_v, cov = problem.start - mean**2, np.zeros(7), np.zeros(7)
    moments = begin(problem)
    for a, mu in zip(schedule.learning_rates, schedule.momenta, strict=True):
        mean_v = mu * mean_v - a * h * mean
        mean = mean + mean_v
        var_v = mu**2 * var_v + (a * h) ** 2 * (var + noise) - 2 * mu * a * h * cov
        var, cov = (
            (1 - 2 * a * h) * var + var_v + 2 * mu * cov,
            mu * cov - a * h * var + var_v,
        )
        moments = advance(problem, moments, jnp.asarray(a), jnp.asarray(mu))
        np.testing.assert_allclose(moments.position, mean**2 + var, rtol=1e-12)
        np.testing.assert_allclose(moments.velocity, mean_v**2 + var_v, rtol=1e-12)
        np.testing.assert_allclose(moments.cross, mean * mean_v + cov, rtol=1e-9, atol=1e-9)


def test_losses_are_those_of_the_last_step_and_of_the_components():
    problem, schedule = chebyshev_quadratic(5), random_schedule(9)
    losses = expected_losses(problem, schedule)
    assert losses.shape == (10,)
    np.testing.assert_allclose(losses[-1], expected_loss(problem, schedule), rtol=1e-12)
    np.testing.assert_allclose(losses, component_losses(problem, schedule).sum(1), rtol=1e-12)


def test_losses_can_be_differentiated():
    problem, schedule = chebyshev_quadratic(5), random_schedule(6)
    as_jax = jax.tree.map(jnp.asarray, schedule)
    grads = jax.grad(lambda s: expected_loss(problem, s))(as_jax)
    for name in ("learning_rates", "momenta"):
        for i in range(6):
            values = []
            for shift in (1e-6, -1e-6):
                fields = dict(vars(schedule))
                fields[name] = fields[name] + shift * (np.arange(6) == i)
                values.append(expected_loss(problem, Schedule(**fields)))
            slope = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose(getattr(grads, name)[i], slope, rtol=1e-5, atol=1e-5)


def test_a_few_nodes_stand_for_many_directions():
    schedule = random_schedule(20)
    many = expected_losses(chebyshev_quadratic(1000), schedule)
    few = expected_losses(chebyshev_quadratic(1000, nodes=21), schedule)
    np.testing.assert_allclose(few, many, rtol=1e-10)


def test_bands_hold_equally_many_directions():
    problem = chebyshev_quadratic(100, nodes=7)
    shares = band_shares(problem, 5)
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(problem.weights @ shares, 20)
    assert shares[0, 0] == 1  # the steepest


def test_what_is_wrong_is_named():
    ones = np.ones(3)
    with pytest.raises(ValueError, match=r"NoisyQuadratic\(noise\).*-1"):
        NoisyQuadratic(ones, ones, -ones, ones)
    with pytest.raises(ValueError, match="nodes=0"):
        chebyshev_quadratic(nodes=0)


def sample(problem, schedule, slices, at_once, key):
    """Returns mean and standard error of the excess loss before each step but the first."""
    steps = len(schedule.momenta)
    task, optimizer = NoisyQuadraticTask(problem), scheduled_momentum(schedule)

    def one(key):
        init_key, run_key = jax.random.split(key)
        state = lopt.start(task, optimizer, task.init(init_key), run_key)
        return lopt.unroll(task, optimizer, state, steps, record=ExcessLoss(problem))[1]

    def several(key):
        losses = jax.vmap(one)(jax.random.split(key, at_once))
        return losses.sum(0), (losses**2).sum(0)

    first, second = jax.jit(lambda k: jax.lax.map(several, jax.random.split(k, slices)))(key)
    count = slices * at_once
    mean = np.asarray(first).sum(0) / count
    return mean, np.sqrt((np.asarray(second).sum(0) / count - mean**2) / count)


@pytest.mark.parametrize(
    ("slices", "at_once"),
    [(10, 2000), pytest.param(100, 10_000, marks=pytest.mark.slow)],
    ids=["twenty_thousand", "a_million"],
)
def test_sampled_runs_confirm_the_moments(slices, at_once, key):
    problem = chebyshev_quadratic(6, nodes=4, condition=20.0, start=3.0)
    decaying = inverse_time_schedule(1.2, 1.0, 5.0, 25).learning_rates
    schedule = Schedule(decaying, np.linspace(0.9, 0.1, 25))
    exact = np.asarray(expected_losses(problem, schedule))[:-1]
    mean, error = sample(problem, schedule, slices, at_once, key)
    assert (error < exact * 30 / np.sqrt(slices * at_once)).all()
    # The largest of 25 deviations of a correct sample is below four in 998 cases of 1000.
    assert np.abs((mean - exact) / error).max() < 4


ONE = np.ones(1)
BAD = {
    "curvature": (lambda: NoisyQuadratic(ONE * np.nan, ONE, ONE, ONE), "curvatures.*finite"),
    "noise": (lambda: NoisyQuadratic(ONE, ONE, ONE * np.nan, ONE), "noise.*finite"),
    "condition": (lambda: chebyshev_quadratic(condition=np.nan), "condition=nan.*finite"),
    "below one": (lambda: chebyshev_quadratic(condition=0.5), "condition=0.5.*at least 1"),
    "horizon": (lambda: constant_schedule(0.1, 0.9, 0), "horizon=0.*try 250"),
    "rate": (lambda: constant_schedule(np.nan, 0.9, 3), "learning_rate=nan.*finite"),
    "constant": (lambda: inverse_time_schedule(0.1, 1.0, -3.0, 5), "time_constant=-3.0.*positive"),
    "fit": (
        lambda: fit_inverse_time(chebyshev_quadratic(3), 5, 0.0),
        "time_constant=0.0.*positive",
    ),
    "largest": (
        lambda: fit_inverse_time(chebyshev_quadratic(3), 5, 2.0, 0.0),
        "largest_rate=0.0.*positive",
    ),
    "box": (
        lambda: optimal_schedule(
            chebyshev_quadratic(3), constant_schedule(0.1, 0.0, 2), (1.0, 0.0)
        ),
        r"learning_rates=\(1.0, 0.0\).*the least and the largest",
    ),
    "no box": (
        lambda: optimal_schedule(
            chebyshev_quadratic(3), constant_schedule(0.1, 0.0, 2), momenta=(np.nan, 0.0)
        ),
        r"momenta=\(nan, 0.0\)",
    ),
    "order": (
        lambda: spectral_density(TASK, jnp.ones(2), jax.random.key(0), order=0),
        "order=0.*positive integer",
    ),
}
TASK = lopt.tasks.Quadratic(jnp.ones(2), jnp.zeros(2))


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_have_one_clear_error(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
