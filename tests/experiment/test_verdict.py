"""Closed forms of what evaluations measure."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.experiment.baselines import BASELINES, optlist, random_adam
from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.evaluation import Trial
from lopt.experiment.evaluation.metrics import Scale, normalised

pytestmark = pytest.mark.standard_promotion
NAN, INF = np.nan, np.inf


def test_normalised_losses_are_linear_clipped_and_stay_where_they_diverged():
    losses = [5.0, 1.0, 3.0, -9.0, 90.0]
    np.testing.assert_allclose(normalised(losses, 1.0, 5.0), [1.0, 0.0, 0.5, -2.0, 2.0])
    np.testing.assert_allclose(normalised([3.0, NAN, 1.0], 1.0, 5.0), [0.5, 2.0, 2.0])
    np.testing.assert_allclose(normalised([[INF, 1.0], [3.0, 1.0]], 1.0, 5.0), [[2, 2], [0.5, 0]])
    assert normalised([7.0], 5.0, 5.0) == 2.0  # nothing that Adam could do


def scale_of(curves, ends):
    """A scale from curves of Adam by window, and ends by setting."""
    made = []
    for curve, end in zip(curves, ends, strict=True):
        judged = np.array([[4.0, end]])
        made.append(Trial(np.array([curve], float), judged, judged, np.zeros(1), {}))
    return Scale.of(made[:2], made[2:], horizon=20)


def test_the_scale_is_of_the_best_configuration_and_counts_steps_of_adam():
    """Two rates: one fast and then stuck, one slow, and one that diverges elsewhere."""
    scale = scale_of([[4, 2, 2, 2.0], [4, 3, 2, 1.0], [NAN] * 4], [2.0, 1.0, NAN])
    assert scale.best == {"train": 1.0, "held_out": 1.0}
    assert scale.init == {"train": 4.0, "held_out": 4.0}
    np.testing.assert_allclose(scale.steps, [5, 10, 15, 20])
    np.testing.assert_allclose(scale.envelope, [4, 2, 2, 1])
    assert scale.adam_steps(4.5) == 5
    assert scale.adam_steps(3.0) == 7.5
    assert scale.adam_steps(2.0) == 10
    assert scale.adam_steps(1.5) == 17.5
    assert scale.adam_steps(0.9) == INF
    np.testing.assert_allclose(scale.normalised([1.0, 2.5], "train"), [0.0, 0.5])
    logs = scale.logs(np.array([NAN, 90.0, 1.0, 0.0]), "train")
    np.testing.assert_allclose(logs, np.log([7.0, 7.0, 1.0, 4e-8]))
    assert scale.logs(np.array([-1.0]), "train") is None


def test_steps_to_a_level_end_the_first_twentieth_below_it():
    losses = np.stack([np.linspace(3, 0, 100), np.full(100, 2.0), np.linspace(3, 0, 100)])
    losses[2, 10] = NAN
    # Windows of two steps; the mean of five that end with number n is that of number n - 2.
    expected = 2 * (np.argmax(losses[0] <= 1.0) + 2 + 1)
    np.testing.assert_allclose(metrics.steps_to(losses, 1.0, 200), [expected, INF, INF])
    np.testing.assert_allclose(metrics.final_level(losses[:2]), [losses[0, -5:].mean(), 2.0])


def test_verdicts_say_what_five_seeds_can():
    assert metrics.verdict(metrics.paired(np.array([-1.0, -1.1, -0.9, -1.2, -0.8]))) == "beats"
    assert metrics.verdict(metrics.paired(np.array([0.3, 0.31, 0.29, 0.3, 0.32]))) == "falls behind"
    unsure = metrics.paired(np.array([-1.0, -0.9, -1.1, 0.4, -0.2]))
    assert metrics.verdict(unsure) == "inconclusive"
    assert unsure.low < unsure.value < unsure.high
    np.testing.assert_allclose(unsure.value, -0.56)
    assert metrics.verdict(metrics.paired(np.zeros(5))) == "inconclusive"


def test_intervals_of_five_seeds_hold_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(1).normal(size=(120, 5))
    found = [metrics.paired(seeds) for seeds in draws]
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.9


def test_the_interquartile_mean_is_that_of_the_middle_and_seeds_are_drawn_within_tasks():
    assert metrics.iqm(np.array([1, 2, 3, 4, 5, 6, 7, 800.0])) == 4.5
    # Within a task all seeds agree: however they are drawn, nothing changes.
    tasks = [np.full(5, value) for value in (0.0, 1.0, 2.0, 30.0)]
    found = metrics.stratified(tasks)
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)


def test_profiles_count_what_is_within_a_ratio_of_the_best():
    costs = np.array([[10.0, 20.0, INF, INF], [20.0, 10.0, 30.0, INF]])
    shares = metrics.profile(costs, np.array([1.0, 1.9, 2.0, 4.0]))
    np.testing.assert_allclose(shares, [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75]])
    # Solved within 1, 2, never, never: 1, 2/3 and 0 of the way from 1 to 4; and 2, 1, 1, never.
    exact = [(1 + 2 / 3) / 4, (2 / 3 + 1 + 1) / 4]
    np.testing.assert_allclose(metrics.profile(costs).mean(axis=1), exact, atol=3e-3)


def test_the_best_of_k_trials():
    losses = np.array([[3.0, 1.0, 2.0]])
    np.testing.assert_allclose(metrics.expected_best(losses, 1), 2.0)
    np.testing.assert_allclose(metrics.expected_best(losses, 2), (5 * 1 + 3 * 2 + 1 * 3) / 9)
    np.testing.assert_allclose(metrics.expected_best(losses, 500), 1.0)
    table = np.concatenate([losses, losses + 1])
    assert metrics.worth(2.5, table) == 1
    assert metrics.worth(2.4, table) == 2
    assert metrics.worth(1.0, table) == INF


def updates_of(optimizer, steps=20):
    """Updates on one gradient after another."""
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3)}

    def step(carry, i):
        params, state = carry
        grads = {"w": jnp.sin(params["w"] + i)}
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates["w"]

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(float(steps)))[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SGD", lambda rate: optax.sgd(rate)),
        ("momentum", lambda rate: optax.sgd(rate, 0.9)),
        ("Adam", lambda rate: optax.adam(rate)),
        ("Adam, linear", lambda rate: optax.adam(optax.linear_schedule(rate, 0.0, 20))),
        ("Adam, inverse time", lambda rate: optax.adam(lambda t: rate / (1 + t / 2))),
        ("Adam, inverse root", lambda rate: optax.adam(lambda t: rate / (1 + 5 * t) ** 0.5)),
    ],
)
def test_baselines_are_those_of_optax(name, expected):
    contestant = BASELINES[name]
    row = jnp.asarray(contestant.grid[3])
    ours, theirs = contestant.factory(row, 20), expected(contestant.grid[3, 0])
    np.testing.assert_allclose(updates_of(ours), updates_of(theirs), rtol=1e-6)


def test_the_cosine_rises_and_falls_to_zero():
    """AdamW with the schedule of Optax, whose warm-up ends a step later."""
    row = jnp.asarray(BASELINES["AdamW, cosine"].grid[0]).at[1].set(0.2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, row[0], 4, 20)

    def at(step):  # ours takes the first step of the warm-up already
        return jnp.where(step < 4, row[0] * (step + 1) / 4, schedule(step))

    theirs = optax.adamw(at, weight_decay=0.01)
    ours = BASELINES["AdamW, cosine"].factory(row, 20)
    np.testing.assert_allclose(updates_of(ours), updates_of(theirs), rtol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_descends_a_parabola_untuned(name):
    contestant = BASELINES[name]
    assert contestant.budgets == (1, 11)
    assert len({*contestant.grid[:, 0]}) == 11
    optimizer = contestant.factory(jnp.asarray(contestant.grid[0]), 100)
    params = {"w": jnp.full((3, 3), 0.5), "b": jnp.full(3, 0.5)}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)  # of |params|^2 / 2
        return (optax.apply_updates(params, updates), state), ()

    (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=100)
    judged = contestant.params_of(state, params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(judged)) < 0.5


def test_random_settings_are_in_their_ranges_and_the_same_again():
    grid = random_adam().grid
    assert grid.shape == (32, 9)
    np.testing.assert_array_equal(grid, random_adam().grid)
    assert ((grid[:, 0] >= 1e-5) & (grid[:, 0] <= 1)).all()
    assert ((grid[:, 4] >= 0) & (grid[:, 4] <= 0.999)).all()


def test_optlist_is_taken_in_its_order(pytestconfig):
    path = pytestconfig.rootpath.parent / "shared" / "weights" / "optlist" / "opt_list.json"
    if not path.exists():
        pytest.skip("there is no ../shared/weights/optlist beside the checkout")
    found = optlist(path)
    assert found.grid.shape == (30, 9)
    assert found.budgets == (1, 10, 30)
    np.testing.assert_allclose(found.grid[0, [0, 4, 7]], [1.19e-3, 0.936, 0.0101], rtol=1e-2)
    assert updates_of(found.factory(jnp.asarray(found.grid[0]), 20)).shape == (20, 2, 3)


def test_a_list_that_is_none_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"learning_rate": 1.0}]))
    with pytest.raises(ValueError, match=r"list\.json is not a list .* beta1"):
        optlist(path)
