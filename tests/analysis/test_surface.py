"""Losses after several horizons are those of runs that stop there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.analysis.surface import losses_after
from lopt.core import mean_loss


def inner():
    task = lopt.tasks.Quadratic(jnp.array([0.5, 3.0]), jnp.array([1.0, -1.0]), 0.3)
    return lopt.InnerTraining(task, lopt.LearnableSGD(0.1), 1)


def test_each_is_the_loss_of_a_run_that_stops_there(key):
    subject, horizons = inner(), (1, 4, 9)
    theta = subject.learned.init(key)
    found = losses_after(subject, theta, key, horizons, batches=2)
    run_key, measure_key = jax.random.split(key)
    for loss, horizon in zip(found, horizons, strict=True):
        _, episode = subject.advance(theta, subject.begin(theta, run_key), horizon)
        alone = mean_loss(subject.tasks, episode.train.params, (), measure_key, 2)
        np.testing.assert_allclose(loss, alone, rtol=1e-12)


def test_all_horizons_have_their_gradient_in_one_pass(key):
    subject, theta = inner(), inner().learned.init(key)

    def after(rate):
        return losses_after(subject, {"learning_rate": rate}, key, (2, 7))

    rate = theta["learning_rate"]
    _, slopes = jax.jvp(after, (rate,), (jnp.ones(()),))
    differences = (after(rate + 1e-5) - after(rate - 1e-5)) / 2e-5
    np.testing.assert_allclose(slopes, differences, rtol=1e-7)


@pytest.mark.parametrize("horizons", [(), (0, 3), (5, 3), (3, 3)])
def test_horizons_that_do_not_increase_from_one_are_refused(key, horizons):
    with pytest.raises(ValueError, match="in increasing order"):
        losses_after(inner(), inner().learned.init(key), key, horizons)
