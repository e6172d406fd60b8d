"""Operators equal their definitions, and neither their values nor their derivatives blow up."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.symbolic.operators import OPERATORS

UNARY = {
    "negative": lambda x: -x,
    "abs": abs,
    "sign": lambda x: (x > 0) - (x < 0),
    "square": lambda x: x * x,
    "cube": lambda x: x * x * x,
    "sqrt": lambda x: math.sqrt(abs(x)),
    "log": lambda x: math.log(abs(x) + 1e-8),
    "exp": math.exp,
    "tanh": math.tanh,
    "sinh": math.sinh,
    "asinh": math.asinh,
    "relu": lambda x: x if x > 0 else 0.0,
    "erfc": math.erfc,
}
BINARY = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y if y else 0.0,
    "pow": lambda x, y: math.copysign(abs(x) ** y, x) if x else 0.0,
    "max": max,
    "min": min,
    "greater": lambda x, y: float(x > y),
    "quotient": lambda x, y: x / math.sqrt(1 + y * y),
}
NUMBERS = (-3.0, -1.5, -1e-3, -1e-8, 0.0, 1e-8, 0.02, 1.0, 2.5)
# Where textbook functions have no value, 32 bits have no digits, or a derivative has none.
EXTREME = (0.0, 1e-44, 1e-38, 1e-30, 1e-20, 1e-18, 2e-18, 1e-12, 1e-5, 1.0, 60.0, 75.0, 1e5)
EXTREME += (1e9, 1e12, 1e18)
ARITHMETIC = {"add", "subtract", "multiply"}


def test_every_operator_has_a_definition_here():
    assert set(UNARY) | set(BINARY) == set(OPERATORS)


@pytest.mark.parametrize("np_", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", OPERATORS)
def test_value_is_the_definition(name, np_):
    operator = OPERATORS[name]
    if operator.arity == 1:
        arguments = np.asarray(NUMBERS)[None]
        expected = [UNARY[name](x) for x in NUMBERS]
    else:
        arguments = np.asarray([(x, y) for x in NUMBERS for y in NUMBERS]).T
        expected = [BINARY[name](x, y) for x, y in arguments.T.tolist()]
    found = np.asarray(operator.apply(np_, *map(np_.asarray, arguments)))
    # A derivative above 1e36 counts as a division by zero; no power of these comes near.
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_declared_parity_holds(name):
    operator = OPERATORS[name]
    if operator.arity == 2:
        assert not operator.odd
        assert not operator.even
        return
    x = np.asarray(NUMBERS)
    here, there = operator.apply(np, x), operator.apply(np, -x)
    assert operator.odd == np.allclose(there, -here)
    assert operator.even == np.allclose(there, here)


def _extremes(name, dtype):
    signed = np.asarray([*EXTREME, *(-x for x in EXTREME)], np.float64)
    if OPERATORS[name].arity == 1:
        return jnp.asarray(signed, dtype)[None]
    x, y = np.meshgrid(signed, signed)
    return jnp.asarray(np.stack([x.ravel(), y.ravel()]), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_extreme_arguments_give_finite_values_and_derivatives(name, dtype):
    operator = OPERATORS[name]
    arguments = _extremes(name, dtype)
    values = operator.apply(jnp, *arguments)
    assert values.dtype == dtype
    assert jnp.isfinite(values).all()
    host = operator.apply(np, *np.asarray(arguments))
    assert np.isfinite(host).all()
    assert host.dtype == dtype

    def one(*scalars):
        return operator.apply(jnp, *scalars)

    places = tuple(range(operator.arity))
    # Forward and backward products have different intermediate values.
    backward = jax.vmap(jax.grad(one, places))(*arguments)
    forward = jax.vmap(jax.jacfwd(one, places))(*arguments)
    for slope in (*backward, *forward):
        assert slope.dtype == dtype
        assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_derivative_is_that_of_differences(name):
    operator = OPERATORS[name]
    points = np.asarray([-1.7, -0.6, 0.4, 1.3])
    arguments = [points, np.asarray([0.9, 1.1, -0.7, 1.9])][: operator.arity]
    for place in range(operator.arity):

        def moved(step, place=place):
            return operator.apply(np, *(x + step * (i == place) for i, x in enumerate(arguments)))

        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
        slope = jax.vmap(jax.grad(lambda *xs: operator.apply(jnp, *xs), place))
        found = slope(*map(jnp.asarray, arguments))
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_what_is_never_touched_does_not_move():
    zero = jnp.zeros(())
    for name in ("divide", "pow", "quotient", "multiply", "add", "subtract", "max", "min"):
        assert OPERATORS[name].apply(jnp, zero, zero) == 0


def test_small_second_moments_still_normalise():
    for gradient in (1e-6, 1e-9, 1e-13):
        root = OPERATORS["sqrt"].apply(np, np.float64(gradient) ** 2)
        assert OPERATORS["divide"].apply(np, gradient, root) == pytest.approx(1, abs=1e-12)


def test_guards_saturate_with_the_sign():
    divide, power = OPERATORS["divide"].apply, OPERATORS["pow"].apply
    assert divide(np, -1e10, 1e-12) == pytest.approx(-1e18)
    assert divide(np, 1e10, 1e-19) == 0
    assert power(np, -1e5, 20.0) == pytest.approx(-math.exp(69))
    assert power(np, 1e-12, -2.0) == 0
    assert OPERATORS["exp"].apply(np, 1e6) == pytest.approx(math.exp(69))
    assert OPERATORS["square"].apply(np, 1e30) == 1e20
