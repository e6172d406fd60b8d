"""Records computed together are those of each step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import linear_toy

import lopt
from lopt.experiment.trainings import recorded_together


def everything(step):
    """A record of all that a step can see, keys as numbers drawn with them."""
    drawn = jax.random.uniform(step.key), step.dropped * jnp.ones(())
    return drawn, step.step, step.params, step.opt_state, step.loss, step.grads, step.updates


CASES = {
    "quadratic": (lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), 0.3), jnp.arange(3.0)),
    "PES": (lopt.Mean(lopt.PES(linear_toy(6), 2, 0.1), 3), jnp.asarray(-2.0)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [1, 4, 12, 5, 50])
def test_records_of_many_steps_are_those_of_each(name, at_once, key):
    """Also where their number is cut to a divisor, 5 to 4 and 50 to 12."""
    (estimator, params), optimizer = CASES[name], optax.adam(1e-2)
    state = lopt.start(estimator, optimizer, params, key)
    end, records = lopt.unroll(estimator, optimizer, state, 12, record=everything)
    other, together = recorded_together(estimator, optimizer, state, 12, everything, at_once)
    assert int(other.step) == 12
    for a, b in zip(
        jax.tree.leaves((other.params, other.opt_state, together)),
        jax.tree.leaves((end.params, end.opt_state, records)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
