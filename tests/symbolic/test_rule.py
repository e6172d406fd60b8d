"""An equation in the network's place: it is the optimizer that it says, and keeps what it needs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.learned import MomentFeatures, with_features
from lopt.symbolic import SymbolicRule, Variable, in_place_of, make_expression, symbolic_optimizer
from lopt.symbolic.expression import rename

KEY = jax.random.key(0)
V = Variable
ADAM = ("divide", ("multiply", -0.01, V("m_corrected")), V("root_v"))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}


def grads_at(step):
    return jax.tree.map(
        lambda p: jnp.cos(p + step + jnp.arange(p.size, dtype=float).reshape(p.shape)), PARAMS
    )


def trajectory(optimizer, steps=5):
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(steps):
        updates, state = optimizer.update(grads_at(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.standard_promotion
def test_adams_equation_is_adam():
    features = MomentFeatures(("m_corrected", "root_v"), 0.9, 0.999)
    learned = symbolic_optimizer(make_expression(ADAM), features)
    ours, _ = trajectory(learned.optimizer(learned.init(KEY)))
    theirs, _ = trajectory(optax.adam(0.01, eps=1e-12))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, theirs)


def test_the_state_holds_only_what_the_equation_uses():
    features = MomentFeatures("mt+gt+g+mom5+mom9")
    learned = symbolic_optimizer(make_expression(("multiply", -0.1, V("momentum_0.9"))), features)
    state = learned.optimizer(learned.init(KEY)).init(PARAMS)
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == float]
    assert sum(leaf.size for leaf in floats) == 8  # one momentum of eight weights


def test_lags_look_back_in_time_and_find_zero_before_the_start():
    root = ("add", ("multiply", -0.5, V("gradient")), ("multiply", 0.25, V("gradient", 2)))
    learned = symbolic_optimizer(make_expression(root), MomentFeatures(("gradient",)))
    optimizer = learned.optimizer(learned.init(KEY))
    state = optimizer.init(PARAMS)
    for step in range(4):
        updates, state = optimizer.update(grads_at(step), state, PARAMS)
        past = grads_at(step - 2) if step >= 2 else jax.tree.map(jnp.zeros_like, PARAMS)
        expected = jax.tree.map(lambda g, p: -0.5 * g + 0.25 * p, grads_at(step), past)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), updates, expected)


def test_a_shared_feature_and_its_lag():
    root = ("multiply", V("gradient"), ("add", V("time"), V("time", 1)))
    learned = symbolic_optimizer(make_expression(root), MomentFeatures(("gradient", "time")))
    optimizer = learned.optimizer(learned.init(KEY))
    state = optimizer.init(PARAMS)
    for step in range(3):
        updates, state = optimizer.update(grads_at(step), state, PARAMS)
        factor = (2 * step + 1) / 1000
        jax.tree.map(
            lambda u, g, f=factor: np.testing.assert_allclose(u, f * g, rtol=1e-12),
            updates,
            grads_at(step),
        )


def test_constants_are_theta_and_can_be_learned():
    rule = make_expression(("multiply", -0.001, V("gradient")))
    learned = symbolic_optimizer(rule, MomentFeatures(("gradient",), first_order=False))
    task = lopt.tasks.Quadratic(jnp.full(2, 1.0), jnp.zeros(2))
    meta = lopt.MetaTask(lopt.InnerTraining(task, learned, 4))
    theta = meta.init(KEY)
    sgd = lopt.MetaTask(lopt.InnerTraining(task, lopt.LearnableSGD(0.001), 4))
    slope = jax.grad(meta.loss)(theta, KEY)["rule"]["constants"][0]
    other = jax.grad(sgd.loss)(sgd.init(KEY), KEY)["learning_rate"]
    # d loss / d log rate = rate * d loss / d rate, and the constant is minus the rate.
    np.testing.assert_allclose(0.001 * -slope, other, rtol=1e-9)


def test_it_takes_the_networks_place(tmp_path):
    network = lopt.rnnprop(hidden=(3,), dense=2)
    theta = network.init(KEY)
    rule = make_expression(("tanh", ("multiply", -1.3, V("m_normalised"))))
    learned, constants = in_place_of(network, theta, rule)
    assert learned.features.names() == ("m_normalised",)
    updates, _ = learned.optimizer(constants).update(
        grads_at(0), learned.optimizer(constants).init(PARAMS), PARAMS
    )
    expected = jax.tree.map(lambda g: 0.01 * jnp.tanh(-1.3 * jnp.sign(g)), grads_at(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    lopt.save(tmp_path / "rule.safetensors", learned, constants)
    again, _ = lopt.load(tmp_path / "rule.safetensors")
    assert again == learned


def test_learned_decays_stay_with_the_features():
    network = lopt.adafactor_mlp()
    theta = network.init(KEY)
    theta["features"]["momentum_decays"] += 0.1
    rule = make_expression(("multiply", -0.1, V("momentum_0.9")))
    learned, constants = in_place_of(network, theta, rule, lopt.symbolic.Output())
    assert learned.features == network.features
    assert_same(constants["features"], theta["features"])


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def used_after_saving(learned, theta, path):
    """Returns the optimizer after it was saved and loaded, and the updates of its first step."""
    lopt.save(path, learned, theta)
    again, weights = lopt.load(path)
    assert again == learned
    assert_same(weights, jax.tree.map(jnp.asarray, theta))
    optimizer = again.optimizer(weights)
    updates, _ = optimizer.update(grads_at(0), optimizer.init(PARAMS), PARAMS)
    return again, updates


EXTRA, OWN = ("multiply", -0.1, V("momentum_0.3")), ("multiply", -0.1, V("momentum_0.9"))


AVERAGE = ("multiply", 0.2, V("average"))


@pytest.mark.parametrize("root", [EXTRA, OWN, ("add", EXTRA, OWN), AVERAGE, ("add", AVERAGE, OWN)])
@pytest.mark.parametrize("make", [lopt.adafactor_mlp, lopt.rnnprop, lopt.dm])
def test_what_was_given_more_features(make, root, tmp_path):
    network = make()
    theta = network.init(KEY)
    if weighted := make is lopt.adafactor_mlp:
        theta["features"]["momentum_decays"] += 0.1
    more, own = MomentFeatures(("momentum_0.3", "momentum_0.9")), network.features.column_names()
    seen, weights = with_features(network, theta, more, decays=(0.5,))
    rule = rename(make_expression(root), {"average": f"average_0.5_{own[0]}"})
    learned, constants = in_place_of(seen, weights, rule, lopt.symbolic.Output())
    again, updates = used_after_saving(learned, constants, tmp_path / "rule.safetensors")
    # Adafactor's features have their weights, and the network's normalisation.
    used = weighted and rule.variables != (V("momentum_0.3"),)
    assert len(jax.tree.leaves(constants["features"])) == 3 * used
    whole = {"features": weights["features"], "rule": constants["rule"]}
    unreduced = eqx.tree_at(
        lambda c: (c.features, c.rule),
        again,
        (seen.features, SymbolicRule(again.rule.root, again.rule.initial, seen.features.names())),
    ).optimizer(whole)
    expected, _ = unreduced.update(grads_at(0), unreduced.init(PARAMS), PARAMS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)


@pytest.mark.parametrize("make", [lopt.adafactor_mlp, lopt.rnnprop])
def test_an_equation_of_time_alone_moves_all_coordinates_alike(make, tmp_path):
    network, more = make(), MomentFeatures(("time", "gradient"))
    seen, theta = with_features(network, network.init(KEY), more)
    rule = make_expression(("multiply", -10.0, V("time")))
    learned, constants = in_place_of(seen, theta, rule, lopt.symbolic.Output())
    _, updates = used_after_saving(learned, constants, tmp_path / "rule.safetensors")
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.01, rtol=1e-6), updates)


def test_features_that_all_coordinates_share_are_not_enough():
    rule = make_expression(("multiply", -0.01, V("time")))
    with pytest.raises(ValueError, match=r"share the features time; name a feature of each"):
        symbolic_optimizer(rule, MomentFeatures(("time",)))


@pytest.mark.parametrize(
    ("root", "words"),
    [
        (("multiply", 2.0, V("momentum_0.9")), "momentum_0.9"),
        (("multiply", 2.0, 3.0), "no feature"),
    ],
)
def test_other_features_than_it_was_distilled_from_are_refused(root, words):
    with pytest.raises(ValueError, match=words):
        symbolic_optimizer(make_expression(root), MomentFeatures("mt+gt"))


def test_other_features_are_refused_by_coordinatewise_too():
    rule = SymbolicRule(V("gradient"), (), ("gradient",))
    with pytest.raises(ValueError, match="made for the features gradient, but is given v"):
        lopt.Coordinatewise(MomentFeatures(("v",)), rule, lopt.symbolic.Output(), False)
