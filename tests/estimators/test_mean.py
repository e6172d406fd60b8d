"""The mean over particles: architectures, what else an estimate says, and what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Drift, Faulty, Position, linear_toy, quadratic_toy

import lopt
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.task import AbstractTaskFamily
from lopt.estimators import LogUniformHorizon
from lopt.learned import Cosine

LEARNED = lopt.LearnableSGD(0.1)


class Several(AbstractTaskFamily):
    """Tasks of several architectures."""

    families: tuple[AbstractTaskFamily, ...]

    def draw(self, key):
        raise NotImplementedError("Each architecture is drawn from on its own.")

    def architectures(self):
        return self.families


def quadratics():
    return tuple(lopt.tasks.QuadraticFamily(dim) for dim in (2, 5))


def windows(tasks):
    return lopt.PES(lopt.InnerTraining(tasks, LEARNED, 4), 2, 0.1)


@pytest.mark.parametrize("at_once", [None, 1])
def test_each_architecture_has_its_share_of_the_particles(at_once, key):
    """Of five particles the first has three, with the keys that they have in any mean."""
    mean, theta = lopt.Mean(windows(Several(quadratics())), 5, at_once), LEARNED.init(key)
    ones = [windows(family) for family in quadratics()]
    state = mean.prepare(theta, key)
    estimate, after = mean.estimate(theta, state, jax.random.key(1))
    assert [each.episodes.train.params.shape for each in state] == [(3, 2, 2), (2, 2, 5)]
    found = []
    for i in range(5):
        which, place = divmod(i, 3)
        own = jax.tree.map(lambda leaf, place=place: leaf[place], state[which])
        each = jax.random.split(jax.random.key(1), 5)[i]
        single, new = ones[which].estimate(theta, own, each)
        found.append(single)
        np.testing.assert_allclose(
            after[which].episodes.train.params[place], new.episodes.train.params, rtol=1e-10
        )
    np.testing.assert_allclose(estimate.loss, np.mean([e.loss for e in found]), rtol=1e-12)
    np.testing.assert_allclose(
        estimate.grads["learning_rate"],
        np.mean([e.grads["learning_rate"] for e in found]),
        rtol=1e-10,
    )


def test_architectures_are_trained_by_the_loop(key):
    mean, optimizer = lopt.Mean(windows(Several(quadratics())), 4), optax.sgd(0.01)
    state = lopt.start(mean, optimizer, LEARNED.init(key), key)
    whole, losses = lopt.unroll(mean, optimizer, state, 4)
    half, _ = lopt.unroll(mean, optimizer, state, 2)
    half, _ = lopt.unroll(mean, optimizer, half, 2)
    assert jnp.isfinite(losses).all()
    np.testing.assert_allclose(
        half.params["learning_rate"], whole.params["learning_rate"], rtol=1e-12
    )


def test_a_second_architecture_is_traced_once_however_many_particles(key):
    draws = []

    class Counted(lopt.tasks.QuadraticFamily):
        def draw(self, key):
            draws.append(self.dim)
            return lopt.tasks.QuadraticFamily(self.dim).draw(key)

    counts = []
    for num in (2, 8):
        mean = lopt.Mean(windows(Several((Counted(2), Counted(3)))), num)
        theta = LEARNED.init(key)
        state = jax.eval_shape(mean.prepare, theta, key)
        draws.clear()
        jax.eval_shape(mean.estimate, theta, state, key)
        counts.append(sorted(draws))
    assert counts[0] == counts[1]
    assert counts[0].count(2) == counts[0].count(3) > 0


def test_an_architecture_that_is_not_finite_is_left_out(key):
    inner = lopt.InnerTraining(Several((Position(), Faulty(1.0))), Drift(), 4)
    mean, theta = lopt.Mean(lopt.ES(inner, 0.1), 6), jnp.asarray(0.3)
    estimate, _ = mean.estimate(theta, mean.prepare(theta, key), key)
    alone = lopt.ES(linear_toy(4), 0.1)
    singles = [alone.estimate(theta, (), k)[0] for k in jax.random.split(key, 6)[:3]]
    assert int(estimate.dropped) == 3
    np.testing.assert_allclose(estimate.loss, np.mean([s.loss for s in singles]), rtol=1e-12)
    np.testing.assert_allclose(estimate.grads, np.mean([s.grads for s in singles]), rtol=1e-12)


def test_every_architecture_needs_a_particle():
    with pytest.raises(ValueError, match=r"Mean\(num=1\).*architectures; try 2"):
        lopt.Mean(windows(Several(quadratics())), 1)


class WithExtra(AbstractGradientEstimator):
    """Another estimator, which also says `factor` times its loss."""

    one: AbstractGradientEstimator
    factor: float

    def prepare(self, params, key):
        return self.one.prepare(params, key)

    def estimate(self, params, state, key):
        found, state = self.one.estimate(params, state, key)
        extra = {"validation": self.factor * found.loss}
        return Estimate(found.loss, found.grads, found.dropped, extra), state


def extra_of(estimator, theta, key):
    estimate, _ = estimator.estimate(theta, estimator.prepare(theta, key), key)
    return estimate


def test_what_else_an_estimate_says_goes_through_combinations(key):
    inner, theta = quadratic_toy(4), {"learning_rate": jnp.log(jnp.asarray(0.1))}
    plain, said = lopt.ES(inner), WithExtra(lopt.ES(inner), 2.0)
    mean = extra_of(lopt.Mean(said, 3), theta, key)
    np.testing.assert_allclose(mean.extra["validation"], 2 * mean.loss, rtol=1e-12)
    arms = extra_of(lopt.Reparameterized(WithExtra(lopt.MetaTask(inner), 2.0)), theta, key)
    np.testing.assert_allclose(arms.extra["validation"], 2 * arms.loss, rtol=1e-12)
    mix = extra_of(lopt.InverseVariance(plain, said, 3), theta, key)
    np.testing.assert_allclose(mix.extra["validation"], 2 * mix.loss, rtol=1e-12)
    # Both terms of a sum, the second without anything to say.
    both = extra_of(lopt.Sum((said, plain), (3.0, 1.0)), theta, key)
    first = extra_of(said, theta, jax.random.split(key, 2)[0])
    np.testing.assert_allclose(both.extra["validation"], 6 * first.loss, rtol=1e-6)


def test_what_else_is_said_is_the_mean_over_finite_particles(key):
    inner = lopt.InnerTraining(Faulty(0.5), Drift(), 2)
    theta = jnp.asarray(0.3)
    found = extra_of(lopt.Mean(WithExtra(lopt.ES(inner), 2.0), 16), theta, key)
    assert 0 < int(found.dropped) < 16
    np.testing.assert_allclose(found.extra["validation"], 2 * found.loss, rtol=1e-12)


def test_the_optimizer_is_told_what_else_is_said(key):
    def update(grads, state, params=None, *, validation, **_):
        return jax.tree.map(lambda g: 0 * g - validation, grads), state

    told = optax.GradientTransformationExtraArgs(lambda params: (), update)
    mean, theta = lopt.Mean(WithExtra(lopt.ES(linear_toy(4)), 2.0), 3), jnp.asarray(0.3)
    state = lopt.start(mean, told, theta, key)
    state, losses = lopt.unroll(mean, told, state, 1)
    np.testing.assert_allclose(theta - state.params, 2 * losses[0], rtol=1e-12)


INNER = quadratic_toy(4)
EAGER = {
    "ES": lambda: lopt.ES(INNER),
    "PES": lambda: lopt.PES(INNER, 2),
    "TruncatedBackprop": lambda: lopt.TruncatedBackprop(INNER, 2),
    "MetaTask": lambda: lopt.MetaTask(INNER),
    "ForwardMode": lambda: lopt.ForwardMode(INNER),
    "ForwardMode, slices": lambda: lopt.ForwardMode(INNER, 4, at_once=2),
    "Mean": lambda: lopt.Mean(lopt.PES(INNER, 2), 4),
    "Mean of one": lambda: lopt.Mean(lopt.MetaTask(INNER), 1),
    "Mean, slices": lambda: lopt.Mean(lopt.PES(INNER, 2), 4, 2),
}


@pytest.fixture
def compilations():
    """The programs that have been compiled, or fetched from the cache on disk."""
    programs = []
    jax.clear_caches()

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", EAGER)
def test_an_estimate_outside_of_jit_compiles_once(name, compilations, key):
    estimator, theta = EAGER[name](), INNER.learned.init(key)
    state = estimator.prepare(theta, key)
    _, state = estimator.estimate(theta, state, jax.random.key(1))
    count = len(compilations)
    assert count > 0
    for i in (2, 3):
        # Built anew: what is compared is what it says, and not which object it is.
        _, state = EAGER[name]().estimate(theta, state, jax.random.key(i))
    assert len(compilations) == count


def test_a_meta_loss_outside_of_jit_compiles_once(compilations, key):
    theta = INNER.learned.init(key)
    quadratic_toy(4).meta_loss(theta, jax.random.key(1))
    count = len(compilations)
    for i in (2, 3):
        quadratic_toy(4).meta_loss(theta, jax.random.key(i))
    assert len(compilations) == count


def test_random_lengths_are_passed_on_and_compile_once(key):
    """On the slope of 1, SGD moves by the sum of its rates, which the length of the run sets."""
    learned = lopt.learnable(optax.sgd, learning_rate=Cosine(0.1))
    inner = lopt.InnerTraining(Position(), learned, 8)
    schedule = LogUniformHorizon(2, 40)
    mean = lopt.Mean(lopt.PES(inner, 2, 1e-9, schedule=schedule), 6)
    theta, traces = learned.init(key), []
    state = mean.prepare(theta, key)

    @jax.jit
    def estimate(state, key):
        traces.append(key)
        return mean.estimate(theta, state, key)[1]

    lengths = set()
    for i in range(12):
        state = estimate(state, jax.random.fold_in(key, i))
        np.testing.assert_array_equal(state.episodes.num_steps, state.clock.length)
        for j in range(6):
            steps, length = state.episodes.train.step[j], int(state.clock.length[j])
            rates = 0.1 * (1 + np.cos(np.pi * np.minimum(np.arange(steps) / length, 1))) / 2
            np.testing.assert_allclose(
                state.episodes.train.params[j], -rates.sum() * np.ones(2), rtol=1e-6
            )
            lengths.add(length)
    assert len(lengths) > 5
    assert len(traces) == 1


def test_a_clipped_gradient_counts_less_the_larger_it_is(key):
    task = quadratic_toy(1).tasks
    clipped = lopt.estimators.Clipped(task, 2.0)
    for size in (1e-3, 2.0, 1e6, 1e200):
        params = jax.tree.map(lambda leaf, size=size: size * leaf, task.init(key))
        plain, found = (
            one.estimate(params, one.prepare(params, key), key)[0] for one in (task, clipped)
        )
        norm = float(optax.tree.norm(plain.grads))
        expected = jax.tree.map(lambda g, norm=norm: g / (1 + (norm / 2.0) ** 2), plain.grads)
        jax.tree.map(np.testing.assert_allclose, found.grads, expected)
        assert float(optax.tree.norm(found.grads)) <= 1.0 + 1e-12
