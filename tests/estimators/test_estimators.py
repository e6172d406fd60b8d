import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import linear_toy, quadratic_toy

import lopt
from lopt.estimators.antithetic import perturbation, score


def golden_case(golden, name):
    file = np.load(golden / "estimator_formulas.npz")
    return {key[len(name) + 1 :]: file[key] for key in file.files if key.startswith(name + "/")}


@pytest.mark.parametrize("kind", ["es", "pes"])
def test_formula_matches_the_golden_file(kind, golden):
    """Truncation 0, in which no episode ends: each task's score, averaged over tasks."""
    inputs, expected = golden_case(golden, "in/0"), golden_case(golden, f"{kind}/0/plain")
    assert not inputs["is_done"].any()
    noise = {"a": inputs["vec_pos/a"], "w": inputs["vec_pos/w"]}
    if kind == "pes":
        accumulated = golden_case(golden, "pes/0/accumulator_in")
        noise = {name: noise[name] + accumulated[name] for name in noise}
    means = [jnp.asarray(inputs[f"{sign}_loss"].mean(axis=0)) for sign in ("pos", "neg")]
    noise = jax.tree.map(jnp.asarray, noise)
    scores = jax.vmap(lambda e, p, n: score(e, p, n, 0.1))(noise, *means)
    np.testing.assert_allclose((means[0] + means[1]).mean() / 2, expected["loss"], rtol=1e-6)
    for name in noise:
        np.testing.assert_allclose(
            scores[name].mean(axis=0), expected[f"grad/{name}"], rtol=2e-5, atol=1e-5
        )


def windows(estimator, num_windows, num, key, theta):
    """Mean and standard error of each window's estimate, over particles that begin together."""
    keys = jax.random.split(key, num)
    state = jax.vmap(estimator.prepare, (None, 0))(theta, keys)
    results = []
    for i in range(num_windows):
        keys = jax.random.split(jax.random.fold_in(key, i), num)
        estimate, state = jax.vmap(estimator.estimate, (None, 0, 0))(theta, state, keys)
        grads = np.asarray(estimate.grads)
        results.append((grads.mean(), grads.std(ddof=1) / num**0.5))
    return results


@pytest.mark.parametrize("truncation", [1, 3])
def test_pes_is_unbiased_also_where_episodes_end(truncation, key):
    """On the linear toy with horizon 9 a window's true derivative is the mean of its steps.

    An older implementation gives the last step of an episode to the wrong perturbation; with
    truncation 1 it would see nothing of the last step, whose derivative is 8.
    """
    pes = lopt.PES(linear_toy(9), truncation, sigma=0.1, stagger=False)
    count = 9 // truncation
    estimates = windows(pes, 2 * count, 40_000, key, jnp.asarray(0.3))
    for i, (mean, error) in enumerate(estimates):
        first = (i % count) * truncation
        expected = first + (truncation - 1) / 2
        assert error < 0.5
        assert abs(mean - expected) < 4 * error + 1e-9, (i, mean, expected, error)


def test_truncated_backprop_on_the_linear_toy_misses_what_came_before(key):
    truncated = lopt.TruncatedBackprop(linear_toy(9), 3, stagger=False)
    estimates = windows(truncated, 6, 2, key, jnp.asarray(0.3))
    # Within each window the derivative starts again from zero: 0, 1, 2, the mean of which is 1.
    np.testing.assert_allclose([mean for mean, _ in estimates], np.ones(6), rtol=1e-12)


def test_variance_of_es_on_the_linear_toy(key):
    """The score is e (2 c e) / (2 s^2) = c e^2 / s^2: mean c and variance 2 c^2."""
    es, num = lopt.ES(linear_toy(9), 0.05), 100_000
    estimates, _ = jax.vmap(es.estimate, (None, None, 0))(
        jnp.asarray(0.3), (), jax.random.split(key, num)
    )
    slope = 4.0
    assert abs(estimates.grads.mean() - slope) < 4 * (2 * slope**2 / num) ** 0.5
    np.testing.assert_allclose(estimates.grads.var(), 2 * slope**2, rtol=0.05)


def test_partners_share_everything_but_theta(key):
    """With noise in the task, partners see the same: their difference has no noise of its own."""
    task = lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), noise_scale=5.0)
    inner = lopt.InnerTraining(task, lopt.LearnableSGD(0.1), 4)
    theta, sigma = inner.learned.init(key), 1e-7
    for estimator in (lopt.ES(inner, sigma), lopt.PES(inner, 2, sigma)):
        states = estimator.prepare(theta, key)
        estimate, _ = estimator.estimate(theta, states, key)
        # A difference between batches would be divided by sigma^2.
        assert float(jnp.abs(estimate.grads["learning_rate"])) < 1e4


def test_staggered_particles_restart_at_different_times(key):
    pes = lopt.PES(linear_toy(10), 2, 0.1)
    ages = jax.vmap(pes.prepare, (None, 0))(jnp.asarray(0.1), jax.random.split(key, 500)).clock.age
    values, counts = np.unique(ages, return_counts=True)
    np.testing.assert_array_equal(values, [0, 2, 4, 6, 8])
    assert counts.min() > 60
    state = lopt.PES(linear_toy(10), 2, 0.1, stagger=False).prepare(jnp.asarray(0.1), key)
    assert int(state.clock.age) == 0


@pytest.mark.parametrize("name", ["PES", "TruncatedBackprop"])
def test_a_diverged_episode_restarts_at_the_next_truncation(name, key):
    inner = quadratic_toy(40, learning_rate=1e30)
    estimator = getattr(lopt, name)(inner, 20, stagger=False)
    theta = inner.learned.init(key)
    state = estimator.prepare(theta, key)
    estimate, state = estimator.estimate(theta, state, key)
    assert not np.isfinite(estimate.loss)
    healthy = {"learning_rate": jnp.log(jnp.asarray(0.1))}
    estimate, state = estimator.estimate(healthy, state, key)
    assert np.isfinite(estimate.loss)
    assert int(state.clock.age) == 20


def test_perturbation_has_the_deviation_it_says(key):
    theta = {"a": jnp.zeros(20_000), "b": jnp.zeros((100, 200))}
    noise = perturbation(key, theta, 0.3)
    for leaf, shape in ((noise["a"], (20_000,)), (noise["b"], (100, 200))):
        assert leaf.shape == shape
        assert abs(leaf.mean()) < 4 * 0.3 / 20_000**0.5
        np.testing.assert_allclose(leaf.std(), 0.3, rtol=4 / 40_000**0.5)
    assert abs(np.corrcoef(noise["a"], noise["b"].ravel())[0, 1]) < 4 / 20_000**0.5


@pytest.mark.parametrize("at_once", [None, 1, 3, 6])
def test_mean_is_the_mean_of_its_particles(at_once, key):
    one = lopt.PES(linear_toy(4), 2, 0.1)
    mean = lopt.Mean(one, 6, at_once)
    theta = jnp.asarray(0.3)
    state = mean.prepare(theta, key)
    estimate, after = mean.estimate(theta, state, key)
    singles = []
    for i, each in enumerate(jax.random.split(key, 6)):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        single, own_after = one.estimate(theta, own, each)
        singles.append(float(single.grads))
        np.testing.assert_allclose(after.noise[i], own_after.noise, rtol=1e-12)
    np.testing.assert_allclose(estimate.grads, np.mean(singles), rtol=1e-12)


@pytest.mark.standard_promotion
def test_meta_training_finds_the_best_learning_rate(key):
    """On 1/2 h x^2 the best rate is 1 / h, by every unbiased estimator."""
    task = lopt.tasks.Quadratic(jnp.array([2.0]), jnp.array([0.0]))
    inner = lopt.InnerTraining(task, lopt.LearnableSGD(0.05), 4)
    theta = inner.learned.init(key)
    for meta in (
        lopt.Mean(lopt.MetaTask(inner), 8),
        lopt.Mean(lopt.ES(inner, 0.05), 64),
        lopt.Mean(lopt.PES(inner, 2, 0.05), 256),
    ):
        optimizer = optax.adam(0.1)
        state = lopt.start(meta, optimizer, theta, key)
        state, _ = lopt.unroll(meta, optimizer, state, 150)
        rate = float(jnp.exp(state.params["learning_rate"]))
        assert 0.4 < rate < 0.6, (type(meta.one), rate)


def test_validation_objective_looks_after_the_step(key):
    """The validation loss of a step is that of the next step's parameters."""
    inner = quadratic_toy(3)
    validated = lopt.InnerTraining(inner.tasks, inner.learned, 3, lopt.validation_loss)
    theta = inner.learned.init(key)
    train, _ = inner.advance(theta, inner.begin(theta, key), 3)
    valid, _ = validated.advance(theta, validated.begin(theta, key), 3)
    np.testing.assert_allclose(valid[:-1], train[1:], rtol=1e-12)
    assert float(valid[-1]) < float(valid[0])


def test_ramped_loss_weighs_the_end_more(key):
    inner = quadratic_toy(4)
    ramped = lopt.InnerTraining(inner.tasks, inner.learned, 4, lopt.RampedLoss())
    theta = inner.learned.init(key)
    plain, _ = inner.advance(theta, inner.begin(theta, key), 4)
    weighted, _ = ramped.advance(theta, ramped.begin(theta, key), 4)
    np.testing.assert_allclose(weighted, plain * np.array([0.5, 1.0, 1.5, 2.0]), rtol=1e-12)


BAD = [
    (lambda: lopt.PES(linear_toy(100), 30), "truncation=30.*try 25 or 50"),
    (lambda: lopt.PES(linear_toy(10), 0), "truncation=0"),
    (lambda: lopt.PES(linear_toy(10), 20), "truncation=20.*try 10"),
    (lambda: lopt.PES(linear_toy(10), 5, 0.0), "sigma=0.0"),
    (lambda: lopt.PES(linear_toy(10), 5, float("nan")), "sigma=nan"),
    (lambda: lopt.ES(linear_toy(10), -1.0), "sigma=-1.0"),
    (lambda: lopt.TruncatedBackprop(linear_toy(10), 3), "truncation=3.*try 2 or 5"),
    (lambda: lopt.Mean(lopt.ES(linear_toy(10)), 0), "num=0"),
    (lambda: lopt.Mean(lopt.ES(linear_toy(10)), 10, 3), "at_once=3"),
    (lambda: linear_toy(0), "horizon=0"),
    (lambda: linear_toy(-5), "horizon=-5"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_input_is_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("num_steps", [0, -1])
def test_unroll_refuses_a_number_of_steps_that_is_not_positive(num_steps, key):
    task, optimizer = linear_toy(2).tasks, optax.sgd(0.1)
    state = lopt.start(task, optimizer, task.init(key), key)
    with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
        lopt.unroll(task, optimizer, state, num_steps)


def test_start_refuses_keys_and_params_of_the_wrong_kind(key):
    task, optimizer = linear_toy(2).tasks, optax.sgd(0.1)
    with pytest.raises(TypeError, match="typed key"):
        lopt.start(task, optimizer, task.init(key), jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match=r"\['n'\].*int"):
        lopt.start(task, optimizer, {"n": jnp.arange(3)}, key)


def test_second_call_does_not_trace_again(key):
    traces = []

    class Counted(lopt.AbstractTask):
        def init(self, key):
            return jnp.ones(2)

        def batch(self, key, split="train"):
            return ()

        def loss(self, params, batch):
            traces.append(0)
            return jnp.sum(params**2)

    task, optimizer = Counted(), optax.sgd(0.1)
    state = lopt.start(task, optimizer, task.init(key), key)
    state, _ = lopt.unroll(task, optimizer, state, 3)
    count = len(traces)
    lopt.unroll(Counted(), optimizer, state, 3)
    assert len(traces) == count


def test_a_window_may_be_reduced_to_the_log_of_its_sum(key):
    """Its derivative is that of the losses, over their sum: here each second window of two."""
    inner, theta = quadratic_toy(4), {"learning_rate": jnp.log(jnp.asarray(0.1))}
    reduced = lopt.TruncatedBackprop(inner, 2, stagger=False, reduction=lopt.estimators.log_of_sum)
    plain = lopt.TruncatedBackprop(inner, 2, stagger=False)
    states = [each.prepare(theta, key) for each in (reduced, plain)]
    for _ in range(2):
        found, states[0] = reduced.estimate(theta, states[0], key)
        mean, states[1] = plain.estimate(theta, states[1], key)
        np.testing.assert_allclose(found.loss, jnp.log(2 * mean.loss), rtol=1e-7)
        np.testing.assert_allclose(
            found.grads["learning_rate"], mean.grads["learning_rate"] / mean.loss, rtol=1e-7
        )
        assert abs(found.grads["learning_rate"]) > 1e-3
