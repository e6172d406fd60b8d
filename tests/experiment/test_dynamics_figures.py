"""Figures of the dynamics of optimizers are drawn, for what is measured and for what is extreme."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import (
    AlignmentRecord,
    Companions,
    UpdateHistogram,
    effective_rate,
    tensor_names,
    valley_portrait,
    valley_starts,
)
from lopt.experiment.report import curves, new_figure, png
from lopt.experiment.report import dynamics_plots as plots

pytestmark = pytest.mark.standard_promotion


PNG = b"\x89PNG\r\n\x1a\n"


def size(draw, *arguments):
    """Returns the width and height of a PNG."""
    figure = new_figure(6.0, 4.0)
    assert draw(figure, *arguments)
    content = png(figure)
    assert content[:8] == PNG
    return struct.unpack(">II", content[16:24])


def test_records_of_a_run_are_drawn(key):
    task = lopt.tasks.Quadratic(jnp.ones(4), jnp.ones(4))
    # One looks on, and one does nothing, which has no angle.
    companions = Companions(optax.sgd(0.1), {"SGD": optax.sgd(0.2), "none": optax.set_to_zero()})
    histogram, record = UpdateHistogram(), AlignmentRecord(companions)
    state = lopt.start(task, companions.optimizer, task.init(key), key)

    def watch(step):
        return histogram(step), record(step), effective_rate(step.updates, step.grads)

    _, (counts, angles, rates) = lopt.unroll(task, companions.optimizer, state, 6, record=watch)
    names = tensor_names(state.params)
    found = (counts.counts, counts.largest, histogram.edges)
    assert size(plots.draw_histograms, found, names)[0] > 100
    cosines = {name: np.asarray(one.overall_cosine)[None] for name, one in angles.items()}
    panels = {"cosine": cosines, "rate": {"all": np.asarray(rates.overall)[None]}}
    assert curves("alignment", panels, log={"cosine": False, "rate": "signed"}).png[:8] == PNG


def test_answers_are_drawn():
    values = jnp.linspace(-1, 1, 7)
    responses = jax.vmap(lambda scale: scale * values)(jnp.arange(200.0))
    one, five = (
        size(plots.draw_responses, {str(i): (values, responses) for i in range(n)}) for n in (1, 5)
    )
    assert five[0] == pytest.approx(4 * one[0], abs=4)
    assert five[1] == pytest.approx(2 * one[1], abs=4)


def test_portraits_are_drawn():
    starts = valley_starts(2.0, 3)
    found = {
        "SGD": valley_portrait(optax.sgd(0.1), starts, 10),
        "too fast": valley_portrait(optax.sgd(3.0), starts, 10),
        "still": valley_portrait(optax.set_to_zero(), starts[4:5], 2),
    }
    assert size(plots.draw_portraits, found)[0] > 800
