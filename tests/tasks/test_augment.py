"""Families of families: what each changes, and that draws can be mapped."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.core.types import SPLITS
from lopt.tasks import (
    DataSubset,
    InitialScale,
    InputScale,
    Mixture,
    Quadratic,
    QuadraticFamily,
    Reparameterization,
    batch_norm_classification,
    image_data,
    mlp_classification,
    warm_start,
)

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 200)


def make_data(num=100, value=None, size=4):
    generator = np.random.default_rng(num)
    images = generator.uniform(0.1, 1, (num, size, size, 1))
    images = images if value is None else np.full_like(images, value)
    return image_data(images, np.arange(num) % 3, None, None, 3, size)


def make_task(num=100, value=None, **options):
    return mlp_classification(make_data(num, value), widths=(5,), batch_size=8, **options)


def loss_of(task, params, batch):
    return task.loss_and_state(params, (), batch)[0]


def test_data_subset_is_a_window_that_moves():
    # Not mapped with vmap, which would copy the images for every draw.
    task = make_task()
    family = DataSubset(task, 10)
    windows = jax.vmap(lambda key: (lambda t: (t.first, t.count))(family.draw(key).data.train))
    first, count = windows(KEYS)
    assert np.all(count == 10)
    assert first.min() >= 0
    assert first.max() <= 60
    assert len(np.unique(first)) > 40
    drawn = family.draw(KEYS[0])
    images = np.concatenate([np.asarray(drawn.batch(key).arrays.images) for key in KEYS[:40]])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 10
    assert drawn.data.test.count == task.data.test.count


def test_data_subsets_have_sizes_of_their_own():
    family = DataSubset(make_task(), 60, smallest=10)
    window = jax.vmap(lambda key: (lambda t: (t.first, t.count))(family.draw(key).data.train))
    first, count = window(jax.random.split(KEY, 2000))
    assert (count.min(), count.max()) == (10, 60)
    assert np.all(first + count <= 70)
    logs = np.log(np.asarray(count) / 10) / np.log(6)
    np.testing.assert_allclose(logs.mean(), 0.5, atol=4 * 12**-0.5 * 2000**-0.5)
    with pytest.raises(ValueError, match=r"smallest=61\) must be at most 60"):
        DataSubset(make_task(), 60, smallest=61)


def test_data_subset_of_a_subset_lies_within_it():
    outer = DataSubset(make_task(), 20)
    for key in KEYS[:5]:
        outer_key, _ = jax.random.split(key)
        window = outer.draw(outer_key).data.train
        inner = DataSubset(outer, 5).draw(key).data.train
        assert window.first <= inner.first
        assert inner.first + 5 <= window.first + 20


def test_data_subset_reaches_through_other_families_and_stateful_tasks():
    family = DataSubset(InputScale(make_task(), 2.0, 2.0), 10)
    assert family.draw(KEY).task.data.train.count == 10
    stateful = batch_norm_classification(make_data())
    assert DataSubset(stateful, 10).draw(KEY).data.train.count == 10


def test_input_scale():
    task = make_task()
    scaled = InputScale(task, 3.0, 3.0).draw(KEY)
    batch, plain = scaled.batch(KEY, "test"), task.batch(KEY, "test")
    np.testing.assert_allclose(batch.arrays.images, 3 * plain.arrays.images, rtol=1e-6)
    np.testing.assert_array_equal(batch.arrays.labels, plain.arrays.labels)
    params = task.init(KEY)
    np.testing.assert_allclose(loss_of(scaled, params, batch), loss_of(task, params, batch))


def test_factors_are_log_uniform():
    family = InitialScale(QuadraticFamily(2), 0.01, 100.0)
    factors = jax.vmap(lambda key: family.draw(key).map_initial.args[0])
    logs = np.log10(factors(jax.random.split(KEY, 4000))) / 4 + 0.5
    assert logs.min() >= 0
    assert logs.max() <= 1
    assert abs(logs.mean() - 0.5) < 4 / np.sqrt(12 * logs.size)
    assert abs(np.mean(logs < 0.25) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / logs.size)


def test_initial_scale():
    task = make_task()
    scaled = InitialScale(task, 0.5, 0.5).draw(KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 0.5 * b), scaled.init(KEY), task.init(KEY)
    )
    batch = task.batch(KEY)
    params = task.init(KEY)
    np.testing.assert_allclose(
        loss_of(scaled, params, scaled.batch(KEY)), loss_of(task, params, batch)
    )


@pytest.mark.parametrize("per", ["tensor", "task"])
def test_reparameterization_changes_units_only(per):
    task = make_task()
    family = Reparameterization(task, 0.01, 100.0, per=per)
    scaled, params, batch = family.draw(KEY), task.init(KEY), task.batch(KEY)
    assert scaled.map_params.args[0].shape == ((4,) if per == "tensor" else (1,))
    own = scaled.init(KEY)
    np.testing.assert_allclose(loss_of(scaled, own, batch), loss_of(task, params, batch))
    jax.tree.map(np.testing.assert_allclose, scaled.map_params(own), params)
    # Chain rule: gradients are s times as large.
    grads = jax.tree.leaves(jax.grad(lambda p: loss_of(scaled, p, batch))(own))
    factors = jnp.broadcast_to(scaled.map_params.args[0], (4,))
    for grad, plain, factor in zip(
        grads,
        jax.tree.leaves(jax.grad(lambda p: loss_of(task, p, batch))(params)),
        factors,
        strict=True,
    ):
        np.testing.assert_allclose(grad, factor * plain, rtol=1e-6)


def test_reparameterized_sgd_is_sgd_at_another_rate():
    quadratic = Quadratic(jnp.array([1.0, 0.5]), jnp.ones(2))
    scaled = Reparameterization(quadratic, 3.0, 3.0).draw(KEY)
    optimizer, own = optax.sgd(0.01), scaled.init(KEY)
    state, _ = lopt.unroll(scaled, optimizer, lopt.start(scaled, optimizer, own, KEY), 5)
    expected = quadratic.sgd_params(quadratic.init(KEY), 0.01 * 9, 5)
    np.testing.assert_allclose(scaled.map_params(state.params), expected)


def test_mixture_shows_one_task_at_a_time():
    values = (0.25, 0.5, 1.0)
    tasks = tuple(make_task(num, value) for num, value in zip((40, 90, 60), values, strict=True))
    family = Mixture(tasks)

    def seen(key):
        task = family.draw(key)
        batches = [task.batch(key, name).arrays.images for name in SPLITS]
        return jnp.stack([f(batch) for batch in batches for f in (jnp.min, jnp.max)])

    found = np.asarray(jax.vmap(seen)(KEYS))
    assert np.all(found == found[:, :1]), "a batch mixed images of two tasks"
    shares = np.array([np.mean(found[:, 0] == np.float32(value)) for value in values])
    assert abs(shares.sum() - 1) < 1e-6
    assert np.all(np.abs(shares - 1 / 3) < 4 * np.sqrt(2 / 9 / len(KEYS)))
    # The whole split of a drawn task is the whole split of one of the tasks.
    drawn = family.draw(KEY)
    batch = drawn.everything("test")
    assert batch.mean(batch.arrays.images)[0, 0, 0] in np.float32(values)
    assert drawn.data.train.count in [task.data.train.count for task in tasks]


def test_nested_families_train_under_vmap():
    family = InputScale(Mixture((make_task(50), make_task(80))), 0.5, 2.0)
    family = InitialScale(Reparameterization(family, 0.5, 2.0), 0.5, 2.0)
    family = DataSubset(family, 12)
    optimizer = optax.sgd(0.01)

    def train(key):
        task = family.draw(key)
        state = lopt.start(task, optimizer, task.init(key), key)
        return lopt.unroll(task, optimizer, state, 5)[1]

    losses = eqx.filter_jit(jax.vmap(train))(KEYS[:4])
    assert losses.shape == (4, 5)
    assert np.all(np.isfinite(losses))
    assert len(np.unique(losses[:, 0])) == 4


@pytest.mark.parametrize(
    "family",
    [
        DataSubset(make_task(), 10),
        InputScale(make_task(), 0.1, 10.0),
        InitialScale(make_task(), 0.1, 10.0),
        Reparameterization(make_task(), 0.1, 10.0),
        Mixture((make_task(50), make_task(80))),
    ],
    ids=lambda family: type(family).__name__,
)
def test_draw_can_be_mapped_and_tasks_handed_on(family):
    tasks = jax.vmap(family.draw)(KEYS[:3])
    losses = jax.vmap(lambda task, key: loss_of(task, task.init(key), task.batch(key)))(
        tasks, KEYS[:3]
    )
    for key, loss in zip(KEYS[:3], losses, strict=True):
        task = family.draw(key)
        np.testing.assert_allclose(loss, loss_of(task, task.init(key), task.batch(key)), rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DataSubset(make_task(), 71), "DataSubset.*size=71.*70 examples.*try size=70"),
        (lambda: DataSubset(make_task(), 0), "DataSubset.*size=0.*try"),
        (lambda: DataSubset(QuadraticFamily(3), 5), "DataSubset.*QuadraticFamily.*try"),
        (lambda: DataSubset(Mixture((make_task(), make_task(50))), 36), "the 35 examples"),
        (lambda: InputScale(make_task(), 0.0, 2.0), "InputScale.*low=0.0.*try"),
        (lambda: InitialScale(make_task(), 3.0, 2.0), "InitialScale.*low=3.0.*try"),
        (lambda: Reparameterization(make_task(), -1.0, 2.0), "Reparameterization.*low=-1.0"),
        (lambda: Mixture(()), "at least one"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_unknown_unit():
    # The type checker of the tests objects to the literal as well.
    with pytest.raises((ValueError, TypeError)):
        Reparameterization(make_task(), 1.0, 2.0, per="layer")


@pytest.mark.parametrize(
    "augmented",
    [
        lambda task: InputScale(task, 3.0, 3.0),
        lambda task: InitialScale(task, 0.5, 0.5),
        lambda task: Reparameterization(task, 0.1, 10.0),
        lambda task: warm_start(task, task.init(KEY)),
        lambda task: DataSubset(task, 10),
        lambda task: Mixture([task, batch_norm_classification(make_data(50), (5,), batch_size=8)]),
    ],
)
def test_running_statistics_go_through_every_augmentation(augmented):
    """Batch norm trains, its statistics move and are used by metrics."""
    task = augmented(batch_norm_classification(make_data(), (5,), batch_size=8)).draw(KEY)
    optimizer = optax.sgd(0.01)
    begin = lopt.start(task, optimizer, task.init(KEY), KEY)
    state, losses = lopt.unroll(task, optimizer, begin, 5)
    assert np.all(np.isfinite(losses))
    for old, new in zip(begin.estimator_state.mean, state.estimator_state.mean, strict=True):
        assert np.all(old != new)
    whole = task.everything("test")
    found, before = (
        task.metrics(state.params, one.estimator_state, whole)["loss"] for one in (state, begin)
    )
    assert found != before
    np.testing.assert_allclose(
        found, lopt.judge(task, state.params, state.estimator_state, KEY)["loss"], rtol=1e-12
    )


def test_a_family_of_two_architectures_has_two_parts():
    mixture = Mixture([make_task(), QuadraticFamily(3)])
    for family in (InitialScale(mixture, 0.5, 2.0), Reparameterization(mixture, 0.5, 2.0)):
        parts = family.architectures()
        assert [type(part) for part in parts] == [type(family)] * 2
        sizes = [len(jax.tree.leaves(part.draw(KEY).init(KEY))) for part in parts]
        assert sizes == [4, 1]


def test_reparameterization_of_every_entry():
    task = make_task()
    scaled = Reparameterization(task, 0.1, 10.0, per="parameter").draw(KEY)
    own, params, batch = scaled.init(KEY), task.init(KEY), task.batch(KEY)
    jax.tree.map(np.testing.assert_allclose, scaled.map_params(own), params)
    grads, plain = scaled.estimate(own, (), KEY)[0].grads, task.estimate(params, (), KEY)[0].grads
    factors = zip(*map(jax.tree.leaves, (grads, plain)), scaled.map_params.args[0], strict=True)
    for grad, bare, factor in factors:
        np.testing.assert_allclose(grad, bare * factor, rtol=1e-6)
    np.testing.assert_allclose(loss_of(scaled, own, batch), loss_of(task, params, batch))


def test_reduced_batch_is_a_smaller_batch():
    task = make_task()
    family = lopt.tasks.ReducedBatch(task)
    weights = jax.vmap(lambda key: family.draw(key).batch(KEY).weights)(KEYS)
    counts = np.asarray(weights.sum(axis=1))
    assert set(counts) == set(range(1, 9))
    for key in KEYS[:3]:
        batch = family.draw(key).batch(KEY)
        few = jax.tree.map(lambda leaf: leaf[: int(batch.weights.sum())], batch.arrays)  # noqa: B023
        params, plain = task.init(KEY), lopt.tasks.Rows(few)
        np.testing.assert_allclose(loss_of(task, params, batch), loss_of(task, params, plain))
    whole = family.draw(KEY).everything("test")
    np.testing.assert_array_equal(whole.weights, task.everything("test").weights)


def test_low_precision_rounds_params_and_gradients():
    quadratic = Quadratic(jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0]))
    low = lopt.tasks.LowPrecision(quadratic, ("bfloat16",)).draw(KEY)
    x = jnp.array([1.001, 2.7])
    near = x.astype(jnp.bfloat16).astype(x.dtype)
    found = low.estimate(x, (), KEY)[0]
    np.testing.assert_allclose(found.loss, quadratic.loss(near, ()))
    np.testing.assert_array_equal(found.grads, near)
    drawn = jax.vmap(lambda key: lopt.tasks.LowPrecision(quadratic).draw(key).loss(x, ()))(KEYS)
    assert len(np.unique(drawn)) == 3


def test_delayed_gradients_nest_with_other_changes():
    quadratic = Quadratic(jnp.array([1.0, 0.5]), jnp.ones(2))
    delayed = lopt.tasks.DelayedGradients(quadratic, 2)
    tasks = [delayed.draw(key) for key in KEYS[:20]]
    late = {int(task.delay): task for task in tasks}
    assert set(late) == {0, 1, 2}
    nested = Reparameterization(lopt.tasks.LossScale(late[2], 3.0, 3.0), 2.0, 2.0).draw(KEY)
    optimizer = optax.sgd(0.1)
    state = lopt.start(nested, optimizer, nested.init(KEY), KEY)
    _, steps = lopt.unroll(nested, optimizer, state, 5, record=lambda step: step)
    np.testing.assert_array_equal(steps.grads[:2], 0)
    gradient = jax.vmap(jax.grad(lambda x: nested.loss(x, ())))(steps.params[:3])
    np.testing.assert_allclose(steps.grads[2:], gradient, rtol=1e-6)


def test_gradients_along_random_directions_are_unbiased():
    quadratic = lopt.tasks.WithBestLoss(Quadratic(jnp.array([1.0, 0.5, 2.0]), jnp.ones(3)))
    task = lopt.tasks.RandomDirections(quadratic).draw(KEY)
    x, keys = jnp.array([0.3, -1.0, 0.7]), jax.random.split(KEY, 20_000)
    state = task.prepare(x, KEY)
    found = jax.vmap(lambda key: task.estimate(x, state, key)[0])(keys)
    assert set(np.asarray(found.loss)) == {float(quadratic.loss(x, ()))}
    g = jax.grad(lambda x: quadratic.loss(x, ()))(x)
    error = found.grads.std(axis=0) / len(keys) ** 0.5
    assert np.all(np.abs(found.grads.mean(axis=0) - g) < 4 * error)
    # A projection P times d, so that g . P g is |P g|^2, of which the mean is |g|^2 / d.
    squares = jnp.sum(found.grads**2, axis=1) / 3
    np.testing.assert_allclose(found.grads @ g, squares)
    np.testing.assert_allclose(squares.mean(), jnp.sum(g**2), rtol=0.05)


def test_random_labels_are_a_permutation():
    task = make_task()
    drawn = lopt.tasks.RandomLabels(task).draw(KEYS[1])
    for split in SPLITS:
        old, new = (t.data.split(split).arrays.labels for t in (task, drawn))
        pairs = set(zip(map(int, old), map(int, new), strict=True))
        assert len(pairs) == 3
        assert len({after for _, after in pairs}) == 3
    noisy = lopt.tasks.RandomLabels(task, 1.0).draw(KEYS[1])
    changed = noisy.data.train.arrays.labels != drawn.data.train.arrays.labels
    assert 0.4 < np.mean(changed) < 0.9
    np.testing.assert_array_equal(noisy.data.test.arrays.labels, drawn.data.test.arrays.labels)


def test_perceptrons_of_many_kinds_are_one_program():
    family, traces = lopt.tasks.MLPFamily(make_data(), (8, 6), (jnp.tanh, jnp.sin)), []

    @jax.jit
    @jax.vmap
    def first_losses(key):
        traces.append(key)
        task = family.draw(key)
        return task.estimate(task.init(key), (), key)[0].loss

    losses = jnp.concatenate([first_losses(KEYS[:4]), first_losses(KEYS[4:8])])
    assert len(traces) == 1
    assert len(set(losses.tolist())) == 8
    assert bool(jnp.isfinite(losses).all())


def test_a_masked_width_is_the_narrow_network():
    from lopt.tasks.perceptrons import MaskedPerceptron

    family = lopt.tasks.MLPFamily(make_data(), (8, 6), (jnp.tanh, jnp.sin), smallest=2)
    networks = jax.vmap(lambda key: family.draw(key).network)(KEYS)
    assert set(np.unique(networks.which)) == {0, 1}
    assert networks.widths.min(axis=0).tolist() == [2, 2]
    assert networks.widths.max(axis=0).tolist() == [8, 6]
    task = family.draw(KEYS[0])
    assert isinstance(task.network, MaskedPerceptron)
    params, (first, second) = task.init(KEY), map(int, task.network.widths)
    batch = task.batch(KEY)
    activation = (jnp.tanh, jnp.sin)[int(task.network.which)]
    images = batch.arrays.images.reshape(len(batch.arrays.labels), -1)
    hidden = images.astype(params[0][0].dtype)
    cuts = (
        (slice(first), slice(None)),
        (slice(second), slice(first)),
        (slice(None), slice(second)),
    )
    for i, ((rows, columns), (weight, bias)) in enumerate(zip(cuts, params, strict=True)):
        hidden = hidden @ weight[rows, columns].T + bias[rows][None]
        hidden = activation(hidden) if i < 2 else hidden
    found = task.outputs(params, (), images)
    np.testing.assert_allclose(found, hidden, rtol=1e-6)
    grads = task.estimate(params, (), KEY)[0].grads
    assert not np.any(grads[1][0][:, first:])
    assert not np.any(grads[1][0][second:])
    assert not np.any(grads[0][1][first:])
