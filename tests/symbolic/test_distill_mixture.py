"""Mixes of features: what is linear is found as it is, and nonlinear mixes nearly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.learned.muon import FACTORS, FEATURES
from lopt.symbolic import distill_mixture, mixture_to_text

TASK = lopt.tasks.mlp_classification(lopt.load_images("digits"), (8,), batch_size=16)


@pytest.fixture(scope="module")
def learned():
    return lopt.learned.muon_mlp(2, axes=lopt.learned.MatrixAxes("out_in"))


def test_a_linear_mix_is_found_as_it_is(learned):
    theta = learned.init(jax.random.key(0))
    linear = theta["matrix"]["linear"]
    linear = linear.at[FEATURES.index("s/root"), FACTORS.index("progress")].set(0.7)
    theta["matrix"]["linear"] = linear
    found = distill_mixture(TASK, learned, theta, jax.random.key(1), horizons=(30, 60), loss=1e-4)
    assert min(found.r_squared.values()) > 0.999
    mix = found.linear["matrix"]
    assert np.allclose(mix, linear, atol=1e-3)
    assert np.count_nonzero(np.asarray(mix)) == 2
    assert mixture_to_text(mix, FEATURES, FACTORS).count("progress) s/root") == 1


def test_a_nonlinear_mix_is_explained_in_part_and_gives_an_optimizer(learned):
    theta = learned.init(jax.random.key(0))
    theta["matrix"]["gates"] = jnp.ones_like(theta["matrix"]["gates"])
    found = distill_mixture(TASK, learned, theta, jax.random.key(1), horizons=(30, 60))
    assert 0.8 < found.r_squared["matrix"] < 0.9999
    short = distill_mixture(TASK, learned, theta, jax.random.key(1), horizons=(30, 60), longest=1)
    assert np.count_nonzero(short.theta["matrix"]["linear"]) == 1
    assert short.r_squared["matrix"] < found.r_squared["matrix"]
    losses = []
    for rule, weights in ((learned, theta), found[:2]):
        optimizer = rule.optimizer(weights, 60)
        key = jax.random.key(2)
        state = lopt.start(TASK, optimizer, TASK.init(key), key)
        losses.append(float(lopt.unroll(TASK, optimizer, state, 60)[1][-10:].mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
