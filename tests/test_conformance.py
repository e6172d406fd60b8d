"""Exported means tested: what every task, every estimator and every learned optimizer must do.

The tests go through `__all__` of each wing. Whatever is exported and cannot be built without
arguments needs a line in one of the tables below; a test fails if it has none.
"""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.core import (
    AbstractGradientEstimator,
    AbstractLearnedOptimizer,
    AbstractTask,
    AbstractTaskFamily,
)

KEY = jax.random.key(0)


def exported(wing, kind):
    """Returns the names of concrete classes of a kind, and of functions that return one."""
    names = []
    for name in wing.__all__:
        thing = getattr(wing, name)
        made = thing if isinstance(thing, type) else inspect.signature(thing).return_annotation
        abstract = inspect.isabstract(thing)
        if isinstance(made, type) and issubclass(made, kind) and not abstract:
            names.append(name)
    return names


def count_traces():
    """Returns a function to record losses with, and the list that grows when it is traced."""
    traces = []

    def record(step):
        traces.append(step)
        return step.loss

    return record, traces


def assert_like(ours, theirs):
    """Checks structure, shapes and dtypes."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def assert_equal(ours, theirs):
    """Checks that two trees are the same to the last bit, keys included."""
    assert_like(ours, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def is_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------
# Learned optimizers
# ---------------------------------------------------------------------------------------------

LEARNED = {
    "Chain": lambda: lopt.learned.Chain((optax.clip(1.0), lopt.LearnableSGD())),
    "FallBack": lambda: lopt.learned.FallBack(lopt.dm(hidden=(2,)), limit=1e9),
    "Guided": lambda: lopt.learned.Guided(lopt.LearnableSGD(), lopt.LearnableAdam(), 0.5),
    "Nominal": lambda: lopt.learned.Nominal(lopt.LearnableSGD(), lopt.LearnableAdam()),
    "Odd": lambda: lopt.learned.Odd(lopt.small_mlp((3,))),
    "PerTensorType": lambda: lopt.learned.PerTensorType(lopt.dm(hidden=(3,))),
    "MuonMLP": lambda: lopt.learned.MuonMLP(2, optax.constant_schedule(0.1)),
    "muon_mlp": lambda: lopt.learned.muon_mlp(2, 0.1),
    "learnable": lambda: lopt.learnable(optax.sgd, learning_rate=0.1),
    "Learnable": lambda: lopt.learnable(optax.adam, learning_rate=0.1, b1=0.8),
    "LearnedSchedule": lambda: lopt.learned.LearnedSchedule(lopt.LearnableSGD(), 3),
    "Tensorwise": lambda: lopt.nn_adam(0.1, hidden=2),
    "celo": lambda: lopt.celo(3),
    "celo_adam": lambda: lopt.celo_adam(3),
    "sinv6": lambda: lopt.sinv6(3),
    "velo": lambda: lopt.velo(3, 2),
}


@pytest.mark.parametrize("name", exported(lopt.learned, AbstractLearnedOptimizer))
def test_every_learned_optimizer(name):
    learned = LEARNED.get(name, getattr(lopt.learned, name))()
    theta = learned.init(KEY)
    for leaf in jax.tree.leaves(theta):
        assert jnp.issubdtype(leaf.dtype, jnp.floating)
        assert not leaf.weak_type
    assert_equal(learned.init(KEY), theta)
    params = {
        "a": [jnp.ones((2, 3)), (jnp.full((), 0.5, float),)],
        "b": {"c": jnp.zeros(4), "d": None},
    }
    num_steps = 9 if learned.needs_num_steps else None
    state, traces = learned.optimizer(theta, num_steps).init(params), 0

    @jax.jit
    def update(*args, **keywords):
        nonlocal traces
        traces += 1
        return learned.update(*args, **keywords)

    for step in range(3):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
        updates, new = update(theta, grads, state, params, value=jnp.full((), 1.0, float))
        assert_like(updates, params)
        assert_like(new, state)
        assert is_finite((updates, new))
        assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(updates))
        params, state = optax.apply_updates(params, updates), new
    assert traces == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", exported(lopt.learned, AbstractLearnedOptimizer))
def test_every_learned_optimizer_leaves_out_what_has_no_gradient(name):
    learned = LEARNED.get(name, getattr(lopt.learned, name))()
    optimizer = learned.optimizer(learned.init(KEY), 9)
    params = {"a": [jnp.ones((2, 3)), jnp.ones(())], "b": jnp.ones((2, 3)), "c": {"d": jnp.ones(4)}}
    grads = {"a": [None, jnp.ones(())], "b": jnp.full((2, 3), 0.5), "c": None}
    moving = {"a": [None, params["a"][1]], "b": params["b"], "c": {"d": None}}
    state, value = optimizer.init(params), jnp.full((), 1.0, float)
    updates, new = quick_jit(optimizer.update)(grads, state, params, value=value)
    assert_like(new, state)
    slopes = {**moving, "b": grads["b"]}
    alone, _ = optimizer.update(slopes, optimizer.init(moving), moving, value=value)
    assert jax.tree.structure(updates) == jax.tree.structure(moving)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", exported(lopt.learned, AbstractLearnedOptimizer))
def test_every_learned_optimizer_has_a_meta_gradient(name):
    learned = LEARNED.get(name, getattr(lopt.learned, name))()
    meta = lopt.MetaTask(lopt.InnerTraining(lopt.tasks.QuadraticFamily(2), learned, 3))
    theta = meta.init(KEY)
    # The derivative of JAX's own `pow` does not go with strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        loss, grads = jax.jit(jax.value_and_grad(meta.loss))(theta, meta.batch(KEY))
    assert is_finite((loss, grads))
    assert_like(grads, theta)
    assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


# ---------------------------------------------------------------------------------------------
# Estimators
# ---------------------------------------------------------------------------------------------

INNER = lopt.InnerTraining(lopt.tasks.QuadraticFamily(2), lopt.LearnableSGD(0.1), horizon=4)
META = optax.sgd(0.01, momentum=0.9)  # Adam's b1 ** count does not go with strict promotion


class Weighted(eqx.Module):
    """The training loss, times an array."""

    weight: jax.Array

    def __call__(self, task, step, num_steps):
        return self.weight * step.loss


RAMP = lopt.estimators.RampedHorizon(2, 8, outer_steps=4)
ESTIMATORS = {
    "ES": lambda: lopt.ES(INNER),
    "ESSingle": lambda: lopt.ESSingle(INNER, truncation=2),
    "ES, one arm": lambda: lopt.ES(INNER, antithetic=False),
    "ES, sign": lambda: lopt.ES(INNER, sign=True),
    "Evosax": lambda: lopt.Evosax(INNER, 4),
    "Evosax, Open_ES": lambda: lopt.Evosax(INNER, 4, "Open_ES"),
    "ForwardMode": lambda: lopt.ForwardMode(INNER),
    "ForwardMode, random": lambda: lopt.ForwardMode(INNER, directions=3, at_once=2),
    "GPES": lambda: lopt.GPES(INNER, truncation=1, period=2),
    "GPES, ramped": lambda: lopt.GPES(INNER, truncation=2, period=4, schedule=RAMP),
    "InverseVariance": lambda: lopt.InverseVariance(
        lopt.ES(INNER), lopt.Reparameterized(lopt.MetaTask(INNER)), 4
    ),
    "LookAhead": lambda: lopt.LookAhead(INNER, steps=2, estimates=1, stride=3),
    "Mean": lambda: lopt.Mean(lopt.ES(INNER), 4, at_once=2),
    "NRES": lambda: lopt.NRES(INNER, truncation=2),
    "OnlineForwardMode": lambda: lopt.OnlineForwardMode(INNER, truncation=2),
    "OnlineForwardMode, random": lambda: lopt.OnlineForwardMode(INNER, 1, directions=1),
    "PES": lambda: lopt.PES(INNER, truncation=2),
    "PolicyGradient": lambda: lopt.PolicyGradient(INNER),
    "RandomSearch": lambda: lopt.RandomSearch(INNER, 8),
    "RankedES": lambda: lopt.RankedES(lopt.ES(INNER), 4),
    "Reparameterized": lambda: lopt.Reparameterized(lopt.MetaTask(INNER)),
    "Reparameterized, window": lambda: lopt.Reparameterized(
        lopt.TruncatedBackprop(INNER, truncation=2), antithetic=False
    ),
    "Clipped": lambda: lopt.estimators.Clipped(lopt.ES(INNER), 1.0),
    "Part": lambda: lopt.estimators.Part(lopt.PES(INNER, truncation=2), lambda theta: theta),
    "Resume": lambda: lopt.estimators.Resume(lopt.PES(INNER, truncation=2)),
    "Scheduled": lambda: lopt.estimators.Scheduled(
        lopt.PES(lopt.InnerTraining(INNER.tasks, INNER.learned, 4, Weighted(jnp.ones(()))), 2),
        lambda pes: pes.inner.objective.weight,
        lambda count: 1.0 / (1.0 + count.astype(float)),
    ),
    "Sum": lambda: lopt.Sum((lopt.ES(INNER), lopt.NRES(INNER, 2)), (0.5, 0.5)),
    "TruncatedBackprop": lambda: lopt.TruncatedBackprop(INNER, truncation=2, segments=2),
    "TruncatedES": lambda: lopt.TruncatedES(INNER, truncation=2, schedule=RAMP),
}


# A run in one piece is a program of its own. One of each kind of state is enough: none, a baseline,
# an algorithm's, an endless run, a clock with an episode, with a pair, with tangents, and several.
WHOLE = {
    "Evosax",
    "GPES, ramped",
    "LookAhead",
    "OnlineForwardMode, random",
    "PolicyGradient",
    "RandomSearch",
    "Sum",
    "TruncatedES",
}


# Without a state, or with that of another line.
LIKE_OTHERS = (
    "Scheduled",
    "Clipped",
    "ES, one arm",
    "ES, sign",
    "ESSingle",
    "Evosax, Open_ES",
    "ForwardMode, random",
    "NRES",
    "RandomSearch",
    "RankedES",
    "Reparameterized",
)


def test_every_estimator_is_in_the_table():
    assert set(exported(lopt.estimators, AbstractGradientEstimator)) <= set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator(name):
    estimator, theta = ESTIMATORS[name](), INNER.learned.init(KEY)
    state = estimator.prepare(theta, KEY)
    traces = 0

    @jax.jit
    def estimate(*args):
        nonlocal traces
        traces += 1
        return estimator.estimate(*args)

    first = estimate(theta, state, KEY)
    assert_like(first[0].grads, theta)
    assert first[0].loss.shape == ()
    assert_like(first[1], state)
    assert is_finite(first[0])
    assert_equal(estimate(theta, state, KEY), first)  # all that is random comes from the key
    other, _ = estimate(theta, state, jax.random.key(1))
    later, _ = estimate(theta, first[1], jax.random.key(1))
    # A window of truncated backpropagation needs its key only if the episode is over.
    assert any(
        bool(jnp.any(a.grads["learning_rate"] != first[0].grads["learning_rate"]))
        for a in (other, later)
    )
    assert traces == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ())
        for name in ESTIMATORS
    ],
)
def test_every_estimator_in_a_mean_and_in_halves(name):
    estimator, theta = lopt.Mean(ESTIMATORS[name](), 3), INNER.learned.init(KEY)
    record, traces = count_traces()

    @quick_jit
    def run(state):
        return lopt.unroll(estimator, META, state, 2, record=record)

    begin = quick_jit(lambda theta: lopt.start(estimator, META, theta, KEY))(theta)
    assert_like(begin.params, theta)
    half, first = run(begin)
    assert_like(half, begin)
    count = len(traces)
    halves, second = run(half)
    assert len(traces) == count, "the second call was traced again"
    assert is_finite((first, second))
    assert_equal(run(begin), (half, first))
    if name in WHOLE:
        whole, losses = quick_jit(lambda s: lopt.unroll(estimator, META, s, 4))(begin)
        assert_equal(halves, whole)
        np.testing.assert_array_equal(jnp.concatenate([first, second]), losses)


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


def digits(seed):
    """Returns noise in the shape of images, which is all that these tests need."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    return lopt.tasks.image_data(
        images, generator.integers(0, 3, 40), None, None, num_classes=3, size=4
    )


def classification(seed=0):
    return lopt.tasks.mlp_classification(digits(seed), (5,), jnp.tanh, batch_size=6)


def regression(network):
    x = np.random.default_rng(0).normal(size=(30, 2))
    data = lopt.tasks.array_data((x, x[:, :1]))

    def squared_error(predict, rows):
        inputs, outputs = rows.arrays
        return {"loss": rows.mean(jnp.sum((predict(inputs) - outputs) ** 2, axis=1))}

    return lopt.tasks.NetworkTask(data, network, squared_error, batch_size=6)


def text():
    return lopt.tasks.text_data(np.random.default_rng(0).integers(0, 5, 80), 4)


QUADRATIC = lopt.tasks.Quadratic(jnp.array([1.0, 0.3]), jnp.array([0.5, -1.0]), 0.1)

TASKS = {
    "Ackley": lopt.tasks.Ackley,
    "batch_norm_classification": lambda: lopt.tasks.batch_norm_classification(
        digits(0), (5,), jnp.tanh, batch_size=6
    ),
    "associative_recall": lambda: lopt.tasks.associative_recall(2, 3, 2, 4),
    "Beale": lopt.tasks.Beale,
    "char_transformer": lambda: lopt.tasks.char_transformer(text(), 4, 1, 2, 6),
    "copying": lambda: lopt.tasks.copying(2, 2, 1, 4),
    "language_model": lambda: lopt.tasks.language_model(
        text(), lopt.tasks.Build(lopt.tasks.RecurrentNetwork, 5, 5, "gru", 3, 2), 6
    ),
    "rnn_language_model": lambda: lopt.tasks.rnn_language_model(text(), "lstm", 3, 2, 6),
    "Mixture": lambda: lopt.tasks.Mixture((classification(0), classification(1))),
    "Mixture of families": lambda: lopt.tasks.Mixture(
        [lopt.tasks.InputScale(classification(i), 0.5, 2.0) for i in range(2)]
    ),
    "NetworkTask": lambda: regression(
        lopt.tasks.InitApply(
            lambda key: {"w": jax.random.normal(key, (2, 1))}, lambda w, x: jnp.tanh(x @ w["w"])
        )
    ),
    "classification": lambda: lopt.tasks.classification(
        digits(0), lambda key: eqx.nn.MLP(16, 3, 4, 2, jnp.tanh, key=key), batch_size=6
    ),
    "Branin": lopt.tasks.Branin,
    "DelayedGradients": lambda: lopt.tasks.DelayedGradients(lopt.tasks.WithBestLoss(QUADRATIC), 1),
    "DataSubset": lambda: lopt.tasks.DataSubset(classification(), 10),
    # So little noise that gradients are still those of the loss.
    "GradientNoise": lambda: lopt.tasks.GradientNoise(QUADRATIC, 1e-12, 1e-12),
    "InitialScale": lambda: lopt.tasks.InitialScale(QUADRATIC, 0.5, 2.0),
    "InputScale": lambda: lopt.tasks.InputScale(classification(), 0.5, 2.0),
    "LogSumExp": lopt.tasks.LogSumExp,
    "LossScale": lambda: lopt.tasks.LossScale(classification(), 0.5, 2.0),
    "LowPrecision": lambda: lopt.tasks.LowPrecision(classification(), ("float64",)),
    "Matyas": lopt.tasks.Matyas,
    "Michalewicz": lopt.tasks.Michalewicz,
    "MLPFamily": lambda: lopt.tasks.MLPFamily(
        digits(0), (5,), (jnp.tanh, jnp.sin), smallest=2, batch_size=6
    ),
    "LeastSquares": lambda: lopt.tasks.LeastSquares(jnp.eye(3), jnp.ones(3)),
    "LeastSquaresFamily": lambda: lopt.tasks.LeastSquaresFamily(3),
    "Quadratic": lambda: QUADRATIC,
    "QuadraticFamily": lambda: lopt.tasks.QuadraticFamily(3, noise_scale=0.1),
    # In one dimension there is one direction, and the gradient is exact.
    "RandomDirections": lambda: lopt.tasks.RandomDirections(lopt.tasks.QuadraticFamily(1)),
    "RandomLabels": lambda: lopt.tasks.RandomLabels(classification(), 0.5),
    "ReducedBatch": lambda: lopt.tasks.ReducedBatch(classification()),
    "Reparameterization, parameter": lambda: lopt.tasks.Reparameterization(
        classification(), 0.5, 2.0, per="parameter"
    ),
    "Reparameterization": lambda: lopt.tasks.Reparameterization(classification(), 0.5, 2.0),
    "resnet_classification, augmented": lambda: lopt.tasks.resnet_classification(
        digits(0), (1,), (2,), activation=jnp.tanh, batch_size=6, augmentation=True
    ),
    "Rosenbrock": lopt.tasks.Rosenbrock,
    "StyblinskiTang": lopt.tasks.StyblinskiTang,
    "WithBestLoss": lambda: lopt.tasks.WithBestLoss(classification()),
    "WithObjective": lambda: lopt.tasks.WithObjective(classification(), lopt.train_loss),
    "WithValidation": lambda: lopt.tasks.WithValidation(classification(), 2),
    "conv_classification": lambda: lopt.tasks.conv_classification(
        digits(0), (2, 3), 3, (4,), jnp.tanh, batch_size=6
    ),
    "mlp_classification": classification,
    "vit_classification": lambda: lopt.tasks.vit_classification(
        digits(0), width=4, depth=1, heads=2, batch_size=6
    ),
    "mlp_autoencoder": lambda: lopt.tasks.mlp_autoencoder(digits(0), (5,), jnp.tanh, batch_size=6),
    "mlp_classification, dropout and layer norm": lambda: lopt.tasks.mlp_classification(
        digits(0), (5,), jnp.tanh, batch_size=6, dropout=0.5, layer_norm=True
    ),
    "normalising_flow": lambda: lopt.tasks.normalising_flow(
        digits(0), widths=(5,), layers=2, activation=jnp.tanh, batch_size=6
    ),
    "variational_autoencoder": lambda: lopt.tasks.variational_autoencoder(
        digits(0), (5, 2), (5,), jnp.tanh, batch_size=6
    ),
    "warm_start": lambda: lopt.tasks.warm_start(classification(), classification().init(KEY)),
    "resnet_classification": lambda: lopt.tasks.resnet_classification(
        digits(0), (1,), (2,), True, jnp.tanh, batch_size=6
    ),
}


def test_every_task_is_in_the_table():
    assert set(exported(lopt.tasks, AbstractTaskFamily)) <= set(TASKS)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("augmented" in n)) for n in TASKS]
)
def test_every_task(name):
    family = TASKS[name]()
    task = family.draw(KEY)
    assert isinstance(task, AbstractTask)
    assert_equal(eqx.filter(family.draw(KEY), eqx.is_array), eqx.filter(task, eqx.is_array))
    params = task.init(KEY)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params))
    state = task.prepare(params, KEY)
    for split in lopt.core.types.SPLITS:
        batch = task.batch(KEY, split)
        loss, new = task.loss_and_state(params, state, batch)
        assert loss.shape == ()
        assert_like(new, state)
        assert is_finite((loss, new))
        assert_equal(task.batch(KEY, split), batch)

    estimate, _ = task.estimate(params, state, KEY)
    assert_like(estimate.grads, params)
    if name == "DelayedGradients":
        return
    # The gradient against central differences along a random direction, in 64 bits.
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    assert flat.dtype == jnp.float64
    direction = jax.random.normal(jax.random.key(1), flat.shape)
    batch = task.batch(KEY)
    along = [
        task.loss_and_state(unravel(flat + step * direction), state, batch)[0]
        for step in (1e-5, -1e-5)
    ]
    gradient = jax.flatten_util.ravel_pytree(estimate.grads)[0]
    np.testing.assert_allclose(
        jnp.dot(gradient, direction), (along[0] - along[1]) / 2e-5, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("augmented" in n)) for n in TASKS]
)
def test_every_family_is_mapped_over_and_trained(name):
    family = TASKS[name]()
    optimizer = optax.sgd(1e-5)
    record, traces = count_traces()

    def train(key):
        task = family.draw(key)
        state = lopt.start(task, optimizer, task.init(key), key)
        return lopt.unroll(task, optimizer, state, 2, record=record)

    keys = jax.random.split(KEY, 3)
    mapped = eqx.filter_jit(eqx.filter_vmap(train))
    state, losses = mapped(keys)
    assert losses.shape == (3, 2)
    assert is_finite((losses, state.params))
    count = len(traces)
    _, others = mapped(jax.random.split(jax.random.key(1), 3))
    assert len(traces) == count, "the second call was traced again"
    assert is_finite(others)
    _, alone = train(keys[1])
    np.testing.assert_allclose(losses[1], alone, rtol=1e-8)

    # One after another: a second draw of the same family is not traced again.
    count = len(traces)
    train(keys[2])
    assert len(traces) == count, "another draw was traced again"
