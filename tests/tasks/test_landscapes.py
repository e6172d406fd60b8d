"""Landscapes: minima, gradients, starting points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lopt.tasks import Ackley, Beale, Rosenbrock, StyblinskiTang

KEY = jax.random.key(0)
LANDSCAPES = [
    Rosenbrock(),
    Rosenbrock(5, initial_scale=0.3),
    Ackley(),
    Ackley(7),
    Beale(),
    StyblinskiTang(),
    StyblinskiTang(4),
]


@pytest.mark.parametrize("task", LANDSCAPES, ids=str)
def test_minimum(task):
    np.testing.assert_allclose(task.loss(task.minimiser, ()), task.minimum, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(jax.grad(task.loss)(task.minimiser, ()), 0, atol=1e-10)
    # Nothing in the box that initial parameters come from lies lower.
    away = 5 * jax.random.uniform(KEY, (10_000, task.minimiser.size), minval=-1.0)
    assert jnp.min(jax.vmap(lambda x: task.loss(x, ()))(away)) > task.minimum


@pytest.mark.parametrize("task", LANDSCAPES, ids=str)
def test_gradient(task):
    params = task.init(KEY)
    assert params.shape == task.minimiser.shape
    assert task.batch(KEY) == ()
    check_grads(jax.jit(lambda x: task.loss(x, ())), (params,), order=1)
    assert task.loss(params.astype(jnp.float32), ()).dtype == jnp.float32


def test_known_values():
    assert np.isclose(Rosenbrock().loss(jnp.array([-1.2, 1.0]), ()), 24.2)
    assert np.isclose(Beale().loss(jnp.zeros(2), ()), 1.5**2 + 2.25**2 + 2.625**2)
    assert np.isclose(StyblinskiTang(3).loss(jnp.ones(3), ()), -15.0)
    ackley = 20 + np.e - 20 * np.exp(-0.2) - np.e
    assert np.isclose(Ackley(3).loss(jnp.ones(3), ()), ackley)


def test_starting_points():
    np.testing.assert_array_equal(Rosenbrock(3).init(KEY), [-1.2, 1.0, -1.2])
    for task in (Ackley(500), StyblinskiTang(500)):
        params = task.init(KEY)
        assert 4.9 < jnp.max(jnp.abs(params)) <= 5.0
        assert jnp.min(params) < 0 < jnp.max(params)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Rosenbrock(1), "Rosenbrock.*dim=1.*try"),
        (lambda: Ackley(0), "Ackley.*dim=0.*try"),
        (lambda: StyblinskiTang(-1), "StyblinskiTang.*dim=-1.*try"),
        (lambda: Beale(reach=-1.0), "Beale.*reach=-1.0.*try"),
        (lambda: Rosenbrock(initial_scale=float("inf")), "Rosenbrock.*initial_scale=inf.*try"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()
