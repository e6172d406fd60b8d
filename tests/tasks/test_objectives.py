"""Outer objectives: values, different optima, and which examples they see."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.tasks import (
    AdamSteps,
    InputNoise,
    MetricObjective,
    Mixture,
    NormalizedLoss,
    Quadratic,
    WithBestLoss,
    WithObjective,
    best_loss,
    own_objective,
)

KEY = jax.random.key(0)


class Bumpy(lopt.AbstractTask):
    """Training wants x = 1; validation 0.6; accuracy is best at 0.3; flat ground is at 2."""

    def init(self, key):
        return jnp.zeros(())

    def batch(self, key, split="train"):
        return jnp.where(split == "train", 1.0, 0.6), jnp.zeros(())

    def loss(self, params, batch):
        centre, noise = batch
        return (params + noise - centre) ** 2

    def metrics(self, params, state, batch):
        seen = params + batch[1]
        return {"loss": self.loss(params, batch), "accuracy": jnp.exp(-((seen - 0.3) ** 2))}


class Schedule(lopt.AbstractLearnedOptimizer):
    """Moves by theta in each step, wherever the loss is: x_t = t theta."""

    def init(self, key):
        return jnp.zeros(())

    def begin(self, theta, params, num_steps=None):
        return ()

    def update(self, theta, grads, state, params=None, *, value=None, **_):
        return jax.tree.map(lambda g: g * 0 + theta, grads), state


def shifted(key, batch):
    return batch[0], batch[1] + 0.1


OBJECTIVES = {
    "mean": lopt.train_loss,
    "last": lopt.FinalLoss(),
    "best": best_loss,
    "validation": lopt.validation_loss,
    "accuracy": MetricObjective("accuracy", -1.0),
    "another distribution": MetricObjective("accuracy", -1.0, change=shifted),
    "normalised": NormalizedLoss(best=0.3, initial=0.4),
    "Adam steps": AdamSteps([1.0, 0.1, 0.01], [0.0, 1.0, 20.0]),
}


def test_each_objective_has_its_own_optimum():
    rates = jnp.linspace(0.0, 0.8, 161)
    best = {}
    for name, objective in OBJECTIVES.items():
        inner = lopt.InnerTraining(WithBestLoss(Bumpy()), Schedule(), 4, objective)
        assert jax.tree.structure(objective) is not None
        losses = jax.jit(jax.vmap(lambda rate: inner.meta_loss(rate, KEY)))(rates)  # noqa: B023
        best[name] = float(rates[jnp.argmin(losses)])
    # x at steps 0, ..., 3 is t theta; those after the update are (t + 1) theta.
    np.testing.assert_allclose(best["last"], 1 / 4, atol=0.006)
    np.testing.assert_allclose(best["mean"], 6 / 14, atol=0.006)  # sum t / sum t^2
    np.testing.assert_allclose(best["validation"], 0.6 * 10 / 30, atol=0.006)
    # Sooner at the centre is better: of 1 / theta = 1, 2 and 3 steps, within the range, 2.
    np.testing.assert_allclose(best["best"], 0.8, atol=0.3)
    assert best["another distribution"] < best["accuracy"] < best["validation"]
    assert len({round(rate, 3) for rate in best.values()}) == len(best), best


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(1.0, 0.0), (3.0, 1.0), (2.0, 0.5), (9.0, 2.0), (-9.0, -2.0), (np.nan, 2), (-np.inf, 2)],
)
def test_normalised_loss(loss, expected):
    def measure(loss):
        step = lopt.Step(jnp.asarray(0), KEY, loss, (), (), loss, loss, loss)
        return NormalizedLoss(best=1.0, initial=3.0)(Bumpy(), step, jnp.asarray(4))

    value, slope = jax.value_and_grad(measure)(jnp.asarray(loss))
    assert value == expected
    assert jnp.isfinite(slope)
    assert slope == (0.5 if loss == 2 else slope)


@pytest.mark.parametrize(
    ("loss", "steps"),
    # Adam waits at 2: it has that loss since its second step.
    [(9.0, 1), (4.0, 1), (3.0, 1.5), (2.0, 2), (1.5, 6), (1.0, 8), (0.5, 8), (np.nan, 0)],
)
def test_adam_steps(loss, steps):
    def measure(loss):
        step = lopt.Step(jnp.asarray(0), KEY, loss, (), (), loss, loss, loss)
        objective = AdamSteps([4.0, 2.0, 2.0, 1.0], [1.0, 2.0, 4.0, 8.0])
        return objective(Bumpy(), step, jnp.asarray(4))

    value, slope = jax.value_and_grad(measure)(jnp.asarray(loss))
    assert value == -steps
    assert jnp.isfinite(slope)
    assert slope == {3.0: 0.5, 1.5: 4.0}.get(loss, slope)


def test_each_task_of_a_mixture_has_an_objective_of_its_own():
    """Losses that differ by a factor of 100 count alike, and updates stay as they were."""
    quadratics = [Quadratic(jnp.full(2, scale), jnp.zeros(2)) for scale in (1.0, 0.01)]
    mixture = Mixture(
        [
            WithObjective(one, NormalizedLoss(best=0.0, initial=2 * one.eigenvalues[0]))
            for one in quadratics
        ]
    )
    assert len(mixture.architectures()) == 1
    inner = lopt.InnerTraining(mixture, Tolerant(), 1, own_objective)
    plain = lopt.InnerTraining(Mixture(quadratics), Tolerant(), 1)
    keys = jax.random.split(KEY, 20)
    own, losses = (
        jax.vmap(lambda key, one=one: one.meta_loss(jnp.asarray(0.0), key))(keys)
        for one in (inner, plain)
    )
    scales = jax.vmap(lambda key: mixture.draw(key).objective.initial)(
        jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    )
    assert len(set(scales.tolist())) == 2
    np.testing.assert_allclose(own, jnp.clip(losses / scales, -2, 2), rtol=1e-6)


def make_task(poison=()):
    generator = np.random.default_rng(0)
    images = generator.uniform(size=(60, 2, 2, 1))
    data = lopt.tasks.image_data(images, np.arange(60) % 3, None, None, 3, 2)
    for split in poison:
        where = lambda d, split=split: d.split(split).arrays.images  # noqa: E731
        data = eqx.tree_at(where, data, jnp.full_like(where(data), jnp.nan))
    return lopt.tasks.mlp_classification(data, (3,), jnp.tanh, batch_size=4)


def test_input_noise():
    task = make_task()
    batch = task.batch(KEY)
    noisy = InputNoise(0.5)(KEY, batch)
    assert 0.2 < jnp.std(noisy.arrays.images - batch.arrays.images) < 0.9
    np.testing.assert_array_equal(noisy.arrays.labels, batch.arrays.labels)


REAL = {
    "mean": lopt.train_loss,
    "last": lopt.FinalLoss(split="valid_inner"),
    "best": best_loss,
    "validation": lopt.validation_loss,
    "robust": MetricObjective("loss", change=InputNoise(0.3)),
    "normalised": NormalizedLoss(lopt.validation_loss, best=0.1, initial=1.0),
    "Adam steps": AdamSteps([1.2, 1.0, 0.1], [1.0, 2.0, 5.0]),
}


@pytest.mark.parametrize("name", REAL)
def test_no_example_of_valid_outer_or_test_is_used(name):
    """With NaN in these splits, training and meta-training give the same numbers to the bit."""

    def trained(task):
        tasks = lopt.tasks.WithValidation(WithBestLoss(task), every=2)
        inner = lopt.InnerTraining(tasks, Tolerant(), 3, REAL[name])
        meta = lopt.Mean(lopt.MetaTask(inner), 2)
        state = lopt.start(meta, optax.sgd(0.1), inner.learned.init(KEY), KEY)
        return lopt.unroll(meta, optax.sgd(0.1), state, 2)

    (clean, losses), (poisoned, others) = map(
        trained, (make_task(), make_task(("valid_outer", "test")))
    )
    assert np.all(np.isfinite(losses))
    assert jnp.isfinite(clean.params)
    np.testing.assert_array_equal(losses, others)
    np.testing.assert_array_equal(clean.params, poisoned.params)
    if name == "mean":  # the test has teeth
        bad = trained(make_task(("train",)))[0]
        assert bad.params == Tolerant().init(KEY), "a NaN particle was not left out"


class Tolerant(lopt.AbstractLearnedOptimizer):
    """Gradient descent at a learned rate that takes whatever else it is told."""

    def init(self, key):
        return jnp.asarray(0.1)

    def begin(self, theta, params, num_steps=None):
        return ()

    def update(self, theta, grads, state, params=None, *, value=None, **_):
        return jax.tree.map(lambda g: -theta.astype(g.dtype) * g, grads), state


def test_unknown_metric():
    inner = lopt.InnerTraining(make_task(), Tolerant(), 2, MetricObjective("speed"))
    with pytest.raises(ValueError, match=r"metric='speed'.*loss, accuracy"):
        inner.meta_loss(jnp.asarray(0.1), KEY)


@pytest.mark.parametrize("make", [lopt.FinalLoss, MetricObjective])
@pytest.mark.parametrize("split", ["test", "valid_outer"])
def test_what_judges_is_not_trained_on(make, split):
    with pytest.raises(ValueError, match=f'{make.__name__}.split={split!r}. must be "train" or'):
        make(split=split)
