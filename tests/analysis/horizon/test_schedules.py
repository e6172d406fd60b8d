"""Greedy, fixed, look-ahead and optimised schedules: theorems, twins, and the table."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lopt.analysis import (
    NoisyQuadratic,
    Schedule,
    acceptance_rows,
    adam_schedule,
    best_fixed_schedule,
    chebyshev_quadratic,
    constant_schedule,
    expected_loss,
    expected_losses,
    fit_inverse_time,
    greedy_schedule,
    inverse_time_schedule,
    look_ahead_schedule,
    optimal_schedule,
    paper_study,
    study,
)
from lopt.analysis.horizon.minimise import minimise_in_box

losses_of = jax.jit(expected_losses)
anything = (-np.inf, np.inf)


def without_noise(problem):
    return NoisyQuadratic(problem.curvatures, problem.weights, 0 * problem.noise, problem.start)


def test_greedy_is_optimal_on_a_sphere():
    """Theorem 3: one curvature, no momentum."""
    one = np.ones(1)
    problem = NoisyQuadratic(one, one, one, np.full(1, 10.0))
    greedy = greedy_schedule(problem, 20, momentum=False)
    assert losses_of(problem, greedy)[-1] == pytest.approx(0.02487562189, abs=1e-11)
    start = constant_schedule(0.3, 0.0, 20)
    best = optimal_schedule(problem, start, momenta=(0.0, 0.0))
    np.testing.assert_allclose(best.learning_rates, greedy.learning_rates, rtol=1e-9)
    second = np.asarray(2 * losses_of(problem, greedy)[:-1])
    np.testing.assert_allclose(greedy.learning_rates, second / (second + 1), rtol=1e-12)


def conjugate_gradient(problem, steps):
    """Returns the losses of conjugate gradient from sqrt(start), to solve h theta = 0."""
    h, x = problem.curvatures, np.sqrt(problem.start)
    residual = -h * x
    direction, losses = residual, []
    for _ in range(steps):
        rate = residual @ residual / (direction @ (h * direction))
        x = x + rate * direction
        new = residual - rate * h * direction
        direction = new + new @ new / (residual @ residual) * direction
        residual = new
        losses.append(0.5 * np.sum(h * x**2))
    return losses


def test_greedy_without_noise_is_conjugate_gradient():
    """Theorem 4: with momentum, and no noise."""
    problem = without_noise(chebyshev_quadratic(40, condition=100.0, start=1.0))
    losses = losses_of(problem, greedy_schedule(problem, 20))
    np.testing.assert_allclose(losses[1:], conjugate_gradient(problem, 20), rtol=1e-9)


def test_greedy_without_noise_on_the_paper_s_spectrum():
    problem = without_noise(chebyshev_quadratic())
    losses = np.asarray(losses_of(problem, greedy_schedule(problem, 100)))
    np.testing.assert_allclose(losses[[25, 50, 100]], [0.34096, 3.0316e-4, 2.136e-10], rtol=2e-4)
    descent = np.asarray(losses_of(problem, greedy_schedule(problem, 250, momentum=False)))
    known = [18.535, 5.779, 1.2244, 0.33820, 0.032579]
    np.testing.assert_allclose(descent[[25, 50, 100, 150, 250]], known, rtol=1e-4)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_look_ahead_of_one_is_greedy(momentum):
    problem = chebyshev_quadratic(1000, nodes=13)
    greedy = losses_of(problem, greedy_schedule(problem, 12, momentum))
    ahead = losses_of(problem, look_ahead_schedule(problem, 12, 1, momentum))
    np.testing.assert_allclose(ahead, greedy, rtol=1e-7)


def test_a_look_ahead_that_does_not_divide_the_horizon_has_a_shorter_last_block():
    problem = chebyshev_quadratic(1000, nodes=13)
    rates = look_ahead_schedule(problem, 12, 5).learning_rates
    assert [len(np.unique(rates[a:b])) for a, b in ((0, 5), (5, 10), (10, 12))] == [1, 1, 1]
    assert len(np.unique(rates)) == 3


def test_the_best_fixed_pair_is_that_of_a_simplex_search():
    problem = chebyshev_quadratic(1000, nodes=31)
    fixed = best_fixed_schedule(problem, 30)
    final = jax.jit(lambda a, m: expected_loss(problem, Schedule(jnp.full(30, a), jnp.full(30, m))))
    begin = (float(fixed.learning_rates[0]) * 1.3, float(fixed.momenta[0]) - 0.05)
    found = scipy.optimize.minimize(lambda x: float(final(*x)), begin, method="Nelder-Mead")
    assert float(final(fixed.learning_rates[0], fixed.momenta[0])) == pytest.approx(
        found.fun, rel=1e-7
    )


def test_the_optimum_in_a_box_is_that_of_a_quasi_newton_method():
    problem = chebyshev_quadratic(1000, nodes=13)
    pairs = ((0.1, 0.9), (1.0, 0.0))  # which lead to different local optima
    ours = [optimal_schedule(problem, constant_schedule(*pair, 12)) for pair in pairs]
    best = min(ours, key=lambda schedule: float(losses_of(problem, schedule)[-1]))
    loss = float(losses_of(problem, best)[-1])
    slope = jax.jit(jax.value_and_grad(lambda x: expected_loss(problem, Schedule(x[:12], x[12:]))))

    def both(x):
        value, grads = slope(x)
        return float(value), np.asarray(grads)

    bounds = [(0, 1)] * 12 + [(0, 0.99)] * 12
    begins = [np.r_[np.full(12, a), np.full(12, m)] for a, m in pairs]
    found = min(
        scipy.optimize.minimize(both, x, jac=True, bounds=bounds, method="L-BFGS-B").fun
        for x in begins
    )
    assert loss <= found * (1 + 1e-6)
    # No rate can be improved: slopes are zero inside the box, and point outwards at its edge.
    x = np.r_[best.learning_rates, best.momenta]
    grads = both(x)[1]
    low, high = np.array(bounds, float).T
    inside = np.where(
        x <= low, np.minimum(grads, 0), np.where(x >= high, np.maximum(grads, 0), grads)
    )
    assert np.abs(inside).max() < 1e-6 * loss


def test_sweeps_refuse_negative_curvature():
    one = np.ones(1)
    with pytest.raises(ValueError, match="must be positive"):
        optimal_schedule(NoisyQuadratic(-one, one, one, one), constant_schedule(0.1, 0.0, 3))


def test_horizons_are_checked():
    problem = chebyshev_quadratic(3)
    with pytest.raises(ValueError, match="horizon=0"):
        greedy_schedule(problem, 0)
    with pytest.raises(ValueError, match="steps=9"):
        look_ahead_schedule(problem, 5, 9)


def test_the_minimum_in_a_box_is_found_at_its_edge_too():
    lower, upper = jnp.array([-1.0, 0.0]), jnp.array([3.0, 1.0])

    def bowl(x):
        return (x[0] - 1.2345) ** 4 + (x[0] - 1.2345) ** 2 + (x[1] + 0.5 * x[0]) ** 2

    found = jax.jit(lambda: minimise_in_box(bowl, lower, upper))()
    assert found[1] == 0
    gradient = jax.grad(bowl)(found)
    assert abs(gradient[0]) < 1e-9


@pytest.mark.standard_promotion
def test_one_call_returns_every_schedule():
    problem = chebyshev_quadratic(1000, nodes=41)
    names = []
    found = study(
        problem, 40, horizons=(1, 5, 10, 99), fitted_horizons=(5, 40), progress=names.append
    )
    assert list(found.look_ahead) == [1, 5, 10]
    assert list(found.fits) == [5, 40]
    assert found.unbounded is None
    assert len(names) == len(set(names))
    assert found.optimal.final_loss < found.adam.final_loss < found.fixed.final_loss
    assert found.optimal.final_loss < found.optimal_rate.final_loss < found.fixed_rate.final_loss
    np.testing.assert_allclose(found.optimal.bands.sum(1), found.optimal.losses, rtol=1e-10)
    assert found.fits[5].decay > found.fits[40].decay
    assert found.fits[5].run.final_loss > found.fits[40].run.final_loss


def test_a_float32_session_gets_the_same_schedule():
    problem = chebyshev_quadratic(1000, nodes=21)
    wide = greedy_schedule(problem, 20)
    with jax.enable_x64(False):
        narrow = greedy_schedule(problem, 20)
    assert narrow.learning_rates.dtype == np.float64
    np.testing.assert_array_equal(narrow.learning_rates, wide.learning_rates)


@pytest.mark.standard_promotion
@pytest.mark.slow
def test_every_number_of_the_table():
    found = paper_study()
    rows = acceptance_rows(found)
    assert len(rows) == 58
    assert not [(row.quantity, row.value) for row in rows if not row.within]
    times = [1, 10, 25, 50, 100, 150, 200, 250]
    curves = {
        "greedy": [2809.6, 291.8, 177.3, 127.96, 94.27, 79.24, 70.15, 63.858],
        "fixed": [24704, 10581, 2491.8, 631.3, 143.5, 63.24, 48.80, 42.140],
    }
    for name, known in curves.items():
        np.testing.assert_allclose(getattr(found, name).losses[times], known, rtol=4e-4)
    adam = [10442, 19232, 3349.6, 583.1, 39.74, 10.35, 5.815, 4.269]
    np.testing.assert_allclose(found.adam.losses[times], adam, rtol=3e-3)
    optimal = [3359.3, 11783, 2596.5, 321.98, 27.63, 8.543, 5.183, 3.9582]
    np.testing.assert_allclose(found.optimal.losses[times], optimal, rtol=3e-4)
    greedy_rates = [1.1862, 0.2959, 0.1335, 0.0774, 0.0461, 0.0343, 0.0279, 0.0238]
    at = np.array(times) - 1
    np.testing.assert_allclose(found.greedy.schedule.learning_rates[at], greedy_rates, atol=6e-5)
    kept = [0, 0.069, 0.038, 0.024, 0.015, 0.012, 0.010, 0.008]
    np.testing.assert_allclose(found.greedy.schedule.momenta[at], kept, atol=6e-4)
    ends = {"greedy": (0.322, 12.918), "fixed": (2.517, 8.703), "adam": (0.206, 0.399)}
    for name, known in ends.items():
        np.testing.assert_allclose(getattr(found, name).bands[-1][[0, -1]], known, atol=6e-4)
    decays = [fit.decay for fit in found.fits.values()]
    finals = [fit.run.final_loss for fit in found.fits.values()]
    assert (np.diff(decays) < 0).all()
    assert (np.diff(finals) < 0).all()


@pytest.mark.standard_promotion
@pytest.mark.slow
def test_losses_without_a_box_are_real():
    """Components grow by 1e40 on the way: in decimal arithmetic of 120 digits the loss stands."""
    mesh = chebyshev_quadratic(nodes=251)
    start = adam_schedule(mesh, best_fixed_schedule(mesh, 250))
    schedule = optimal_schedule(mesh, start, anything, anything, 500)
    with localcontext() as context:
        context.prec = 120
        rates = [Decimal(float(a)) for a in schedule.learning_rates]
        momenta = [Decimal(float(mu)) for mu in schedule.momenta]
        total = Decimal(0)
        fields = (mesh.curvatures, mesh.weights, mesh.noise, mesh.start)
        for row in zip(*fields, strict=True):
            h, weight, noise, position = (Decimal(float(value)) for value in row)
            velocity = cross = Decimal(0)
            for a, mu in zip(rates, momenta, strict=True):
                velocity = (
                    mu**2 * velocity - 2 * mu * a * h * cross + (a * h) ** 2 * (position + noise)
                )
                crossed = mu * cross - a * h * position
                position, cross = position + 2 * crossed + velocity, crossed + velocity
            total += weight * h * position / 2
    assert float(total) < 3.8269
    assert float(losses_of(mesh, schedule)[-1]) == pytest.approx(float(total), rel=1e-6)


def test_the_fitted_schedule_is_the_best_nearby():
    problem = chebyshev_quadratic(1000, nodes=41)
    rate, decay = fit_inverse_time(problem, 30, 10.0)
    final = float(losses_of(problem, inverse_time_schedule(rate, decay, 10.0, 30))[-1])
    assert rate == pytest.approx(2.0)  # its bound
    for other in (decay * 0.99, decay * 1.01):
        assert losses_of(problem, inverse_time_schedule(rate, other, 10.0, 30))[-1] > final
