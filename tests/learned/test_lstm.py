"""The LSTM optimizers: published sizes, the cell against Equinox's, features in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.learned import LSTM, LogAndSign, MomentFeatures

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("learned", "weights"),
    [
        (lopt.dm(), 5141),
        (lopt.dm(k=None, biases=2), 5221),
        (lopt.dm(k=10.0, biases=2), 5301),
        (lopt.rnnprop(), 6641),
        (lopt.small_rnnprop("mt+gt", 6, 7), 446),
        (lopt.small_rnnprop("mt+gt+g+mom5+mom9"), 1171),
    ],
)
def test_published_numbers_of_weights(learned, weights):
    assert sum(leaf.size for leaf in jax.tree.leaves(learned.init(KEY))) == weights


def test_cells_are_those_of_equinox():
    rule = LSTM(inputs=3, hidden=(4,), biases=2)
    theta, columns = rule.init(KEY), jax.random.normal(KEY, (2, 5))
    memory, shared = rule.begin(theta, (5,)), jnp.full((1,), 0.3, float)
    cell = eqx.nn.LSTMCell(3, 4, key=KEY)
    weights = theta["cell0"]["w"]
    cell = eqx.tree_at(
        lambda c: (c.weight_ih, c.weight_hh, c.bias),
        cell,
        (weights[:, :3], weights[:, 3:], theta["cell0"]["b"].sum(axis=0)),
    )
    states = [(jnp.zeros(4), jnp.zeros(4))] * 5
    for _ in range(3):
        outputs, memory = rule.apply(theta, columns, shared, memory)
        inputs = jnp.concatenate([columns.T, jnp.full((5, 1), 0.3, float)], axis=1)
        states = [cell(x, s) for x, s in zip(inputs, states, strict=True)]
        expected = [theta["output"]["w"][0] @ h + theta["output"]["b"][0] for h, _ in states]
        np.testing.assert_allclose(outputs[0], expected, rtol=1e-12)


def test_rnnprop_is_bounded_and_dense_layer_is_elu():
    rule = LSTM(inputs=2, hidden=(3,), dense=2, squash=True)
    theta = jax.tree.map(lambda w: 100 * w, rule.init(KEY))
    outputs, _ = rule.apply(theta, jnp.full((2, 1), 1e3), jnp.zeros(0), rule.begin(theta, (1,)))
    assert float(jnp.abs(outputs).max()) <= 1


def columns_of(features, grads):
    """Returns the columns of one coordinate over steps with these gradients."""
    params = jnp.full((1,), 2.0)
    state, columns = features.begin(params), []
    for step, grad in enumerate(grads):
        views, state = features.update(
            (), jnp.full((1,), grad), state, params, jnp.asarray(step, jnp.int32)
        )
        columns.append(jnp.concatenate(features.columns(views))[:, 0])
    return np.array(columns), state


def test_features_in_closed_form():
    names = ("m_normalised", "g_normalised", "m", "v", "m_corrected", "root_v", "gradient")
    names += ("parameter", "momentum_0.5", "m_over_root_3", "momentum_0.9_normalised")
    features = MomentFeatures(names, 0.9, 0.99)
    columns, _ = columns_of(features, [0.5, 0.5, 0.5])
    t = np.arange(1, 4)
    expected = {
        "m_normalised": 1,
        "g_normalised": 1,
        "m": 0.5 * (1 - 0.9**t),
        "v": 0.25 * (1 - 0.99**t),
        "m_corrected": 0.5,
        "root_v": 0.5,
        "gradient": 0.5,
        "parameter": 2,
        "momentum_0.5": 0.5 * (1 - 0.5**t),
        "m_over_root_3": 1,
        "momentum_0.9_normalised": 1,
    }
    for name, column in zip(features.names(), columns.T, strict=True):
        np.testing.assert_allclose(column, expected[name] * np.ones(3), rtol=1e-7, err_msg=name)


def test_only_the_accumulators_that_are_needed_are_kept():
    whole = MomentFeatures("mt+gt+g+mom5+m_over_root_4")
    params = jnp.ones(3)
    assert set(whole.begin(params)) == {"m", "v", "momentum_0.5", "root_4"}
    assert set(whole.select(("g_normalised",)).begin(params)) == {"v"}
    assert set(whole.select(("momentum_0.5_normalised",)).begin(params)) == {"v", "momentum_0.5"}
    assert set(whole.select(("gradient",)).begin(params)) == set()
    momenta = lopt.learned.MomentumFeatures((0.5, 0.9)).select(("momentum_0.9",))
    assert momenta.decays == (0.9,)


def test_warm_ups_are_averages_of_one():
    features = MomentFeatures(("warmup_0.9", "gradient", "time", "warmup_0"))
    assert features.names() == ("gradient", "warmup_0.9", "time", "warmup_0")
    average = 0.0
    for step in range(5):
        average = 0.9 * average + 0.1
        found = features.shared(jnp.asarray(step), jnp.float32)
        np.testing.assert_allclose(found, [average, (step + 1) / 1000, 1.0], rtol=1e-6)
    for name in ("warmup_1", "warmup_0.9_8", "warmup_ 0.9", "momentum_+0.9"):
        with pytest.raises(ValueError, match="There is no feature"):
            MomentFeatures((name,))


def test_time_is_shared_and_last():
    features = MomentFeatures("t+mt")
    assert features.names() == ("m_normalised", "time")
    assert features.shared(jnp.asarray(4, jnp.int32), float).tolist() == [0.005]


def test_logarithm_and_sign():
    columns, _ = columns_of(LogAndSign(5.0), [np.exp(2.0), 0.0, -1e-4])
    np.testing.assert_allclose(columns[0], [0.4, 1], rtol=1e-12)
    np.testing.assert_allclose(columns[1], [-1, 0], atol=1e-12)
    np.testing.assert_allclose(columns[2], [-1, -1e-4 * np.exp(5)], rtol=1e-9)


def test_gradients_may_count_as_constants():
    """The slope of the third loss along the output's bias, against one with frozen gradients."""
    task = lopt.tasks.Quadratic(jnp.full(2, 3.0), jnp.zeros(2))

    def slope(first_order):
        learned = lopt.rnnprop(hidden=(3,), dense=2, multiplier=1.0, first_order=first_order)
        inner = lopt.InnerTraining(task, learned, 3)
        theta = learned.init(KEY)

        def third_loss(shift):
            bias = theta["rule"]["output"]["b"] + shift
            moved = eqx.tree_at(lambda t: t["rule"]["output"]["b"], theta, bias)
            return inner.advance(moved, inner.begin(theta, KEY), 3)[0][2]

        difference = (third_loss(1e-5) - third_loss(-1e-5)) / 2e-5
        return float(jax.grad(third_loss)(0.0)), float(difference)

    exact, difference = slope(False)
    assert exact == pytest.approx(difference, rel=1e-6)
    first_order, _ = slope(True)
    assert abs(first_order - difference) > 1e-3 * abs(difference)
    assert np.sign(first_order) == np.sign(difference)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MomentFeatures(("m", "momenta_0.9")), "momenta_0.9"),
        (lambda: MomentFeatures("mt+mt"), "different"),
        (lambda: MomentFeatures(("momentum_1.5",)), "momentum_1.5"),
        (lambda: MomentFeatures(momentum_decay=1.0), "below 1"),
        (lambda: LogAndSign(0.0), "k=0.0"),
        (lambda: LSTM(2, ()), "cell"),
        (lambda: LSTM(2, (3, 0)), "one unit"),
        (lambda: LSTM(2, biases=3), "biases=3"),
        (lambda: lopt.rnnprop("gt+x"), "'x'"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_rule_made_for_other_features_is_refused():
    rule = LSTM(inputs=3)
    theta = rule.init(KEY)
    with pytest.raises(ValueError, match="inputs=2"):
        rule.apply(theta, jnp.zeros((2, 1)), jnp.zeros(0), rule.begin(theta, (1,)))
