"""Recording: what is recorded is what the rule got and did, and recording changes nothing."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.symbolic.record import Recorder, draw_places, record_episode

KEY = jax.random.key(0)
OPTIMIZERS = {
    "small_mlp": lambda: lopt.small_mlp(hidden=(4,)),
    "adafactor_mlp": lambda: lopt.adafactor_mlp(hidden=(4,)),
    "dm": lambda: lopt.learned.dm(hidden=(4, 3)),
    "rnnprop": lambda: lopt.learned.rnnprop("mt+gt+t", hidden=(5,), dense=3),
}


class Bowl(lopt.AbstractTask):
    """A noisy quadratic of tensors of all ranks and sizes, and of two dtypes."""

    def init(self, key):
        shapes = {"matrix": (7, 11), "scalar": (), "small": (2, 3), "vector": (5,), "empty": (0, 2)}
        params = {
            n: jax.random.normal(jax.random.fold_in(key, i), s)
            for i, (n, s) in enumerate(shapes.items())
        }
        return params | {"single": jnp.ones((4, 2), jnp.float32)}

    def batch(self, key, split="train"):
        return key

    def loss(self, params, batch):
        leaves = jax.tree.leaves(params)
        terms = [
            jnp.sum((leaf * (i + 1) - jax.random.normal(batch, leaf.shape, leaf.dtype)) ** 2)
            for i, leaf in enumerate(leaves)
        ]
        return sum(term.astype(float) for term in terms)


record_jitted = eqx.filter_jit(record_episode)


@functools.cache
def train(name, block_size=None):
    """Trains and records six steps, also what the recorder sees."""
    learned = OPTIMIZERS[name]()
    if block_size is not None:
        learned = dataclasses.replace(learned, block_size=block_size)

    @jax.jit
    def run(key):
        theta, params = learned.init(key), Bowl().init(key)
        optimizer, places = learned.optimizer(theta), draw_places(params, 4, key)
        state = lopt.start(Bowl(), optimizer, params, key)

        def record(step):
            seen = Recorder(places, learned, theta)(step)
            return seen, step.params, step.grads, step.updates

        end, (seen, *rest) = lopt.unroll(Bowl(), optimizer, state, 6, record=record)
        return theta, places, seen, rest, end.params

    return learned, *run(KEY)


def picked(tree, places):
    """Returns [step, coordinate] of a recorded tree, tensor by tensor."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    parts = []
    for leaf, place in zip(leaves, places, strict=True):
        flat = leaf.reshape(len(leaf), int(np.prod(leaf.shape[1:])))
        parts.append(flat[:, np.asarray(place)])
    return np.concatenate(parts, axis=1)


def stacked(values):
    """Returns outputs as the rule stacks them: [output, step, coordinate]."""
    names = sorted(name for name in values if name != "update")
    return jnp.stack([values[name] for name in names])


# Slabs of 9 cut the matrix of 77 unevenly, and leave the others together.
CASES = [
    ("small_mlp", None),
    ("small_mlp", 9),
    ("rnnprop", 9),
    pytest.param("adafactor_mlp", 9, marks=pytest.mark.slow),
    pytest.param("dm", 9, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "block_size"), CASES)
def test_scaled_outputs_are_the_updates(name, block_size):
    learned, _, places, seen, (params, grads, updates), *_ = train(name, block_size)
    np.testing.assert_array_equal(seen.outputs["update"], picked(updates, places))
    np.testing.assert_array_equal(seen.features["raw_gradient"], picked(grads, places))
    np.testing.assert_array_equal(seen.features["raw_parameter"], picked(params, places))
    scaled = learned.scale(stacked(seen.outputs))
    # The single-precision tensor's outputs were scaled in single precision.
    np.testing.assert_allclose(scaled, seen.outputs["update"], rtol=2e-5)
    assert np.ptp(scaled) > 0


@pytest.mark.parametrize(("name", "block_size"), CASES[1:])
def test_the_rule_run_on_the_recorded_features_gives_the_recorded_outputs(name, block_size):
    learned, theta, places, seen, *_ = train(name, block_size)
    names, rule = learned.features.names(), jax.jit(learned.rule.apply)
    assert list(seen.features) == [*names, "raw_gradient", "raw_parameter"]
    count = sum(len(p) for p in places)
    memory = learned.rule.begin(theta["rule"], (count,))
    for step in range(6):
        values = jnp.stack([seen.features[n][step] for n in names])
        shared = learned.features.shared(jnp.asarray(step, jnp.int32), values.dtype)
        columns = values[: len(names) - len(shared)]
        np.testing.assert_allclose(values[len(columns) :], np.tile(shared[:, None], count))
        outputs, memory = rule(theta["rule"], columns, shared, memory)
        np.testing.assert_allclose(outputs, stacked(seen.outputs)[:, step], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block_size", [None, 9])
def test_features_are_normalised_over_the_whole_tensor(block_size):
    _, _, places, seen, (params, grads, _), *_ = train("small_mlp", block_size)
    first = 0
    for param, grad, place in zip(*map(jax.tree.leaves, (params, grads)), places, strict=True):
        if not len(place):
            continue
        here = slice(first, first + len(place))
        first += len(place)
        grad, param = (np.asarray(a, float).reshape(6, -1) for a in (grad, param))
        momentum = sum(0.1 * 0.9 ** (5 - t) * grad[t] for t in range(6))
        expected = {"gradient": grad[5], "parameter": param[5], "momentum_0.9": momentum}
        for name, whole in expected.items():
            normalised = whole[np.asarray(place)] / np.sqrt(1e-5 + np.mean(whole**2))
            np.testing.assert_allclose(seen.features[name][5, here], normalised, rtol=1e-5)


def test_recording_changes_nothing_of_the_run():
    learned, theta, *_, recorded = train("rnnprop", 9)

    @jax.jit
    def run(key):
        optimizer = learned.optimizer(theta)
        state = lopt.start(Bowl(), optimizer, Bowl().init(key), key)
        return lopt.unroll(Bowl(), optimizer, state, 6)[0].params

    for a, b in zip(jax.tree.leaves(recorded), jax.tree.leaves(run(KEY)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_of_any_other_optimizer_gradient_parameter_and_update():
    one = record_jitted(Bowl(), optax.sgd(0.1), None, KEY, steps=4)
    features, update = one.seen.features, one.seen.outputs["update"]
    assert set(one.seen.outputs) == {"update"}
    assert set(features) == {"gradient", "parameter", "raw_gradient", "raw_parameter"}
    np.testing.assert_allclose(update, -0.1 * features["gradient"], rtol=1e-6)
    np.testing.assert_allclose(
        features["parameter"][1:], features["parameter"][:-1] + update[:-1], rtol=1e-5
    )
    learned = lopt.LearnableSGD(0.1)
    two = record_jitted(Bowl(), learned, learned.init(KEY), KEY, steps=4)
    np.testing.assert_allclose(two.seen.outputs["update"], update, rtol=1e-6)


def test_coordinates_are_numbered_through_the_network():
    one = record_jitted(Bowl(), optax.sgd(0.1), None, KEY, steps=1)
    # In tree order: empty, matrix, scalar, single, small, vector.
    assert np.bincount(one.tensor, minlength=6).tolist() == [0, 10, 1, 8, 6, 5]
    assert len(set(one.coordinate.tolist())) == 30
    params = Bowl().init(jax.random.split(KEY, 4)[1])
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    np.testing.assert_allclose(one.seen.features["parameter"][0], flat[one.coordinate])


def test_runs_of_a_family_differ_and_tasks_are_told_apart():
    family = lopt.tasks.QuadraticFamily(3)
    each = jax.vmap(lambda key: record_episode(family, optax.sgd(0.1), None, key, steps=2))
    runs = jax.jit(each)(jnp.stack([KEY, jax.random.key(1), KEY]))
    assert (runs.task[0] == runs.task[2]).all()
    assert (runs.task[0] != runs.task[1]).any()


@pytest.mark.parametrize("size", [2, 5, 12])
def test_places_are_different_and_every_coordinate_has_its_chance(size):
    keys = jax.random.split(KEY, 4000)
    (places,) = jax.jit(jax.vmap(lambda key: draw_places(jnp.zeros(size), 5, key)))(keys)
    assert places.shape == (4000, min(size, 5))
    assert (np.diff(places, axis=1) > 0).all()
    chances = np.bincount(np.ravel(places), minlength=size) / 4000
    # Parts of 2 or 3 of 12 coordinates give one each.
    assert (np.abs(chances - min(1, 5 / size)) < 0.12).all()
    assert len(chances) == size


def test_mistakes_are_named():
    task, learned = Bowl(), lopt.small_mlp()
    theta, params = jax.jit(learned.init)(KEY), jax.jit(task.init)(KEY)
    places = tuple(jnp.zeros(min(leaf.size, 1), int) for leaf in jax.tree.leaves(params))
    with pytest.raises(ValueError, match=r"draw_places\(count=0\)"):
        draw_places(params, 0, KEY)
    chained = optax.chain(optax.clip(1.0), learned.optimizer(theta))
    for optimizer, record, words in [
        (chained, Recorder(places, learned, theta), "step of another optimizer"),
        (optax.sgd(0.1), Recorder(places[1:]), "for 5 tensors, but the run trains 6"),
    ]:
        state = lopt.start(task, optimizer, params, KEY)
        with pytest.raises(ValueError, match=words):
            lopt.unroll(task, optimizer, state, 2, record=record)
