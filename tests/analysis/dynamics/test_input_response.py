"""What a rule was given, and its curves, agree with the rule itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import (
    InputRecord,
    given_inputs,
    partial_dependence,
    recorded_inputs,
    response_curves,
    sensitivities,
)
from lopt.core import AbstractRule, Coordinatewise
from lopt.learned import MomentumFeatures


class Linear(AbstractRule):
    """A weighted sum of the features, the square of the gradient, and memory."""

    def init(self, key):
        return {"weights": jnp.linspace(-1.0, 1.0, 14), "bend": jnp.asarray(0.25)}

    def begin(self, theta, shape):
        return {"trace": jnp.zeros((2, *shape)), "last": jnp.zeros((1, *shape))}

    def apply(self, theta, columns, shared, memory):
        own, common = theta["weights"][: len(columns)], theta["weights"][len(columns) :]
        output = jnp.tensordot(own, columns, 1) + common @ shared + theta["bend"] * columns[0] ** 2
        output = output + memory["trace"][1] - memory["last"][0]
        return output[None], {"trace": memory["trace"] + 1, "last": memory["last"] + columns[:1]}


class Scaled(eqx.Module):
    def __call__(self, outputs):
        return -0.01 * outputs[0]


def linear(normalise=False):
    return Coordinatewise(MomentumFeatures((0.9,)), Linear(), Scaled(), normalise, 64)


class Nested(lopt.AbstractTask):
    """A quadratic of small tensors and of one that is worked on in slabs."""

    def init(self, key):
        a, b, c = jax.random.split(key, 3)
        return {
            "w": jax.random.normal(a, (3, 2)),
            "b": jax.random.normal(b, (2,)),
            "large": jax.random.normal(c, (12, 10)),
        }

    def batch(self, key, split="train"):
        return jax.random.normal(key, (2,))

    def loss(self, params, batch):
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)]
        return sum(squares) / 2 + params["b"] @ batch


@pytest.mark.parametrize("normalise", [False, True])
def test_recorded_inputs_reproduce_the_updates(key, normalise):
    task, learned = Nested(), linear(normalise)
    theta = learned.init(key)
    coordinates = jnp.array([0, 5, 1, 2, 60, 121, 122, 127])

    def chosen(tree):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])[coordinates]

    record = InputRecord(learned, theta, coordinates)
    optimizer = learned.optimizer(theta)
    state = lopt.start(task, optimizer, task.init(key), key)

    def watch(step):
        return record(step), chosen(step.updates), chosen(step.grads)

    _, (inputs, updates, grads) = lopt.unroll(task, optimizer, state, 5, record=watch)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), inputs)
    # Each feature where it was found: the answer is the update that was made.
    for place, name in ((0, "gradient"), (2, "momentum_0.9"), (3, "time_1")):
        features = jnp.concatenate([rows.columns, rows.shared], axis=1)
        curves = response_curves(learned, theta, rows, name, features[:, place])
        np.testing.assert_allclose(jnp.diag(curves), jnp.ravel(updates), rtol=1e-10)
    # Memory: {"last": sum of gradients so far, "trace": two counters}.
    np.testing.assert_allclose(inputs.memory[:, :, 1], np.arange(5.0)[:, None] + np.zeros((1, 8)))
    if not normalise:
        np.testing.assert_allclose(inputs.columns[..., 0], grads, rtol=1e-12)
        np.testing.assert_allclose(inputs.memory[1:, :, 0], np.cumsum(grads, axis=0)[:-1])


def test_curves_and_slopes_are_those_of_the_rule(key):
    learned = linear()
    theta = learned.init(key)
    values = jnp.linspace(-2.0, 2.0, 9)
    inputs = given_inputs(learned, theta, {"parameter": 3.0, "time_10": 0.5})
    weights = theta["rule"]["weights"]
    held = 3 * weights[1] + 0.5 * weights[5]
    found = response_curves(learned, theta, inputs, "gradient", values)
    expected = -0.01 * (held + weights[0] * values + 0.25 * values**2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    found = response_curves(learned, theta, inputs, "time_10", values)
    expected = -0.01 * (3 * weights[1] + weights[5] * values)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    slopes = sensitivities(learned, theta, given_inputs(learned, theta, {"gradient": 2.0}))
    np.testing.assert_allclose(slopes[0], -0.01 * weights.at[0].add(2 * 0.25 * 2.0), rtol=1e-12)


def test_partial_dependence_of_a_sum_is_its_part_and_a_mean(key):
    learned = linear()
    theta = learned.init(key)
    task = Nested()
    inputs = recorded_inputs(task, learned, theta, task.init(key), key, 4, coordinates=10)
    assert inputs.columns.shape == (40, 3)
    assert inputs.shared.shape == (40, 11)
    assert inputs.memory.shape == (40, 3)
    values = jnp.linspace(-1.0, 1.0, 5)
    found = partial_dependence(learned, theta, inputs, "momentum_0.9", values)
    slope = -0.01 * theta["rule"]["weights"][2]
    np.testing.assert_allclose(jnp.diff(found) / 0.5, slope, rtol=1e-9)
    curves = response_curves(learned, theta, inputs, "momentum_0.9", values)
    np.testing.assert_allclose(found, curves.mean(axis=0), rtol=1e-12)


def test_all_coordinates_of_small_networks_are_followed(key):
    learned, task = lopt.small_mlp(), lopt.tasks.Quadratic(jnp.ones(5), jnp.ones(5))
    theta = learned.init(key)
    inputs = recorded_inputs(task, learned, theta, task.init(key), key, 2)
    names = learned.features.names()
    assert inputs.columns.shape == (10, len(names) - 11)
    assert inputs.memory.shape == (10, 0)
    assert sensitivities(learned, theta, inputs).shape == (10, len(names))


def test_bad_input_is_named(key):
    learned = linear()
    theta = learned.init(key)
    with pytest.raises(TypeError, match="learned"):
        given_inputs(lopt.LearnableSGD(0.1), {"learning_rate": jnp.zeros(())})
    with pytest.raises(TypeError, match="learned"):
        InputRecord(optax.sgd(0.1), theta, jnp.arange(2))
    inputs = given_inputs(learned, theta)
    with pytest.raises(ValueError, match=r"no feature 'speed'; there are gradient, parameter"):
        response_curves(learned, theta, inputs, "speed", jnp.ones(2))
    other = lopt.small_mlp()
    with pytest.raises(ValueError, match=r"\(3, 11, 3\).*this optimizer's have \(8, 11, 0\)"):
        partial_dependence(other, other.init(key), inputs, "gradient", jnp.ones(2))
    none = jax.tree.map(lambda part: part[:0], inputs)
    with pytest.raises(ValueError, match=r"\(inputs\) has no rows; try recorded_inputs"):
        partial_dependence(learned, theta, none, "gradient", jnp.ones(2))
    far = InputRecord(learned, theta, jnp.array([0, 10**6]))
    state = lopt.start(Nested(), learned.optimizer(theta), Nested().init(key), key)
    columns = lopt.unroll(Nested(), learned.optimizer(theta), state, 2, record=far)[1].columns
    assert jnp.isnan(columns[:, 1]).all()
    assert jnp.isfinite(columns[:, 0]).all()
    with pytest.raises(ValueError, match="coordinates=0"):
        recorded_inputs(Nested(), learned, theta, Nested().init(key), key, 2, coordinates=0)
