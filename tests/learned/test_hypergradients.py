"""Hypergradients: forward against reverse mode, differences and recursions derived by hand."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from toys import quick_jit

import lopt
from lopt.analysis.hypergradients import hypergradients
from lopt.learned import (
    Cosine,
    Exponential,
    InverseTime,
    PerStep,
    Polynomial,
    inverse_time_momentum,
    momentum_sgd,
    per_tensor,
)
from lopt.learned.safe_roots import with_safe_roots

KEY = jax.random.key(0)
# The derivative of JAX's own `pow` does not go with strict promotion.
pytestmark = pytest.mark.standard_promotion


class Regression(lopt.AbstractTask):
    """A small network on fresh points of a sine; input 2 is always zero, and so is "spare"."""

    dtype: Any = jnp.float64

    def init(self, key):
        weights = jax.random.normal(key, (12,), self.dtype)
        return {"a": weights[:9].reshape(3, 3), "b": weights[9:], "spare": jnp.zeros(2, self.dtype)}

    def batch(self, key, split="train"):
        points = jax.random.normal(key, (8, 2), self.dtype)
        return jnp.pad(points, ((0, 0), (0, 1)))

    def loss(self, params, batch):
        outputs = jnp.tanh(batch @ params["a"]) @ params["b"]
        unused = jnp.sum(params["spare"]) * 0 * jnp.sum(outputs)
        return jnp.mean((outputs - jnp.sin(batch[:, 0])) ** 2) + unused


P = functools.partial
SPARE = Regression().init(KEY)
OPTIMIZERS = {
    "sgd": lopt.learnable(optax.sgd, learning_rate=0.1),
    "momentum": lopt.learnable(optax.sgd, learning_rate=0.05, momentum=0.9),
    "nesterov": lopt.learnable(P(optax.sgd, nesterov=True), learning_rate=0.05, momentum=0.8),
    "rmsprop": lopt.learnable(optax.rmsprop, learning_rate=0.01, decay=0.9, eps=1e-6),
    "adam": lopt.learnable(optax.adam, learning_rate=0.03, b1=0.9, b2=0.99, eps=1e-3),
    "adamw": lopt.learnable(optax.adamw, learning_rate=0.03, b1=0.9, weight_decay=0.1),
    "lion": lopt.learnable(optax.lion, learning_rate=0.01, weight_decay=0.1),
    "adafactor": lopt.learnable(
        P(optax.adafactor, min_dim_size_to_factor=2, clipping_threshold=None),
        learning_rate=0.05,
        decay_rate=0.8,
    ),
    "learned rule": lopt.small_mlp((3,), step_multiplier=0.1),
    "per step": lopt.learnable(optax.sgd, learning_rate=PerStep(0.1, 5), momentum=PerStep(0.8, 5)),
    "inverse time": lopt.learnable(
        optax.adam, learning_rate=InverseTime(0.1, 0.7, 3.0, ("initial", "power", "time_constant"))
    ),
    "polynomial": lopt.learnable(
        optax.sgd, learning_rate=Polynomial(0.2, 4, 0.01, 1.5, ("initial", "final", "power"))
    ),
    "cosine": lopt.learnable(
        optax.sgd, learning_rate=Cosine(0.2, 4, 0.01, 1.5, ("initial", "final", "power"))
    ),
    "exponential": lopt.learnable(optax.sgd, learning_rate=Exponential(0.2, 0.8)),
    "per tensor": lopt.learnable(
        optax.adam,
        learning_rate=per_tensor({"a": Exponential(0.1, 0.9), "b": 0.05, "spare": 0.1}),
        b1=per_tensor(0.9, like=SPARE),
    ),
    "preset": inverse_time_momentum(0.05, power=0.5, time_constant=4.0),
}


def some(theta):
    """Moves theta a little, away from what is round."""
    return jax.tree.map(
        lambda leaf: leaf + 0.01 * jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape),
        theta,
    )


# The formulas of schedules are held against Optax's in their own tests.
FORMULAS = ("polynomial", "cosine", "exponential", "preset", "sgd")
FORMULAS += ("rmsprop", "adam", "lion", "per step", "inverse time")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in FORMULAS else ()) for name in OPTIMIZERS],
)
def test_forward_is_reverse_is_difference(name):
    inner = lopt.InnerTraining(Regression(), OPTIMIZERS[name], 5)
    theta = some(OPTIMIZERS[name].init(KEY))
    flat, unravel = ravel_pytree(theta)

    def loss(flat):
        return inner.meta_loss(unravel(flat), KEY)

    # Differences along single weights; along random directions if there are many.
    directions = jnp.eye(flat.size) if flat.size < 12 else jax.random.normal(KEY, (6, flat.size))
    step = 1e-6

    def all_of(flat):
        sides = jnp.concatenate([step * directions, -step * directions])
        plus, minus = jnp.split(jax.lax.map(lambda by: loss(flat + by), sides), 2)
        return jax.jacfwd(loss)(flat), jax.grad(loss)(flat), (plus - minus) / (2 * step)

    forward, reverse, differences = quick_jit(all_of)(flat)
    assert jnp.isfinite(forward).all()
    scale = jnp.abs(forward).max()
    np.testing.assert_allclose(forward, reverse, rtol=1e-10, atol=1e-13 * scale)
    np.testing.assert_allclose(directions @ forward, differences, rtol=1e-5, atol=1e-7 * scale)


class Chain(lopt.AbstractTask):
    """No quadratic: sum h (cosh(x - c) - 1) and neighbours that pull on each other."""

    def init(self, key):
        return jnp.array([0.3, -0.4, 0.8])

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        shifted = params - jnp.array([1.0, -1.0, 0.5])
        pull = jnp.sum((params[1:] - params[:-1]) ** 4)
        return jnp.sum(jnp.array([0.5, 1.0, 2.0]) * jnp.cosh(shifted)) + 0.1 * pull


def slope_by_hand(one_step, memory, horizon):
    """Carries the tangent of params along; `one_step` is given gradient and H times tangent."""
    task = Chain()
    params = task.init(KEY)
    tangent, total = jnp.zeros(3), 0.0
    gradient = jax.grad(lambda x: task.loss(x, ()))
    for t in range(horizon):
        g, curved = jax.jvp(gradient, (params,), (tangent,))
        total += jnp.dot(g, tangent) / horizon
        (step, step_tangent), memory = one_step(t, g, curved, memory)
        params, tangent = params + step, tangent + step_tangent
    return total


def momentum_by_hand(which, a=0.05, mu=0.9, beta=0.7, tau=4.0):
    def one_step(t, g, curved, memory):
        v, v_dot = memory
        rate = a * (1 + t / tau) ** -beta
        slope = {"a": rate / a, "beta": -rate * np.log1p(t / tau), "mu": 0.0}[which]
        new_dot = mu * v_dot + curved + (v if which == "mu" else 0)
        new = mu * v + g
        return (-rate * new, -slope * new - rate * new_dot), (new, new_dot)

    return slope_by_hand(one_step, (jnp.zeros(3), jnp.zeros(3)), 6)


def adam_by_hand(which, rate=0.05, b1=0.9, b2=0.99, eps=1e-3):
    def one_step(t, g, curved, memory):
        m, s, m_dot, s_dot = memory
        t = t + 1
        m_dot = b1 * m_dot + (1 - b1) * curved + ((m - g) if which == "b1" else 0)
        s_dot = b2 * s_dot + 2 * (1 - b2) * g * curved + ((s - g**2) if which == "b2" else 0)
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2
        # Optax adds epsilon to the corrected root.
        first, second = 1 - b1**t, 1 - b2**t
        mean, mean_dot = m / first, m_dot / first
        square, square_dot = s / second, s_dot / second
        if which == "b1":
            mean_dot = mean_dot + m * t * b1 ** (t - 1) / first**2
        if which == "b2":
            square_dot = square_dot + s * t * b2 ** (t - 1) / second**2
        root = jnp.sqrt(square)
        step, below = mean / (root + eps), (root + eps) ** 2
        step_dot = mean_dot / (root + eps) - mean * square_dot / (2 * root * below)
        step_dot = step_dot - (mean / below if which == "eps" else 0)
        rate_dot = 1.0 if which == "rate" else 0.0
        return (-rate * step, -rate_dot * step - rate * step_dot), (m, s, m_dot, s_dot)

    return slope_by_hand(one_step, (jnp.zeros(3),) * 4, 6)


def forward(learned, task=None, horizon=6):
    inner = lopt.InnerTraining(task or Chain(), learned, horizon)
    return quick_jit(jax.jacfwd(lambda theta: inner.meta_loss(theta, KEY)))(learned.init(KEY))


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("one_minus", [False, True])
def test_momentum_with_decay_by_hand_in_all_parametrisations(effective, one_minus):
    a, mu, beta = 0.05, 0.9, 0.7
    learned = inverse_time_momentum(a, mu, beta, 4.0, effective=effective, one_minus=one_minus)
    found = forward(learned)
    rate = found["effective_rate" if effective else "learning_rate"]
    by_a, by_mu, by_beta = (momentum_by_hand(which) for which in ("a", "mu", "beta"))
    # With a = l (1 - mu): d/dl = (1 - mu) d/da, and at a constant l, d/dmu = d/dmu - l d/da.
    expected_mu = by_mu - (a / (1 - mu) * by_a if effective else 0)
    expected_mu *= -(1 - mu) if one_minus else mu
    np.testing.assert_allclose(rate["initial"], a * by_a, rtol=1e-10)
    np.testing.assert_allclose(rate["power"], beta * by_beta, rtol=1e-10)
    np.testing.assert_allclose(found["momentum"], expected_mu, rtol=1e-9)


def test_adam_by_hand():
    learned = lopt.learnable(optax.adam, learning_rate=0.05, b1=0.9, b2=0.99, eps=1e-3)
    found = forward(learned)
    scales = {"rate": 0.05, "b1": -0.1, "b2": -0.01, "eps": 1e-3}
    for name, which in (("learning_rate", "rate"), ("b1", "b1"), ("b2", "b2"), ("eps", "eps")):
        np.testing.assert_allclose(
            found[name], scales[which] * adam_by_hand(which), rtol=1e-8, err_msg=name
        )


def test_the_preset_is_sgd_with_momentum():
    learned = inverse_time_momentum(0.05, 0.9, 0.7, 4.0, learn=("learning_rate", "power"))
    theta = learned.init(KEY)
    assert set(theta) == {"effective_rate"}
    np.testing.assert_allclose(theta["effective_rate"]["initial"], np.log(0.5))
    ours, theirs = learned.optimizer(theta), optax.sgd(lambda t: 0.05 / (1 + t / 4) ** 0.7, 0.9)
    params = []
    for optimizer in (ours, theirs):
        state = lopt.start(Chain(), optimizer, Chain().init(KEY), KEY)
        params.append(lopt.unroll(Chain(), optimizer, state, 5)[0].params)
    np.testing.assert_allclose(*params, rtol=1e-6)
    np.testing.assert_allclose(
        momentum_sgd(0.5, 0.9).update(jnp.ones(1), momentum_sgd(0.5, 0.9).init(jnp.ones(1)))[0],
        -0.05,
    )


ADAPTIVE = {
    name: getattr(optax, name)
    for name in (
        "adabelief",
        "adafactor",
        "adagrad",
        "adam",
        "adamw",
        "amsgrad",
        "nadam",
        "rmsprop",
    )
} | {
    "adafactor, factored": P(optax.adafactor, min_dim_size_to_factor=2),
    "adagrad, from zero": P(optax.adagrad, initial_accumulator_value=0.0),
    "rmsprop, outside": P(optax.rmsprop, eps_in_sqrt=False),
    "rmsprop, centered": P(optax.rmsprop, centered=True, momentum=0.9),
}


ALIKE = ("adabelief", "adamw", "amsgrad", "nadam", "rmsprop, centered")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in ADAPTIVE]
)
def test_a_gradient_of_zero_leaves_derivatives_finite(name):
    # A tensor without any gradient, and a column of another, in single precision.
    learned = lopt.learnable(ADAPTIVE[name], learning_rate=0.01)
    inner = lopt.InnerTraining(Regression(jnp.float32), learned, 3)
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), learned.init(KEY))

    def both(theta):
        return tuple(d(lambda t: inner.meta_loss(t, KEY))(theta) for d in (jax.jacfwd, jax.grad))

    forward, reverse = quick_jit(both)(theta)
    assert forward["learning_rate"].dtype == jnp.float32
    assert jnp.isfinite(forward["learning_rate"])
    assert forward["learning_rate"] != 0
    np.testing.assert_allclose(forward["learning_rate"], reverse["learning_rate"], rtol=1e-4)


def test_roots_are_safe_and_otherwise_as_they_were():
    def function(x, y):
        return {"sum": jnp.sqrt(x) + jax.lax.rsqrt(x + 1) + (x + 1e-30) ** y, "x": x}

    safe = with_safe_roots(function)
    x, y = jnp.array([0.0, 0.3, 2.0]), jnp.array(-0.5)
    jax.tree.map(np.testing.assert_array_equal, safe(x, y), function(x, y))
    check_grads(lambda x, y: safe(x, y)["sum"], (x[1:], y), order=2)
    slopes = jax.jacfwd(lambda x: with_safe_roots(jnp.sqrt)(x))(jnp.zeros(()))
    assert slopes == 0
    assert jax.grad(jax.grad(with_safe_roots(jnp.sqrt)))(0.0) == 0
    assert jax.grad(with_safe_roots(lambda x: (x + 1e-30) ** -0.5))(jnp.float32(0)) == 0


def test_lions_betas_are_named_and_evolution_is_offered():
    learned = lopt.learnable(optax.lion, learning_rate=0.02, b1=0.9, b2=0.9)
    inner = lopt.InnerTraining(Regression(), learned, 30)
    theta = learned.init(KEY)
    found = hypergradients(inner, theta, KEY, sigma=0.5)
    assert {s.name: s.verdict for s in found.slopes} == {
        "['b1']": "zero",
        "['b2']": "zero",
        "['learning_rate']": "fine",
    }
    assert found.slopes[0].derivative == 0
    assert found.slopes[0].reaction != 0
    report = found.report()
    assert "['b1']: the derivative is exactly zero although the loss reacts" in report
    assert "lopt.ES(inner, sigma=0.5)" in report
    estimate, _ = quick_jit(lopt.ES(inner, sigma=0.5).estimate)(theta, (), KEY)
    assert estimate.grads["b1"] != 0
    assert estimate.grads["b2"] != 0


class Kink(lopt.AbstractLearnedOptimizer):
    """Uses one weight through a root at zero, one not at all, and one with its gradient stopped."""

    def init(self, key):
        return {"root": jnp.zeros(()), "idle": jnp.ones(3), "stopped": jnp.ones(2)}

    def begin(self, theta, params, num_steps=None):
        return ()

    def update(self, theta, grads, state, params=None, *, value=None, **_):
        rate = jnp.sqrt(jnp.abs(theta["root"])) + jnp.sum(jax.lax.stop_gradient(theta["stopped"]))
        return jax.tree.map(lambda g: -0.01 * rate * g, grads), state


def test_what_is_undefined_or_unused_is_named():
    inner = lopt.InnerTraining(Chain(), Kink(), 3)
    found = hypergradients(inner, Kink().init(KEY), KEY, mode="reverse")
    verdicts = {s.name: (s.verdict, s.zeros, s.undefined) for s in found.slopes}
    assert verdicts["['root']"] == ("undefined", 0, 1)
    assert verdicts["['idle']"] == ("unused", 3, 0)
    assert verdicts["['stopped']"] == ("zero", 2, 0)
    assert "['root']: the derivative is no number." in found.report()


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_report_of_what_is_fine(mode):
    rates = per_tensor({"a": Exponential(0.1, 0.9), "b": 0.05, "spare": 0.1})
    learned = lopt.learnable(optax.sgd, learning_rate=rates)
    inner = lopt.InnerTraining(Regression(), learned, 4)
    found = hypergradients(inner, learned.init(KEY), KEY, mode)
    # The tensor that the loss does not see has hyperparameters that it does not see either.
    for slope in found.slopes:
        assert slope.verdict == ("unused" if "spare" in slope.name else "fine"), slope
    assert "ES" not in found.report()
    assert len(found.report().splitlines()) == 1 + len(found.slopes) + 1
    estimate, _ = quick_jit(lopt.ForwardMode(inner).estimate)(learned.init(KEY), (), KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), estimate.grads, found.grads
    )


def test_bad_input_of_hypergradients():
    inner = lopt.InnerTraining(Chain(), lopt.LearnableSGD(), 2)
    for keywords, message in (({"mode": "both"}, "mode='both'"), ({"sigma": 0.0}, "sigma=0.0")):
        with pytest.raises((ValueError, TypeError), match=re.escape(message) + "|Type-check"):
            hypergradients(inner, {"learning_rate": jnp.zeros(())}, KEY, **keywords)


def test_what_rounding_hides_is_unchecked():
    # In single precision, and with an epsilon so small that it plays no part in the loss.
    learned = lopt.learnable(optax.adam, learning_rate=1e-3, eps=1e-12)
    inner = lopt.InnerTraining(Regression(jnp.float32), learned, 3)
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), learned.init(KEY))
    found = hypergradients(inner, theta, KEY)
    verdicts = {slope.name: slope.verdict for slope in found.slopes}
    assert verdicts["['eps']"] == "unchecked"
    assert "lost in the rounding" in found.report()


def test_steps_of_logarithms_are_small():
    # The loss is no line in the logarithm of a rate: large steps would be seen in the difference.
    learned = lopt.learnable(optax.sgd, learning_rate=1e-3)
    inner = lopt.InnerTraining(Steep(), learned, 2)
    slope = hypergradients(inner, learned.init(KEY), KEY).slopes[0]
    assert slope.verdict == "fine"
    assert slope.difference == pytest.approx(slope.derivative, rel=1e-6)


class Steep(Chain):
    """A gradient of a thousand."""

    def loss(self, params, batch):
        return 1000 * jnp.sum(jnp.exp(params))


def test_memory_of_forward_mode_does_not_grow_with_the_run():
    task = lopt.tasks.Quadratic(jnp.ones(5000), jnp.zeros(5000))
    learned = lopt.learnable(optax.adam, learning_rate=InverseTime(0.1), b1=0.9)

    def bytes_of(differentiate, horizon):
        inner = lopt.InnerTraining(task, learned, horizon)
        function = jax.jit(differentiate(lambda theta: inner.meta_loss(theta, KEY)))
        compiled = function.lower(learned.init(KEY)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (bytes_of(jax.jacfwd, horizon) for horizon in (100, 10_000))
    # What grows is the record of losses with its three derivatives, a few numbers per step.
    assert long - short < 100 * 9_900
    assert bytes_of(jax.grad, 1000) - bytes_of(jax.grad, 100) > 900 * 8 * 5000
