"""Averages of what a rule sees: their values, what is kept of them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.learned import AdafactorFeatures, Averaged, MomentFeatures, with_features
from lopt.symbolic.record import Recorder, draw_places

KEY = jax.random.key(0)
TASK = lopt.tasks.Quadratic(jnp.ones(50), jnp.arange(1.0, 51.0))


def recorded(learned, theta, steps=7):
    """Trains, and returns the features and updates of each step."""
    places = draw_places(TASK.init(KEY), 50, KEY)
    optimizer = learned.optimizer(theta)
    state = lopt.start(TASK, optimizer, TASK.init(KEY), KEY)
    record = Recorder(places, learned, theta)
    _, seen = lopt.unroll(TASK, optimizer, state, steps, record=record)
    return seen.features, seen.outputs["update"]


def averages(values, decay):
    found, average = [], np.zeros_like(values[0])
    for value in values:
        average = decay * average + (1 - decay) * value
        found.append(average)
    return np.stack(found)


@pytest.mark.parametrize("block_size", [16, 10_000])
@pytest.mark.parametrize("make", [lopt.dm, lopt.rnnprop, lopt.adafactor_mlp])
def test_averages_follow_their_recursion_and_change_nothing(make, block_size):
    network = make()
    network = lopt.Coordinatewise(network.features, network.rule, network.scale, False, block_size)
    theta = network.init(KEY)
    more = MomentFeatures(("gradient", "time"))
    learned, weights = with_features(network, theta, more, decays=(0.5, 0.9))
    features, updates = recorded(learned, weights)
    columns = set(network.features.column_names()) - {"parameter"}
    for decay in (0.5, 0.9):
        for name in columns:
            expected = averages(np.asarray(features[name], float), decay)
            found = features[f"average_{decay}_{name}"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    _, alone = recorded(network, theta)
    np.testing.assert_allclose(updates, alone, rtol=1e-5, atol=1e-9)


def test_only_what_is_needed_is_kept():
    features = Averaged(
        MomentFeatures(("m_normalised", "g_normalised", "momentum_0.5", "time")),
        ("average_0.9_g_normalised", "average_0.5_m_normalised"),
    )
    params = jnp.ones(3)
    kept = features.select(("average_0.9_g_normalised",))
    assert kept.names() == ("g_normalised", "average_0.9_g_normalised")
    assert len(jax.tree.leaves(kept.begin(params))) == 2  # v, and the average
    kept = features.select(("momentum_0.5", "time"))
    assert kept == MomentFeatures(("momentum_0.5", "time"))
    kept = features.select(("average_0.5_m_normalised", "time"))
    assert kept.names() == ("m_normalised", "average_0.5_m_normalised", "time")


def test_weights_of_the_features_are_theirs():
    own = AdafactorFeatures()
    features = Averaged(own, ("average_0.9_gradient",))
    expected = own.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, features.init(KEY), expected)
    assert features.select(("average_0.9_gradient",)) == features


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("average_0.9_nothing",), "no column 'nothing'; there are m_normalised, g_normalised"),
        (("average_0.9_time",), "no column 'time'"),
        (("average_g_normalised",), "write it as average_0.9_gradient"),
        (("average_1_g_normalised",), r"decay 1.0 must be at least 0 and below 1; try 0.9"),
        (("average_nan_g_normalised",), "write it as average_0.9_gradient"),
        (("0.9_g_normalised",), "write it as average_0.9_gradient"),
        (("average_0..9_g_normalised",), "write it as average_0.9_gradient"),
        (("average_0.9_g_normalised",) * 2, "different new names"),
    ],
)
def test_other_names_are_refused(names, words):
    with pytest.raises(ValueError, match=words):
        Averaged(MomentFeatures(("m_normalised", "g_normalised", "time")), names)


def test_a_decay_keeps_all_its_digits():
    network = lopt.rnnprop("gt")
    seen, _ = with_features(network, network.init(KEY), decays=(0.123456789, 1e-5))
    averages = ("average_0.123456789_g_normalised", "average_1e-05_g_normalised")
    assert seen.features.names() == ("g_normalised", *averages)
    state = seen.features.begin(jnp.zeros(1))
    _, state = seen.features.update((), jnp.ones(1), state, jnp.zeros(1), jnp.asarray(0))
    np.testing.assert_allclose(state["averages"][averages[1]], 1 - 1e-5, rtol=1e-6)


def test_a_decay_that_is_none_is_refused():
    network = lopt.dm()
    with pytest.raises(ValueError, match=r"decay 1\.5 must be at least 0 and below 1"):
        with_features(network, network.init(KEY), decays=(1.5,))
    with pytest.raises(ValueError, match=r"must be different new names"):
        with_features(network, network.init(KEY), decays=(0.9, 0.5, 0.9))


def test_neither_averages_nor_what_the_rule_has_done_are_averaged():
    network = lopt.rnnprop(("g_normalised", "parameter"))
    seen, theta = with_features(network, network.init(KEY), decays=(0.9,))
    names = ("g_normalised", "parameter", "average_0.9_g_normalised")
    assert seen.features.names() == names
    again, theta = with_features(seen, theta, decays=(0.9, 0.5))
    assert again.features.names() == (*names, "average_0.5_g_normalised")
    features, _ = recorded(again, theta)
    values = np.asarray(features["g_normalised"], float)
    for decay in (0.5, 0.9):
        found = features[f"average_{decay}_g_normalised"]
        np.testing.assert_allclose(found, averages(values, decay), rtol=1e-4, atol=1e-6)
