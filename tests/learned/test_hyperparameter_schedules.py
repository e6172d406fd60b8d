"""Schedules against Optax's own, their derivatives, and hyperparameters of each tensor."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.learned import Cosine, Exponential, InverseTime, PerStep, Polynomial, per_tensor

KEY = jax.random.key(0)
TASK = lopt.tasks.Quadratic(jnp.array([0.5, 1.0, 3.0]), jnp.array([1.0, -1.0, 0.5]))
STEPS = range(0, 14, 3)

AS_IN_OPTAX = {
    "polynomial": (Polynomial(0.3, 10, 0.02, 1.7), optax.polynomial_schedule(0.3, 0.02, 1.7, 10)),
    "linear": (Polynomial(0.3, 10), optax.linear_schedule(0.3, 0.0, 10)),
    "cosine": (
        Cosine(0.3, 10, 0.06, 1.3, ("initial", "final", "power")),
        optax.cosine_decay_schedule(0.3, 10, 0.2, 1.3),
    ),
    "exponential": (Exponential(0.3, 0.5, 4), optax.exponential_decay(0.3, 4, 0.5)),
    "inverse time": (InverseTime(0.3, 1.4, 6.0), lambda t: 0.3 / (1 + t / 6) ** 1.4),
    "per step": (PerStep(tuple(0.1 + 0.01 * t for t in range(13))), lambda t: 0.1 + 0.01 * t),
}


@pytest.mark.parametrize("name", AS_IN_OPTAX)
@pytest.mark.parametrize("argument", ["learning_rate", "momentum"])
def test_values_are_those_of_optax(name, argument):
    schedule, theirs = AS_IN_OPTAX[name]
    learned = lopt.learnable(optax.sgd, **({"learning_rate": 0.1} | {argument: schedule}))
    theta = learned.init(KEY)
    ours = [learned.hyperparameters(theta, t)[argument] for t in STEPS]
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(ours, [theirs(t) for t in STEPS], rtol=1e-6, atol=1e-12)


def run(optimizer, steps=5):
    state = lopt.start(TASK, optimizer, TASK.init(KEY), KEY)
    return lopt.unroll(TASK, optimizer, state, steps)[0].params


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["cosine", "exponential"])
def test_a_run_is_that_of_optax(name):
    schedule, theirs = AS_IN_OPTAX[name]
    learned = lopt.learnable(optax.adam, learning_rate=schedule)
    ours = run(learned.optimizer(learned.init(KEY)))
    np.testing.assert_allclose(ours, run(optax.adam(theirs)), rtol=1e-6)


def test_what_is_learned_is_chosen():
    theta = lopt.learnable(optax.sgd, learning_rate=InverseTime(0.3, learn=("power",))).init(KEY)
    assert list(theta["learning_rate"]) == ["power"]
    one = Polynomial(0.3, 10, 0.1, learn=("final",))
    theta = lopt.learnable(optax.sgd, learning_rate=one).init(KEY)
    np.testing.assert_allclose(theta["learning_rate"]["final"], np.log(0.1))


def test_only_schedules_put_a_step_into_the_state():
    params = {"a": jnp.ones(2)}
    for value, kind in ((0.1, tuple), (PerStep(0.1, 3), lopt.learned.LearnableState)):
        learned = lopt.learnable(optax.sgd, learning_rate=value)
        assert isinstance(learned.begin(learned.init(KEY), params), kind)


def test_each_tensor_has_its_own():
    params = {"b": [jnp.ones(2)], "w": jnp.ones((2, 3))}
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    rates = per_tensor({"b": [0.1], "w": Exponential(0.4, 0.5)})
    learned = lopt.learnable(
        functools.partial(optax.sgd, nesterov=True), learning_rate=rates, momentum=0.9
    )
    theta = learned.init(KEY)
    assert set(theta["learning_rate"]) == {"b.0", "w"}
    optimizer = learned.optimizer(theta)
    state = optimizer.init(params)
    twins = {"b": optax.sgd(0.1, 0.9, True)}
    twins["w"] = optax.sgd(optax.exponential_decay(0.4, 1, 0.5), 0.9, True)
    states = {name: twin.init(params[name]) for name, twin in twins.items()}
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        for name, twin in twins.items():
            with jax.numpy_dtype_promotion("standard"):
                expected, states[name] = twin.update(grads[name], states[name])
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates[name], expected
            )
    assert learned.hyperparameters(theta, 1)["learning_rate"]["w"] == pytest.approx(0.2)


def test_like_gives_all_tensors_one_beginning():
    params = {"a": jnp.ones(2), "b": (jnp.ones(3),)}
    apart = lopt.learnable(optax.adam, learning_rate=per_tensor(0.1, like=params))
    shared = lopt.learnable(optax.adam, learning_rate=0.1)
    for learned in (apart, shared):
        theta = learned.init(KEY)
        updates, _ = learned.update(theta, params, learned.begin(theta, params), params)
        np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-6)
    with pytest.raises(ValueError, match=re.escape("is for the tensors a, b.0, but params has a.")):
        apart.begin(apart.init(KEY), {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="two tensors have one name"):
        per_tensor({"a.b": 0.1, "a": {"b": 0.1}})


BAD = {
    "unknown": (
        lambda: lopt.learnable(optax.sgd, b1=0.9),
        "unexpected keyword argument 'b1'.*momentum",
    ),
    "negative": (lambda: lopt.learnable(optax.sgd, learning_rate=-0.1), "must be positive"),
    "above one": (
        lambda: lopt.learnable(optax.sgd, learning_rate=0.1, momentum=1.5),
        "momentum=1.5.*below one",
    ),
    "schedule": (
        lambda: lopt.learnable(optax.sgd, learning_rate=InverseTime(0.1, -1.0)),
        "learning_rate.*power=-1.0.*positive",
    ),
    "final": (
        lambda: lopt.learnable(optax.sgd, learning_rate=Cosine(0.1, 9, learn=("final",))),
        "final=0.0.*positive",
    ),
    "constant": (
        lambda: lopt.learnable(optax.sgd, learning_rate=Cosine(0.1, 9, learn=("slope",))),
        "no 'slope'; there are initial, final, power",
    ),
    "none": (
        lambda: lopt.learnable(optax.sgd, learning_rate=Cosine(0.1, 9, learn=())),
        "none of the constants",
    ),
    "steps": (lambda: Cosine(0.1, 0), "steps=0.*try 100"),
    "length": (lambda: PerStep(0.1, 0), "length=0.*try 100"),
    "values": (lambda: PerStep((0.1, 0.2), 3), "length=3.*try 2"),
    "value": (
        lambda: lopt.learnable(optax.sgd, learning_rate=PerStep((0.1, -0.2))),
        "learning_rate.*positive",
    ),
    "tensor": (
        lambda: lopt.learnable(optax.sgd, learning_rate=per_tensor({"a": 0.1, "b": -1.0})),
        "b=-1.0.*positive",
    ),
    "switch": (
        lambda: lopt.learnable(optax.sgd, learning_rate=0.1, nesterov=True),
        'nesterov=True.*the form None.*"identity"',
    ),
    "branch": (
        lambda: lopt.learnable(optax.adafactor, min_dim_size_to_factor=(128, "identity")),
        "branches on one of these values; learn some of learning_rate",
    ),
    "form": (lambda: lopt.learnable(optax.sgd, learning_rate=(0.1, "square")), "'square'"),
    "short": (
        lambda: lopt.InnerTraining(
            TASK, lopt.learnable(optax.sgd, learning_rate=PerStep(0.1, 5)), 6
        ),
        "horizon=6.*values for 5 steps; try horizon=5",
    ),
    "horizon": (lambda: lopt.InnerTraining(TASK, lopt.LearnableSGD(), 0), "horizon=0.*try 100"),
    "learn": (
        lambda: lopt.learned.inverse_time_momentum(learn=("rate",)),
        "must name some of learning_rate, momentum, power, time_constant",
    ),
    "preset": (lambda: lopt.learned.inverse_time_momentum(momentum=1.0), "momentum=1.0.*below one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_one_clear_error(name):
    make, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        make()


def test_a_schedule_may_be_as_long_as_the_run():
    learned = lopt.learnable(optax.sgd, learning_rate=PerStep(0.1, 5), momentum=PerStep(0.9, 6))
    assert learned.max_steps == 5
    lopt.InnerTraining(TASK, learned, 5)
