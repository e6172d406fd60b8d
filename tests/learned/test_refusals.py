"""What learnable hyperparameters refuse, and what they take although it is unusual."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.surface import losses_after
from lopt.core.checks import check_integer
from lopt.learned import Cosine, Exponential, InverseTime, PerStep, Polynomial
from lopt.learned.safe_roots import with_safe_roots

KEY = jax.random.key(0)
TASK = lopt.tasks.Quadratic(jnp.ones(2), jnp.zeros(2))


def sgd(**hyperparameters):
    return lopt.learnable(optax.sgd, **({"learning_rate": 0.1} | hyperparameters))


def short():
    return lopt.InnerTraining(TASK, sgd(learning_rate=PerStep(0.1, 5)), 5)


def lengths(bound):
    return lopt.estimators.LogUniformHorizon(2, bound)


BAD = {
    "decay": (lambda: sgd(momentum=-5.0), r"momentum=-5.0.*at least zero and below one"),
    "b1": (lambda: lopt.learnable(optax.adam, learning_rate=0.1, b1=-3.0), "b1=-3.0.*at least"),
    "decays": (lambda: sgd(momentum=PerStep((0.5, -0.1))), "value 1 of PerStep, -0.1: .*at least"),
    "final nan": (lambda: sgd(learning_rate=Polynomial(0.1, 9, np.nan)), "final=nan.*not learned"),
    "final rate": (lambda: sgd(learning_rate=Cosine(0.1, 9, -5.0)), "final=-5.0.*at least zero"),
    "final decay": (lambda: sgd(momentum=Cosine(0.5, 9, 3.0)), "final=3.0.*from zero to one"),
    "factor": (
        lambda: sgd(learning_rate=Exponential(0.1, 0.0, learn=("initial",))),
        "factor=0.0.*positive",
    ),
    "time": (
        lambda: sgd(learning_rate=InverseTime(0.1, 1.0, 0.0, ("initial",))),
        "time_constant=0.0.*positive",
    ),
    "missing": (
        lambda: lopt.learnable(optax.adam, b1=0.9),
        r"missing a required argument: 'learning_rate'.*functools.partial",
    ),
    "learning": (
        lambda: lopt.LookAhead(short()),
        "LookAhead, whose run has no end, .*values for 5 steps.*without an end",
    ),
    "windows": (
        lambda: lopt.PES(short(), 3, schedule=lengths(5)),
        r"PES\(schedule=LogUniform.* up to 6 steps .*values for 5 steps",
    ),
    "horizons": (
        lambda: losses_after(short(), {"learning_rate": jnp.zeros(5)}, KEY, (2, 6)),
        r"measure_after\(horizons=\(2, 6\)\).*values for 5 steps",
    ),
    "superscript": (
        lambda: lopt.learned.MomentFeatures(("mom²",)),
        "no feature 'mom²'; known are gradient",
    ),
    "counted": (
        lambda: lopt.InnerTraining(TASK, sgd(), 2**31),
        r"at most 1073741824, as steps are counted in 32 bits; try 1073741824\.",
    ),
    "bounded": (
        lambda: check_integer("RecordSettings", "lags", 31, most=30),
        r"RecordSettings\(lags=31\) must be at most 30; try 30\.",
    ),
    "old objective": (
        lambda: lopt.InnerTraining(TASK, sgd(), 50, lambda task, step: step.loss),
        r"objective=.*must take \(task, step, num_steps\).*such as lopt.train_loss",
    ),
    "no length": (
        lambda: lopt.learnable(optax.sgd, learning_rate=Cosine(0.1)).optimizer({}),
        r"needs the length of the run; try num_steps=1000\.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_it_has_one_clear_error(name):
    make, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        make()


@pytest.mark.parametrize("arguments", [(True,), (0,)])
def test_switches_are_no_counts(arguments):
    with pytest.raises((TypeError, ValueError), match="positive integer"):
        lopt.FinalLoss(*arguments)
    with pytest.raises((TypeError, ValueError), match=r"length=True|Type-check"):
        PerStep(0.1, True)


def test_errors_about_long_schedules_are_short():
    with pytest.raises(ValueError, match=r"value 700 of PerStep, -0.1") as caught:
        sgd(learning_rate=PerStep([0.1] * 700 + [-0.1] + [0.1] * 300))
    assert len(str(caught.value)) < 300


def test_what_is_not_learned_may_be_zero():
    sgd(learning_rate=InverseTime(0.1, 0.0, learn=("initial",)))
    sgd(learning_rate=Cosine(0.1, 9), momentum=0.0)
    sgd(learning_rate=(0.1, None), momentum=Polynomial(0.5, 9, 1.0))


def test_windows_that_fit_a_schedule_are_allowed():
    lopt.PES(short(), 3, schedule=lengths(4))
    assert losses_after(short(), {"learning_rate": jnp.zeros(5)}, KEY, (2, 5)).shape == (2,)


def labelled(learning_rate):
    """Knows the tree that it is for."""
    parts = {"fast": optax.sgd(learning_rate), "slow": optax.sgd(learning_rate / 10)}
    return optax.multi_transform(parts, {"weight": "fast", "bias": "slow"})


def test_a_factory_may_know_the_tree():
    params = {"weight": jnp.ones(2), "bias": jnp.ones(1)}
    learned = lopt.learnable(labelled, learning_rate=0.1)
    theta = learned.init(KEY)
    updates, _ = learned.update(theta, params, learned.begin(theta, params), params)
    np.testing.assert_allclose(updates["weight"], -0.1)
    np.testing.assert_allclose(updates["bias"], -0.01)


def phased(learning_rate):
    """Takes extra arguments that are no arrays."""

    def update(grads, state, params=None, *, phase, value_fn, **_):
        scale = value_fn(learning_rate) if phase == "train" else 0.0
        return jax.tree.map(lambda g: -scale * g, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_extra_arguments_need_not_be_arrays():
    learned = lopt.learnable(phased, learning_rate=0.1)
    update = functools.partial(learned.update, phase="train", value_fn=lambda rate: 2 * rate)
    np.testing.assert_allclose(update(learned.init(KEY), jnp.ones(2), ())[0], -0.2)


def test_roots_in_branches_are_safe():
    def root(x):
        return jax.lax.cond(x < 1, jnp.sqrt, lambda x: 2.0, x)

    for value, slope in ((0.0, 0.0), (0.25, 1.0), (4.0, 0.0)):
        assert with_safe_roots(root)(value) == root(value)
        for differentiate in (jax.grad, jax.jacfwd):
            assert differentiate(with_safe_roots(root))(value) == slope
