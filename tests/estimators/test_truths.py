"""Every meta-gradient estimator against a truth in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import NoisyParabola, linear_toy, particles, quadratic_toy, quick_jit

import lopt
from lopt.estimators import ConstantHorizon, LogUniformHorizon, RampedHorizon
from lopt.estimators.truncation import Windows

# One coordinate under SGD with a learned log rate; smoothing by SIGMA changes the gradient visibly.
CURVATURE, DEVIATION, START, RATE, SIGMA = 1.3, 0.7, 1.5, 0.35, 0.25
HORIZON, WINDOW, NUM = 6, 2, 100_000
COUNT = HORIZON // WINDOW
LOG = math.log(RATE)
THETA = {"learning_rate": jnp.asarray(LOG)}

# Which of the independent perturbations each step sees.
NEVER = (None,) * HORIZON
ONCE = (0,) * HORIZON
PER_WINDOW = (0, 0, 1, 1, 2, 2)
PER_PERIOD = (0, 0, 0, 0, 1, 1)


def noisy():
    task = NoisyParabola(CURVATURE, DEVIATION, START)
    return lopt.InnerTraining(task, lopt.LearnableSGD(RATE), HORIZON)


def expected_loss(logs, cut=False, h=CURVATURE, s=DEVIATION, moment=START**2):
    """The meta-loss expected for log rates of each step, from E x_0^2 = moment.

    With q = a h and P_t = E x_t^2: P' = (1 - q)^2 P + (q s)^2 and E loss_t = h (P_t + s^2) / 2.
    With `cut` the moment that a window starts from is data.
    """
    losses = []
    for t, log in enumerate(logs):
        if cut and t % WINDOW == 0:
            moment = jax.lax.stop_gradient(moment)
        losses.append(h * (moment + s**2) / 2)
        q = jnp.exp(log) * h
        moment = (1 - q) ** 2 * moment + (q * s) ** 2
    return jnp.mean(jnp.stack(losses))


def over_noise(function, dims, nodes=17):
    """E function(e) for e ~ N(0, SIGMA^2 I) of `dims` entries, by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = np.stack(np.meshgrid(*[x] * dims, indexing="ij"), -1).reshape(-1, dims)
    weights = functools.reduce(np.multiply.outer, [w / w.sum()] * dims).ravel()
    values = quick_jit(jax.vmap(function))(jnp.asarray(SIGMA * points))
    return jax.tree.map(lambda v: float(np.sum(weights * np.asarray(v))), values)


@functools.cache
def target(index, cut=False, loss=expected_loss, log=LOG, nodes=17):
    """The gradient of E loss(log rate + e[index]); where index is (None, ...) there is no e."""
    if index[0] is None:
        return float(quick_jit(jax.grad(lambda log: loss(log + jnp.zeros(len(index)), cut)))(log))
    slope = jax.grad(lambda log, e: loss(log + e[np.array(index)], cut))
    return over_noise(lambda e: slope(log, e), max(index) + 1, nodes)


def one_arm(inner):
    return lopt.ES(inner, SIGMA, antithetic=False)


def backprop(inner):
    return lopt.TruncatedBackprop(inner, WINDOW, stagger=False)


def online(inner):
    return lopt.OnlineForwardMode(inner, WINDOW, stagger=False)


# Estimator, the perturbations and the cut of its target, and how many windows it takes.
CASES = {
    "ES": (lambda i: lopt.ES(i, SIGMA), ONCE, False, 1),
    "ES one arm": (one_arm, ONCE, False, 1),
    "PolicyGradient": (lambda i: lopt.PolicyGradient(i, SIGMA), ONCE, False, 1),
    "Reparameterized": (lambda i: lopt.Reparameterized(lopt.MetaTask(i), SIGMA), ONCE, False, 1),
    "PES": (lambda i: lopt.PES(i, WINDOW, SIGMA, False), PER_WINDOW, False, COUNT),
    "NRES": (lambda i: lopt.NRES(i, WINDOW, SIGMA, False), ONCE, False, COUNT),
    "GPES": (lambda i: lopt.GPES(i, WINDOW, 2 * WINDOW, SIGMA, False), PER_PERIOD, False, COUNT),
    "TruncatedES": (lambda i: lopt.TruncatedES(i, WINDOW, SIGMA, False), PER_WINDOW, True, COUNT),
    "TruncatedBackprop": (backprop, NEVER, True, COUNT),
    "ForwardMode": (lopt.ForwardMode, NEVER, False, 1),
    "two directions": (lambda i: lopt.ForwardMode(i, directions=2), NEVER, False, 1),
    "OnlineForwardMode": (online, NEVER, False, COUNT),
}


@functools.cache
def measured(name):
    """The estimates of two episodes of each particle, each averaged over its windows."""
    build, _, _, count = CASES[name]
    estimates = particles(build(noisy()), THETA, jax.random.key(7), NUM, 2 * count)
    return estimates.reshape(2 * NUM, count).mean(axis=1)


@pytest.mark.parametrize("name", CASES)
def test_mean_is_the_gradient_in_closed_form(name):
    """Within four standard errors, each of which is a small part of the gradient."""
    _, index, cut, _ = CASES[name]
    grads, truth = measured(name), target(index, cut)
    error = grads.std(ddof=1) / len(grads) ** 0.5
    # A single arm differs from the next by far more than a pair does.
    assert error < (0.1 if name in ("ES one arm", "PolicyGradient") else 0.02) * abs(truth)
    assert abs(grads.mean() - truth) < 4 * error


def test_the_bias_of_truncation_is_the_difference_of_two_closed_forms():
    """What truncation forgets here is more than a third of the gradient, and no sampling error."""
    bias = target(NEVER, cut=True) - target(NEVER)
    grads = measured("TruncatedBackprop")
    error = grads.std(ddof=1) / len(grads) ** 0.5
    assert abs(bias) > 100 * error
    assert abs(grads.mean() - target(NEVER) - bias) < 4 * error


def run(log, e, noise):
    """Mean losses of each window with noise c given: a plain loop, a quadratic function of c."""
    x, losses = jnp.asarray(START), []
    for t in range(HORIZON):
        losses.append(CURVATURE * (x - noise[t]) ** 2 / 2)
        x = x - jnp.exp(log + e[t]) * CURVATURE * (x - noise[t])
    return jnp.stack(losses).reshape(COUNT, WINDOW).mean(axis=1)


def score_of(name, e, noise):
    """The estimate of a particle with perturbations e and noise c."""
    log, index = LOG, np.array(CASES[name][1])
    if name == "ES one arm":
        return e[0] * run(log, e[index], noise).mean() / SIGMA**2
    difference = run(log, e[index], noise) - run(log, -e[index], noise)
    total = jnp.cumsum(e) if name == "PES" else jnp.full(COUNT, e[0])
    return jnp.mean(total * difference) / (2 * SIGMA**2)


@pytest.mark.parametrize("name", ["ES", "ES one arm", "PES", "NRES"])
def test_variance_is_that_of_a_quadratic_form(name):
    """Given e an estimate is q(c) = q_0 + b c + c A c, and c ~ N(0, s^2 I).

    So E q = q_0 + s^2 tr A and E q^2 = (E q)^2 + s^2 |b|^2 + 2 s^4 |A|^2.
    """
    zero = jnp.zeros(HORIZON)

    def moments(e):
        q = functools.partial(score_of, name, e)
        b, a = jax.grad(q)(zero), jax.hessian(q)(zero) / 2
        mean = q(zero) + DEVIATION**2 * jnp.trace(a)
        return mean, mean**2 + DEVIATION**2 * b @ b + 2 * DEVIATION**4 * jnp.sum(a**2)

    mean, square = over_noise(moments, max(CASES[name][1]) + 1)
    np.testing.assert_allclose(mean, target(CASES[name][1]), rtol=1e-6)
    np.testing.assert_allclose(measured(name).var(), square - mean**2, rtol=0.1)


class TestRandomQuadratics:
    """E (x_0 - c)^2 = 2 and log h is uniform: the expected meta-loss is a Legendre quadrature."""

    dim, low, high, horizon = 3, 0.1, 1.0, 8
    log = math.log(0.6)

    def inner(self, learned=None):
        family = lopt.tasks.QuadraticFamily(self.dim, self.low, self.high)
        return lopt.InnerTraining(family, learned or lopt.LearnableSGD(0.6), self.horizon)

    def loss(self, logs, cut=False):
        x, w = np.polynomial.legendre.leggauss(12)
        curvatures = jnp.asarray(np.exp(np.log(self.high / self.low) * (x - 1) / 2) * self.high)
        losses = jax.vmap(lambda h: expected_loss(logs, cut, h, 0.0, 2.0))(curvatures)
        return self.dim * jnp.sum(losses * w) / 2

    @pytest.mark.parametrize("name", ["ES", "PES", "NRES", "TruncatedBackprop"])
    def test_means_over_the_family(self, name, key):
        """Of truncated backpropagation the mean is that of closed form, far from the gradient."""
        build, count = CASES[name][0], 1 if name == "ES" else self.horizon // WINDOW
        index = {
            "PES": tuple(t // WINDOW for t in range(self.horizon)),
            "TruncatedBackprop": (None,) * self.horizon,
        }.get(name, (0,) * self.horizon)
        cut = name == "TruncatedBackprop"
        grads = particles(
            build(self.inner()), {"learning_rate": jnp.asarray(self.log)}, key, 30_000, count
        ).mean(axis=1)
        error = grads.std(ddof=1) / len(grads) ** 0.5
        truth = target(index, cut, self.loss, self.log, nodes=8)
        assert error < 0.02 * abs(truth)
        assert abs(grads.mean() - truth) < 4 * error
        if cut:
            full = target(index, False, self.loss, self.log)
            assert abs(grads.mean() - full) > 20 * error

    def test_forward_and_online_equal_backward(self, key):
        """Online, the mean over the windows of one episode; to rounding."""
        inner = self.inner()
        carried = online(inner)

        @quick_jit
        def both(theta, key):
            # The episode's key is that of its first window.
            first = jax.random.fold_in(key, 0)
            backward, _ = lopt.MetaTask(inner).estimate(theta, (), first)
            forward, _ = lopt.ForwardMode(inner).estimate(theta, (), first)

            def window(state, i):
                estimate, state = carried.estimate(theta, state, jax.random.fold_in(key, i))
                return state, estimate

            _, each = jax.lax.scan(window, carried.prepare(theta, key), jnp.arange(4))
            return backward, forward, jax.tree.map(lambda leaf: leaf.mean(0), each)

        backward, *others = both({"learning_rate": jnp.asarray(self.log)}, key)
        for other in others:
            np.testing.assert_allclose(other.loss, backward.loss, rtol=1e-12)
            np.testing.assert_allclose(
                other.grads["learning_rate"], backward.grads["learning_rate"], rtol=1e-11
            )

    @pytest.mark.standard_promotion
    def test_slices_of_directions_equal_all_at_once(self, key):
        """Of Adam's four weights three at a time: the last slice is filled up."""
        inner = self.inner(lopt.LearnableAdam(0.05))
        theta = inner.learned.init(key)
        assert len(theta) == 4
        backward, *others = (
            quick_jit(estimator.estimate)(theta, (), key)[0]
            for estimator in (
                lopt.MetaTask(inner),
                lopt.ForwardMode(inner),
                lopt.ForwardMode(inner, at_once=3),
            )
        )
        for other in others:
            for name, value in backward.grads.items():
                np.testing.assert_allclose(other.grads[name], value, rtol=1e-9, atol=1e-14)


class TestSegments:
    def test_gradients_do_not_depend_on_segments(self, key):
        inner, theta = quadratic_toy(12), quadratic_toy(12).learned.init(key)
        grads = []
        for segments, keep in ((1, False), (3, False), (12, False), (1, True)):
            meta = lopt.MetaTask(inner, segments, keep)
            truncated = lopt.TruncatedBackprop(inner, 12, False, None, segments, keep)
            first, second = quick_jit(
                lambda theta, m=meta, t=truncated: (
                    m.estimate(theta, (), key)[0],
                    t.estimate(theta, t.prepare(theta, key), key)[0],
                )
            )(theta)
            grads.append([first.grads["learning_rate"], second.grads["learning_rate"]])
        np.testing.assert_allclose(grads[1:], [grads[0]] * 3, rtol=1e-12)

    def test_memory_grows_like_the_square_root(self, key):
        """A hundred times the horizon in ten times the memory; uncut in a hundred times."""

        def memory(horizon, segments):
            task = lopt.tasks.Quadratic(jnp.ones(1000), jnp.zeros(1000))
            inner = lopt.InnerTraining(task, lopt.LearnableSGD(0.1), horizon)
            meta = lopt.MetaTask(inner, segments)
            grad = jax.jit(lambda theta: meta.estimate(theta, (), key)[0].grads)
            compiled = grad.lower(inner.learned.init(key)).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert 5 < memory(10_000, 100) / memory(100, 10) < 20
        assert memory(10_000, 1) / memory(100, 1) > 50


def drawn_lengths(schedule, outer_step, key, truncation=1, num=20_000):
    windows = Windows(truncation, schedule, stagger=False)
    draw = quick_jit(jax.vmap(windows._length, (0, None)))
    return np.asarray(draw(jax.random.split(key, num), jnp.asarray(outer_step, jnp.int32)))


@pytest.mark.parametrize("step", [0, 25, 50, 100, 1000])
def test_ramped_lengths(step, key):
    """first + (last - first) step / outer_steps, times 1 +- 0.2, and never above last."""
    drawn = drawn_lengths(RampedHorizon(100, 1100, 100), step, key)
    mean = min(100 + 10 * step, 1100)
    assert drawn.min() >= 0.8 * mean - 0.5
    assert drawn.max() <= min(1.2 * mean + 0.5, 1100)
    # Uniform jitter has the deviation 0.4 / 12^(1/2); cut at the top, half of it is left.
    expected, spread = (mean, 0.4 * mean / 12**0.5) if mean < 1100 else (0.95 * mean, 0.0645 * mean)
    np.testing.assert_allclose(drawn.mean(), expected, atol=4 * spread / 20_000**0.5 + 0.1)
    np.testing.assert_allclose(drawn.std(), spread, rtol=0.03)


def test_log_uniform_lengths(key):
    """The largest gap between the distribution of log length and the uniform one.

    Kolmogorov: n^(1/2) times it is above 1.95 once in a thousand times.
    """
    drawn = drawn_lengths(LogUniformHorizon(1_000, 1_000_000), 3, key)
    u = np.sort(np.log(drawn / 1_000) / np.log(1_000))
    gap = np.abs(u - (np.arange(20_000) + 0.5) / 20_000).max()
    assert gap < 1.95 / 20_000**0.5


def test_lengths_are_whole_windows(key):
    assert set(drawn_lengths(ConstantHorizon(40), 7, key, 8, 50)) == {40}
    drawn = drawn_lengths(LogUniformHorizon(1, 100), 0, key, 8)
    np.testing.assert_array_equal(np.unique(drawn), 8 * np.arange(1, 13))


@pytest.mark.parametrize("build", [lopt.PES, lopt.TruncatedBackprop])
def test_schedules_resume_to_the_bit(build, key):
    """Age, length and outer step are part of the state: 2 + 2 steps are 4 steps."""
    one = build(linear_toy(100), 2, schedule=RampedHorizon(2, 12, 4))
    mean, optimizer = lopt.Mean(one, 8), optax.sgd(0.01)
    state = lopt.start(mean, optimizer, jnp.asarray(0.1), key)
    whole, _ = lopt.unroll(mean, optimizer, state, 4)
    parts, _ = lopt.unroll(mean, optimizer, state, 2)
    parts, _ = lopt.unroll(mean, optimizer, parts, 2)
    clock = whole.estimator_state.clock
    np.testing.assert_array_equal(clock.outer_step, np.full(8, 4))
    assert len(set(clock.length.tolist())) > 1
    assert (clock.age <= clock.length).all()
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_an_episode_is_as_long_as_its_schedule_says(key):
    pes = lopt.PES(linear_toy(100), 2, 0.1, False, RampedHorizon(2, 12, 5, 0.0))
    state, theta, seen = pes.prepare(jnp.asarray(0.1), key), jnp.asarray(0.1), []
    estimate = quick_jit(pes.estimate)
    for i in range(12):
        _, state = estimate(theta, state, jax.random.fold_in(key, i))
        seen.append((int(state.clock.age), int(state.clock.length)))
    # Begun at outer steps 0, 1, 3 and 7, with two inner steps more for each; never cut short.
    assert seen == [(age, n) for n in (2, 4, 8, 12) for age in range(2, n + 1, 2)][:12]


INNER = quadratic_toy(10)
KEY = jax.random.key(0)
BAD = [
    (lambda: lopt.RandomSearch(INNER, 4).estimate({}, (), KEY), "no weights"),
    (lambda: lopt.Evosax(INNER, 4).prepare({}, KEY), "no weights"),
    (lambda: lopt.PolicyGradient(INNER).prepare({}, KEY), "no weights"),
    (lambda: lopt.NRES(INNER, 3), r"truncation=3\).*try 2 or 5"),
    (lambda: lopt.TruncatedES(INNER, 4), r"truncation=4\).*try 2 or 5"),
    (lambda: lopt.OnlineForwardMode(INNER, 20), r"truncation=20\).*try 10"),
    (lambda: lopt.PES(INNER, 4, schedule=ConstantHorizon(10)), r"truncation=4\)"),
    (lambda: lopt.GPES(INNER, 2, 5), "period=5.*multiple"),
    (lambda: lopt.GPES(INNER, 2, 0), "period=0.*multiple"),
    (lambda: lopt.NRES(INNER, 5, 0.0), "sigma=0.0"),
    (lambda: lopt.TruncatedES(INNER, 5, -0.1), "sigma=-0.1"),
    (lambda: lopt.Reparameterized(lopt.MetaTask(INNER), 0.0), "Reparameterized.*sigma=0.0"),
    (lambda: lopt.PolicyGradient(INNER, float("inf")), "PolicyGradient.*sigma=inf"),
    (lambda: lopt.PolicyGradient(INNER, decay=1.0), "decay=1.0"),
    (lambda: lopt.RandomSearch(INNER, 4, -1.0), "RandomSearch.*sigma=-1.0"),
    (lambda: lopt.RandomSearch(INNER, 0), "num=0"),
    (lambda: lopt.Evosax(INNER, 4, sigma=0.0), "Evosax.*sigma=0.0"),
    (lambda: lopt.Evosax(INNER, 1), "num=1.*at least 2"),
    (lambda: lopt.Evosax(INNER, 4, "Newton"), "strategy='Newton'.*CMA_ES"),
    (lambda: lopt.InverseVariance(lopt.ES(INNER), lopt.ES(INNER), 1), "num=1.*at least 2"),
    (lambda: lopt.ES(INNER, sign=True, antithetic=False), "sign=True, antithetic=False"),
    (lambda: lopt.RankedES(lopt.ES(INNER), 0), "RankedES.*num=0"),
    (lambda: lopt.RankedES(lopt.ES(INNER, antithetic=False), 1), "RankedES.*num=1"),
    (lambda: lopt.ForwardMode(INNER, directions=0), "directions=0"),
    (lambda: lopt.ForwardMode(INNER, at_once=0), "at_once=0"),
    (lambda: lopt.TruncatedBackprop(INNER, 10, segments=3), "segments=3.*divide"),
    (lambda: INNER.meta_loss(INNER.learned.init(KEY), KEY, segments=3), "segments=3.*num_steps=10"),
    (lambda: lopt.Sum(()), "at least one"),
    (lambda: lopt.Sum((lopt.ES(INNER),), (1.0, 2.0)), "1 finite numbers"),
    (lambda: lopt.Sum((lopt.ES(INNER),), (float("nan"),)), "1 finite numbers"),
    (lambda: ConstantHorizon(0), "length=0"),
    (lambda: RampedHorizon(0, 10), "first=0"),
    (lambda: RampedHorizon(10, -1), "last=-1"),
    (lambda: RampedHorizon(10, 20, 0), "outer_steps=0"),
    (lambda: RampedHorizon(10, 20, 5, 1.0), "jitter=1.0"),
    (lambda: LogUniformHorizon(0, 10), "shortest=0"),
    (lambda: LogUniformHorizon(10, 9), "longest=9.*shortest=10"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
