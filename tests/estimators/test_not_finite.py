"""What overflows: it is left out and counted, and what did not is kept. Most of it in 32 bits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Faulty, estimate_of, quick_jit

import lopt


class Wave(lopt.AbstractTask):
    """1 - cos x is at most 2, its derivatives by the rate of chaotic runs are not bounded."""

    def init(self, key):
        return jax.random.uniform(key, minval=-3.0, maxval=3.0)

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return 1 - jnp.cos(params)


def chaotic(horizon):
    return lopt.InnerTraining(Wave(), lopt.LearnableSGD(4.6), horizon)


def steep(horizon):
    """Beyond two over the curvature: the loss grows by the factor 1.96 in each step."""
    task = lopt.tasks.Quadratic(jnp.array([3.0]), jnp.array([0.0]))
    return lopt.InnerTraining(task, lopt.LearnableSGD(0.8), horizon)


def mix_of(inner, sigma, num=8):
    return lopt.InverseVariance(
        lopt.ES(inner, sigma), lopt.Reparameterized(lopt.MetaTask(inner), sigma), num
    )


@pytest.mark.parametrize(
    ("build", "horizon", "sigma"),
    [(steep, 70, 0.01), (steep, 80, 0.01), (steep, 120, 0.01), (chaotic, 50, 0.2)],
)
def test_a_mix_of_large_numbers_is_finite(build, horizon, sigma, key):
    """Gradients above 1e19 have squares that 32 bits do not hold."""
    with jax.enable_x64(False):
        mix = mix_of(build(horizon), sigma)
        theta = mix.one.inner.learned.init(key)
        each = quick_jit(jax.vmap(lopt.MetaTask(mix.one.inner).estimate, (None, None, 0)))(
            theta, (), jax.random.split(key, 8)
        )[0]
        assert float(jnp.abs(each.grads["learning_rate"]).max()) > 1e19
        estimate, _ = estimate_of(mix)(theta, mix.prepare(theta, key), key)
        assert estimate.grads["learning_rate"].dtype == jnp.float32
        assert np.isfinite(estimate.grads["learning_rate"])


def test_where_all_derivatives_overflow_evolution_strategies_count_alone():
    key = jax.random.key(2)
    with jax.enable_x64(False):
        mix = mix_of(chaotic(150), 0.2)
        theta = mix.one.inner.learned.init(key)
        smooth, _ = estimate_of(lopt.Mean(mix.other, 8))(
            theta, jax.vmap(mix.other.prepare, (None, 0))(theta, jax.random.split(key, 8)), key
        )
        assert int(smooth.dropped) == 8
        alone, _ = estimate_of(lopt.Mean(mix.one, 8))(theta, (), key)
        estimate, _ = estimate_of(mix)(theta, mix.prepare(theta, key), key)
        assert int(estimate.dropped) == 0
        assert float(alone.grads["learning_rate"]) != 0
        np.testing.assert_allclose(estimate.loss, alone.loss, rtol=1e-5)
        np.testing.assert_allclose(
            estimate.grads["learning_rate"], alone.grads["learning_rate"], rtol=1e-5
        )


class Sometimes(lopt.AbstractGradientEstimator):
    """Normal numbers around theta, and with probability `share` no number."""

    share: float
    salt: int
    scale: float = 1.0

    def prepare(self, params, key):
        return ()

    def estimate(self, params, state, key):
        key = jax.random.fold_in(key, self.salt)
        loss, *grads = jax.random.normal(key, (3,))
        fine = jax.random.uniform(jax.random.fold_in(key, 1)) >= self.share
        grads = jnp.where(fine, params + self.scale * jnp.stack(grads), jnp.nan)
        return lopt.core.Estimate(jnp.where(fine, loss, jnp.nan), grads), state


@pytest.mark.parametrize("shares", [(0.3, 0.6), (0.0, 1.0), (1.0, 0.0), (0.5, 0.0), (1.0, 1.0)])
def test_each_half_has_its_own_mean_and_variance(shares, key):
    num, theta = 16, jnp.asarray([1.0, 2.0])
    terms = [Sometimes(share, salt, salt) for salt, share in enumerate(shares, 1)]
    estimate, _ = lopt.InverseVariance(*terms, num).estimate(theta, ((), ()), key)
    keys = jax.random.split(key, num)
    each = [jax.vmap(term.estimate, (None, None, 0))(theta, (), keys)[0] for term in terms]
    losses, grads = np.asarray([e.loss for e in each]), np.asarray([e.grads for e in each])
    fine = np.isfinite(losses)
    assert int(estimate.dropped) == num - fine.any(axis=0).sum()
    if not fine.any():
        assert np.isnan(estimate.loss)
        np.testing.assert_array_equal(estimate.grads, np.zeros(2))
        return
    np.testing.assert_allclose(estimate.loss, losses[fine].mean(), rtol=1e-12)
    kept = [g[f] for g, f in zip(grads, fine, strict=True) if f.any()]
    weights = np.stack([1 / (g.var(axis=0, ddof=1) + 1e-8) for g in kept])
    means = np.stack([g.mean(axis=0) for g in kept])
    expected = (weights * means).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(estimate.grads, expected, rtol=1e-10)


def test_a_mean_of_the_largest_numbers_is_finite(key):
    class Huge(lopt.AbstractGradientEstimator):
        def prepare(self, params, key):
            return ()

        def estimate(self, params, state, key):
            return lopt.core.Estimate(jnp.asarray(1e308), jnp.full(2, 1e308)), state

    for mean in (lopt.Mean(Huge(), 8), lopt.InverseVariance(Huge(), Huge(), 8)):
        estimate, _ = mean.estimate(jnp.zeros(2), mean.prepare(jnp.zeros(2), key), key)
        np.testing.assert_allclose(estimate.loss, 1e308, rtol=1e-12)
        np.testing.assert_allclose(estimate.grads, np.full(2, 1e308), rtol=1e-12)


def test_derivatives_that_overflow_do_not_end_a_particle(key):
    """Its episode ends with them; back at a calm rate all particles count again."""
    with jax.enable_x64(False):
        mean, still = lopt.Mean(lopt.OnlineForwardMode(chaotic(100_000), 20), 8), optax.sgd(0.0)
        state = lopt.start(mean, still, mean.one.inner.learned.init(key), key)
        run = quick_jit(
            lambda s: lopt.unroll(mean, still, s, 30, record=lambda step: (step.loss, step.dropped))
        )
        state, (_, dropped) = run(state)
        assert 0 < int(dropped.sum()) < 8 * 30 / 2
        calm = {"learning_rate": jnp.log(jnp.asarray(0.1))}
        state = eqx.tree_at(lambda s: s.params, state, calm)
        _, (losses, dropped) = run(state)
        # One window more may overflow before the next begins.
        assert int(dropped[1:].sum()) == 0
        assert np.isfinite(losses[1:]).all()


def faulty(share):
    return lopt.InnerTraining(Faulty(share), lopt.LearnableSGD(0.1), 4)


RATE = {"learning_rate": jnp.log(jnp.asarray(0.1))}


def test_sum_leaves_out_a_term_that_is_not_finite(key):
    good, bad = lopt.ES(faulty(0.0), 0.1), lopt.ES(faulty(1.0), 0.1)
    lost = lopt.Mean(bad, 5)
    for terms, dropped in (((good, bad), 1), ((good, lost), 5), ((good, good, bad, bad), 2)):
        weights = tuple(float(2 + i) for i in range(len(terms)))
        total = lopt.Sum(terms, weights)
        estimate, _ = total.estimate(RATE, total.prepare(RATE, key), key)
        assert int(estimate.dropped) == dropped
        keys = jax.random.split(key, len(terms))
        parts = [
            (w, good.estimate(RATE, (), k)[0])
            for w, term, k in zip(weights, terms, keys, strict=True)
            if term is good
        ]
        np.testing.assert_allclose(estimate.loss, sum(w * p.loss for w, p in parts), rtol=1e-12)
        np.testing.assert_allclose(
            estimate.grads["learning_rate"],
            sum(w * p.grads["learning_rate"] for w, p in parts),
            rtol=1e-12,
        )
    nothing = lopt.Sum((bad, bad))
    estimate, _ = nothing.estimate(RATE, nothing.prepare(RATE, key), key)
    assert np.isnan(estimate.loss)
    assert float(estimate.grads["learning_rate"]) == 0
    assert int(estimate.dropped) == 2


def test_what_an_inner_mean_drops_is_not_forgotten(key):
    backprop, es = lopt.Mean(lopt.MetaTask(faulty(0.4)), 8), lopt.Mean(lopt.ES(faulty(0.4)), 8)
    smooth = lopt.Reparameterized(backprop)
    inside, _ = smooth.estimate(RATE, smooth.prepare(RATE, key), key)
    # Both arms are of the same episodes.
    arm, _ = backprop.estimate(RATE, backprop.prepare(RATE, key), jax.random.split(key)[1])
    assert int(inside.dropped) == 2 * int(arm.dropped) > 0
    mix = lopt.InverseVariance(es, es, 2)
    both, _ = mix.estimate(RATE, mix.prepare(RATE, key), key)
    each = [int(es.estimate(RATE, (), k)[0].dropped) for k in jax.random.split(key)]
    assert int(both.dropped) == 2 * sum(each) > 0
