"""Landscapes on which published methods are known to succeed or to fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Faulty, particles, quadratic_toy, quick_jit, surface_toy, train

import lopt

SIZE, POSITIVE = 23, 10
SIGNS = jnp.asarray([1.0] * POSITIVE + [-1.0] * (SIZE - POSITIVE))


def influence(state, theta):
    """A s + theta b: A has 1/2 on the diagonal and above it, b is 1 ten times, then -1."""
    return 0.5 * state + 0.5 * jnp.append(state[1:], 0.0) + theta * SIGNS


class FirstEntry(lopt.AbstractTask):
    """Half the squared distance of the first entry from 1; all start at zero."""

    def init(self, key):
        return jnp.zeros(SIZE)

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return (params[0] - 1) ** 2 / 2


class Influence(lopt.AbstractLearnedOptimizer):
    """Moves the parameters from s to A s + theta b, whatever the gradient."""

    def init(self, key):
        return jnp.zeros(())

    def begin(self, theta, params, num_steps=None):
        return ()

    def update(self, theta, grads, state, params=None, *, value=None, **_):
        return influence(params, theta) - params, state


class TestInfluenceBalancing:
    """Vicol et al. 2021, section 5.1: what theta does first is the opposite of what it does.

    The fixed point is s = (I - A)^-1 theta b, whose first entry is 2 theta sum(b) = -6 theta: the
    best theta of a long run is near -1/6. Within a few steps theta moves that entry upwards.
    """

    horizon, start = 200, 0.0

    def inner(self):
        # Looking after the update, a window of a single step sees theta too.
        objective = lopt.validation_loss
        return lopt.InnerTraining(FirstEntry(), Influence(), self.horizon, objective)

    def optimum(self, horizon=200):
        """The minimum over a fine grid, of a plain loop in numpy."""
        grid = np.linspace(-0.2, 0.05, 1001)
        state, total = np.zeros((SIZE, len(grid))), 0.0
        for _ in range(horizon):
            above = np.concatenate([state[1:], np.zeros((1, len(grid)))])
            state = 0.5 * state + 0.5 * above + np.asarray(SIGNS)[:, None] * grid
            total = total + (state[0] - 1) ** 2 / 2
        return grid[np.argmin(total)]

    def trained(self, one, num, rate, steps, key):
        meta, optimizer, start = lopt.Mean(one, num), optax.sgd(rate), jnp.asarray(self.start)
        return np.asarray(train(meta, optimizer, start, key, steps, lambda step: step.params)[2])

    def test_the_optimum_is_that_of_the_fixed_point(self, key):
        """In the long run; in the short first influences count too, but the sign is the same."""
        assert abs(self.optimum(10_000) + 1 / 6) < 0.01
        assert -1 / 6 < self.optimum() < -0.05
        assert quick_jit(jax.grad(self.inner().meta_loss))(jnp.asarray(self.start), key) > 0

    @pytest.mark.parametrize("window", [1, 5])
    @pytest.mark.parametrize("name", ["TruncatedBackprop", "TruncatedES"])
    def test_short_windows_lead_away(self, name, window, key):
        build = getattr(lopt, name)
        one = build(self.inner(), window, *([0.1] if name == "TruncatedES" else []))
        first = particles(one, jnp.asarray(self.start), key, 8)
        assert (first < 0).all()
        thetas = self.trained(one, 8, 1e-3, 200, key)
        assert thetas[-1] > 0.1

    @pytest.mark.parametrize("name", ["PES", "NRES", "OnlineForwardMode"])
    def test_what_sees_the_past_arrives(self, name, key):
        build = getattr(lopt, name)
        one = build(self.inner(), 5, *([] if name == "OnlineForwardMode" else [0.1]))
        thetas = self.trained(one, 128, 1e-3, 600, key)
        assert abs(thetas[-200:].mean() - self.optimum()) < 0.01


class Apart(lopt.AbstractGradientEstimator):
    """Another estimator with keys of its own."""

    one: lopt.AbstractGradientEstimator

    def prepare(self, params, key):
        return self.one.prepare(params, key)

    def estimate(self, params, state, key):
        return self.one.estimate(params, state, jax.random.fold_in(key, 1))


class TestVarianceCrossover:
    """L = theta^2 / 2 + a sin(w theta): smooth for small w, rough for large w.

    With w = k pi / theta the wave is at its steepest at theta, whatever k: w changes nothing else.
    """

    sigma, theta, height = 0.5, 0.7, 0.1

    def surface(self, k):
        w = k * np.pi / self.theta
        return lambda u: u**2 / 2 + self.height * jnp.sin(w * u)

    def estimators(self, k):
        inner = surface_toy(self.surface(k))
        return lopt.ES(inner, self.sigma), lopt.Reparameterized(lopt.MetaTask(inner), self.sigma)

    def covariance(self, k):
        """By the trapezoidal rule, which for Gaussian integrals is exact to rounding."""
        w = k * np.pi / self.theta
        e, step = np.linspace(-9 * self.sigma, 9 * self.sigma, 20_001, retstep=True)
        density = np.exp(-(e**2) / (2 * self.sigma**2)) / (self.sigma * (2 * np.pi) ** 0.5) * step
        both = self.theta + np.stack([e, -e])
        losses = both**2 / 2 + self.height * np.sin(w * both)
        es = e * (losses[0] - losses[1]) / (2 * self.sigma**2)
        rp = (both + self.height * w * np.cos(w * both)).mean(axis=0)
        np.testing.assert_allclose(density @ es, density @ rp, rtol=1e-9)
        return np.cov(es, rp, aweights=density, ddof=0)

    @pytest.mark.parametrize("k", [1, 7])
    def test_variances_are_those_of_the_formulas(self, k, key):
        for one, expected in zip(self.estimators(k), np.diag(self.covariance(k)), strict=True):
            grads = particles(one, jnp.asarray(self.theta), key, 200_000)
            np.testing.assert_allclose(grads.var(), expected, rtol=0.04)

    def test_they_cross_once(self):
        es, rp = np.array([np.diag(self.covariance(k)) for k in range(10)]).T
        np.testing.assert_array_equal(rp < es, np.arange(10) < 4)

    @pytest.mark.parametrize(("k", "apart"), [(1, False), (3, False), (7, False), (1, True)])
    def test_the_mix_has_the_variance_of_its_weights(self, k, apart, key):
        """With share p = v_rp / (v_es + v_rp): p^2 v_es + (1 - p)^2 v_rp + 2 p (1 - p) cov.

        Without covariance that is 1 / (1 / v_es + 1 / v_rp), below either. Both share their noise,
        though, and where the better is much the better, as for k = 1, the mix may be worse than
        it: by a tenth here, and a little more because the weights are measured. Never so with
        noise apart.
        """
        num, repeats = 64, 5_000
        es, rp = self.estimators(k)
        mix = lopt.InverseVariance(es, Apart(rp) if apart else rp, num)
        variance = particles(mix, jnp.asarray(self.theta), key, repeats).var() * num
        covariance = self.covariance(k)
        if apart:
            covariance = np.diag(np.diag(covariance))
        weights = np.diag(covariance)[::-1] / np.trace(covariance)
        best = np.diag(covariance).min()
        np.testing.assert_allclose(variance, weights @ covariance @ weights, rtol=0.1)
        # Means of 64 are nearly normal: the variance of their sample variance is 2 / repeats.
        allowed = best * (1 + 4 * (2 / repeats) ** 0.5)
        if apart or k > 1:
            assert variance < allowed

    @pytest.mark.parametrize(
        "k", [1, 3, 9, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 5))]
    )
    def test_with_covariance_the_mix_is_never_worse(self, k, key):
        """Of shares from 0 to 1 of the better, the one of least variance, and no more than that."""
        num, repeats = 256, 4_000
        es, rp = self.estimators(k)
        mix = lopt.InverseVariance(es, rp, num, covariance=True)
        variance = particles(mix, jnp.asarray(self.theta), key, repeats).var() * num
        covariance, shares = self.covariance(k), np.linspace(0, 1, 1001)
        weights = np.stack([shares, 1 - shares])
        least = np.einsum("is,ij,js->s", weights, covariance, weights).min()
        best = np.diag(covariance).min()
        assert least <= best
        error = (2 / repeats) ** 0.5
        np.testing.assert_allclose(variance, least, rtol=4 * error)
        assert variance < best * (1 + 4 * error)

    def test_two_of_the_same_with_covariance_are_that_one(self, key):
        es, _ = self.estimators(3)
        theta = jnp.asarray(self.theta)
        for other in (es, lopt.Reparameterized(lopt.MetaTask(es.inner), 0.5)):
            mix = lopt.InverseVariance(es, other, 8, covariance=True)
            estimate, _ = mix.estimate(theta, mix.prepare(theta, key), key)
            keys = jax.random.split(key, 8)
            each = [
                np.asarray(jax.vmap(one.estimate, (None, None, 0))(theta, (), keys)[0].grads)
                for one in (es, other)
            ]
            covariance = np.cov(each)
            denominator = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
            share = 0.0
            if denominator > 0:
                share = np.clip((covariance[1, 1] - covariance[0, 1]) / denominator, 0, 1)
            expected = share * each[0].mean() + (1 - share) * each[1].mean()
            np.testing.assert_allclose(estimate.grads, expected, rtol=1e-6)


class Wave(lopt.AbstractTask):
    """1 - cos(x), of values from 0 to 2 and curvatures up to 1, from a random x."""

    def init(self, key):
        return jax.random.uniform(key, minval=-3.0, maxval=3.0)

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return 1 - jnp.cos(params)


def last_loss(horizon):
    return lambda task, step, _: jnp.where(step.step == horizon - 1, step.loss, 0.0) * horizon


class TestExplodingMetaGradients:
    def slope(self, lengths, logs):
        return np.polyfit(lengths, logs, 1)[0]

    def test_beyond_two_over_the_curvature(self, key):
        """x_t = (1 - a h)^t x_0: the gradient of the last loss grows as t (1 - a h)^(2 t)."""
        task = lopt.tasks.Quadratic(jnp.array([3.0]), jnp.array([0.0]))
        theta, lengths, logs = {"learning_rate": jnp.log(jnp.asarray(0.8))}, [20, 80], []
        for horizon in lengths:
            inner = lopt.InnerTraining(task, lopt.LearnableSGD(0.8), horizon)
            grads = particles(lopt.MetaTask(inner), theta, key, 4)
            logs.append(np.log(np.abs(grads)).mean())
        np.testing.assert_allclose(self.slope(lengths, logs), 2 * np.log(1.4), rtol=0.03)

    def test_chaos_grows_with_the_lyapunov_exponent_but_not_for_es(self, key):
        rate, sigma, num, lengths = 4.6, 0.2, 400, [10, 25, 40]
        x, exponent = np.random.default_rng(0).uniform(-3, 3, 2000), 0.0
        for t in range(1500):
            if t >= 500:
                exponent += np.log(np.abs(1 - rate * np.cos(x))).mean() / 1000
            x = x - rate * np.sin(x)
        theta, logs = {"learning_rate": jnp.log(jnp.asarray(rate))}, []
        for horizon in lengths:
            inner = lopt.InnerTraining(Wave(), lopt.LearnableSGD(rate), horizon, last_loss(horizon))
            grads = particles(lopt.MetaTask(inner), theta, key, num)
            logs.append(np.log(np.abs(grads)).mean())
            es = lopt.ES(inner, sigma)
            keys = jax.random.split(key, num)
            noise, losses = quick_jit(jax.vmap(es.evaluate, (None, 0)))(theta, keys)
            es_grads = np.asarray(jax.vmap(es.score)(noise, losses)["learning_rate"])
            # A pair differs by the range of the loss at most, 2: |e| 2 / (2 sigma^2), and
            # E |e| = (2 / pi)^(1/2) sigma.
            assert (np.abs(es_grads) <= np.abs(noise["learning_rate"]) / sigma**2).all()
            assert 0.1 < np.abs(es_grads).mean() < (2 / np.pi) ** 0.5 / sigma
        assert exponent > 0.3
        np.testing.assert_allclose(np.diff(logs) / np.diff(lengths), exponent, rtol=0.1)


RATE = {"learning_rate": jnp.log(jnp.asarray(0.1))}


def faulty(share):
    return lopt.InnerTraining(Faulty(share), lopt.LearnableSGD(0.1), 4)


def overflowing():
    """Rate 10^4, curvatures of 10^-6 to 1: after 100 steps those above about 0.1 overflow."""
    family = lopt.tasks.QuadraticFamily(1, 1e-6, 1.0)
    return lopt.InnerTraining(family, lopt.LearnableSGD(1e4), 100)


PARTIAL = {
    "ES": lambda: lopt.ES(faulty(0.4), 0.1),
    "PES": lambda: lopt.PES(faulty(0.4), 2, 0.1),
    "PolicyGradient": lambda: lopt.PolicyGradient(faulty(0.4), 0.1),
    "overflow": lambda: lopt.MetaTask(overflowing()),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_mean_counts_what_it_leaves_out(name, key):
    """The mean of the finite, the number of the others; and training goes on."""
    one, num, steps = PARTIAL[name](), 32, 5
    theta = {"learning_rate": jnp.log(jnp.asarray(1e4 if name == "overflow" else 0.1))}
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    mean = lopt.Mean(one, num)
    state, end, records = train(
        mean, optimizer, theta, key, steps, lambda step: (step.grads, step.loss, step.dropped)
    )
    grads, losses, dropped = records[0]["learning_rate"], *records[1:]
    assert np.isfinite(end.params["learning_rate"])
    assert np.isfinite(grads).all()
    assert (dropped > 0).all()

    keys = jax.random.split(jax.random.fold_in(key, 0), num)
    each, _ = quick_jit(jax.vmap(one.estimate, (None, 0, 0)))(theta, state.estimator_state, keys)
    loss, grad = np.asarray(each.loss), np.asarray(each.grads["learning_rate"])
    fine = np.isfinite(loss) & np.isfinite(grad)
    assert 1 < fine.sum() < num - 1
    assert int(dropped[0]) == num - fine.sum()
    np.testing.assert_allclose(losses[0], loss[fine].mean(), rtol=1e-9)
    np.testing.assert_allclose(grads[0], grad[fine].mean(), rtol=1e-9)


ALL = {
    "Mean": lambda inner: lopt.Mean(lopt.ES(inner), 6),
    "InverseVariance": lambda inner: lopt.InverseVariance(
        lopt.ES(inner), lopt.Reparameterized(lopt.MetaTask(inner)), 6
    ),
    "RankedES": lambda inner: lopt.RankedES(lopt.ES(inner), 6),
    "RandomSearch": lambda inner: lopt.RandomSearch(inner, 6),
    "Evosax": lambda inner: lopt.Evosax(inner, 6),
}


@pytest.mark.parametrize("name", ALL)
def test_nothing_finite_moves_nothing(name, key):
    estimator = ALL[name](faulty(1.0))

    def first(theta, key):
        return estimator.estimate(theta, estimator.prepare(theta, key), key)[0]

    estimate = quick_jit(first)(RATE, key)
    assert int(estimate.dropped) == 6
    assert float(estimate.grads["learning_rate"]) == 0.0


def cliff(u):
    """(u - 1)^2, which is no number from 0.3 on."""
    return jnp.where(u < 0.3, (u - 1) ** 2, jnp.nan)


@pytest.mark.parametrize("surface", [jnp.sin, cliff])
def test_ranks_are_those_of_numpy(surface, key):
    """u_i = (rank - 1) / (2 n - 1) - 1/2, equal ones sharing; what is not finite is the highest."""
    es, num = lopt.ES(surface_toy(surface), 0.3), 10
    theta = jnp.asarray(0.0)
    noise, losses = jax.vmap(es.evaluate, (None, 0))(theta, jax.random.split(key, num))
    losses = np.asarray(losses)
    broken = ~np.isfinite(losses)
    assert broken.any() == (surface is cliff)
    filled = np.where(broken, 1e9, losses)[..., None]
    lower, equal = (filled.ravel() < filled).sum(-1), (filled.ravel() == filled).sum(-1)
    utilities = (lower + (equal - 1) / 2) / (2 * num - 1) - 0.5
    expected = np.mean(noise * (utilities[:, 0] - utilities[:, 1])) / (2 * 0.3**2)
    estimate, _ = lopt.RankedES(es, num).estimate(theta, (), key)
    np.testing.assert_allclose(estimate.grads, expected, rtol=1e-12)
    np.testing.assert_allclose(estimate.loss, losses[~broken].mean(), rtol=1e-12)
    assert int(estimate.dropped) == broken.any(axis=1).sum()


def test_inverse_variance_leaves_out_both(key):
    inner, num = faulty(0.4), 16
    one, other = lopt.ES(inner, 0.1), lopt.Reparameterized(lopt.MetaTask(inner), 0.1)
    mix = lopt.InverseVariance(one, other, num)
    state = mix.prepare(RATE, key)
    estimate, _ = mix.estimate(RATE, state, key)
    keys = jax.random.split(key, num)
    a = jax.vmap(one.estimate, (None, None, 0))(RATE, (), keys)[0].grads["learning_rate"]
    b = jax.vmap(other.estimate, (None, 0, 0))(RATE, state[1], keys)[0].grads["learning_rate"]
    fine = np.isfinite(a) & np.isfinite(b)
    assert int(estimate.dropped) == num - fine.sum() > 0
    a, b = np.asarray(a)[fine], np.asarray(b)[fine]
    weights = 1 / (np.array([a.var(ddof=1), b.var(ddof=1)]) + 1e-8)
    expected = weights @ [a.mean(), b.mean()] / weights.sum()
    np.testing.assert_allclose(estimate.grads["learning_rate"], expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["RandomSearch", "CMA_ES", "Open_ES"])
def test_search_goes_up_to_the_cliff(name, key):
    """From 0 the best that is still finite is in front of 0.3; the loss at 0 is 1."""
    inner = surface_toy(cliff)
    if name == "RandomSearch":
        search = lopt.RandomSearch(inner, 16, 0.2)
    else:
        search = lopt.Evosax(inner, 16, name, 0.2)
    _, state, (losses, dropped) = train(
        search, optax.sgd(1.0), jnp.zeros(()), key, 20, lambda step: (step.loss, step.dropped)
    )
    assert 0 < int(dropped.sum()) < 16 * 20
    assert np.isfinite(losses).all()
    # The steps of evosax's OpenAI-ES are those of Adam, which does not stop at the cliff.
    assert (0.1 if name == "Open_ES" else 0.25) < float(state.params) < 0.3


def test_sum_is_the_weighted_sum(key):
    inner = quadratic_toy(4)
    theta = inner.learned.init(key)
    terms = (lopt.MetaTask(inner), lopt.Mean(lopt.ES(inner, 0.1), 3))
    total = lopt.Sum(terms, (2.0, -0.5))
    estimate, _ = total.estimate(theta, total.prepare(theta, key), key)
    parts = [t.estimate(theta, (), k)[0] for t, k in zip(terms, jax.random.split(key), strict=True)]
    loss, grads = (
        2.0 * a - 0.5 * b
        for a, b in zip(*[(p.loss, p.grads["learning_rate"]) for p in parts], strict=True)
    )
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(estimate.grads["learning_rate"], grads, rtol=1e-12)


def test_sum_trains_on_two_architectures_in_one_step(key):
    families = (
        lopt.tasks.QuadraticFamily(2, 0.1, 1.0),
        lopt.tasks.Quadratic(jnp.ones(7), jnp.zeros(7)),
    )
    inners = [lopt.InnerTraining(f, lopt.LearnableSGD(0.01), 5) for f in families]
    meta = lopt.Sum(tuple(lopt.Mean(lopt.ES(i, 0.1), 8) for i in inners))
    theta = inners[0].learned.init(key)
    _, state, _ = train(meta, optax.sgd(0.3), theta, key, 60)
    for inner in inners:
        before, after = quick_jit(jax.vmap(inner.meta_loss, (0, None)))(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), theta, state.params), key
        )
        assert after < 0.6 * before


def test_policy_gradient_and_es_agree_on_a_bandit(key):
    """A bandit with reward -(sin 2u + u^2): d/dm E[...] = 2 cos(2 m) e^(-2 s^2) + 2 m."""
    inner, theta, sigma = surface_toy(lambda u: jnp.sin(2 * u) + u**2), jnp.asarray(0.4), 0.3
    expected = 2 * np.cos(0.8) * np.exp(-2 * sigma**2) + 0.8
    for estimator in (lopt.PolicyGradient(inner, sigma), lopt.ES(inner, sigma)):
        grads = particles(estimator, theta, key, 40_000, 2)[:, 1]
        error = grads.std(ddof=1) / 200
        assert error < 0.02
        assert abs(grads.mean() - expected) < 4 * error
