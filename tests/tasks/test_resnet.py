"""Residual networks: sizes, convolutions and moments against plain numpy, running statistics."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.tasks import image_data, resnet_classification
from lopt.tasks.convolutional import convolve
from lopt.tasks.resnet import crop_and_flip

KEY = jax.random.key(0)


def make_data(size=8, channels=1, num=200, classes=3):
    """Returns noise whose brightness tells the class."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, num)
    images = generator.uniform(0, 0.5, (num, size, size, channels))
    images = images + labels[:, None, None, None] / (2 * classes)
    return image_data(images, labels, None, None, classes, size)


def make_task(**options):
    sizes = {"channels": (4, 6), "depth": (1, 1), "batch_size": 8, **options}
    return resnet_classification(make_data(), **sizes)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def compiled(method):
    """Compiles a method of a task, which cannot be hashed itself."""
    return quick_jit(lambda *arguments: method(*arguments))


def shapes_of(task):
    params = eqx.filter_eval_shape(task.init, KEY)
    return params, eqx.filter_eval_shape(task.prepare, params, KEY)


# ---------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "weights"),
    [(18, 11_173_962), (34, 21_282_122), (50, 23_520_842), (101, 42_512_970), (152, 58_156_618)],
)
def test_published_networks_have_their_number_of_weights(depth, weights):
    params, state = shapes_of(resnet_classification(make_data(32, 3, 20, 10), depth))
    assert count(params) == weights
    # The depth counts convolutions and the linear layer, but not the shortcuts.
    shortcuts = sum(len(block.shortcut) for block in params.blocks)
    assert len(params.layers) - shortcuts + 1 == depth
    assert [mean.shape for mean in state.mean] == [layer.gain.shape for layer in params.layers]


def test_a_step_of_resnet_50_keeps_all_shapes():
    task = resnet_classification(make_data(32, 3, 20, 10), 50, batch_size=2)
    params, state = shapes_of(task)
    estimate, after = eqx.filter_eval_shape(task.estimate, params, state, KEY)
    for ours, theirs in ((estimate.grads, params), (after, state)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert estimate.loss.shape == ()


@pytest.mark.slow
def test_resnet_50_trains():
    task = resnet_classification(make_data(32, 3, 20, 10), 50, batch_size=2)
    optimizer = optax.sgd(0.01)
    params = quick_jit(lambda key: jax.tree.map(jnp.float32, task.init(key)))(KEY)
    state, losses = lopt.unroll(task, optimizer, lopt.start(task, optimizer, params, KEY), 2)
    assert losses.shape == (2,)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((state.params, losses)))
    assert all(bool((v > 0).all()) for v in state.estimator_state.variance)


# ---------------------------------------------------------------------------------------------
# Mathematics
# ---------------------------------------------------------------------------------------------


def reference_convolution(images, weight, stride):
    """Returns XLA's own, with the padding of He et al.'s code: alike on both sides."""
    ends = ((weight.shape[-1] - 1) // 2,) * 2
    layout = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(
        images, weight, (stride, stride), (ends, ends), dimension_numbers=layout
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("sides", [(6, 5), (1, 4)])
def test_convolution_equals_xlas(stride, kernel, sides):
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.normal(size=(2, *sides, 3)))
    weight = jnp.asarray(generator.normal(size=(4, 3, kernel, kernel)))
    expected = reference_convolution(images, weight, stride)
    np.testing.assert_allclose(convolve(images, weight, stride), expected, atol=1e-12)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_loss_and_statistics_equal_a_plain_loop(bottleneck):
    """The network spelled out block by block, in numpy but for the convolutions."""
    task = make_task(bottleneck=bottleneck, activation=jnp.tanh)
    params, batch = compiled(task.init)(KEY), task.batch(KEY)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    state = jax.tree.map(lambda leaf: leaf + 0.5, task.prepare(params, KEY))
    loss, after = compiled(task.loss_and_state)(params, state, batch)
    params = jax.tree.map(np.asarray, params)
    means, variances = [], []

    def normalised(layer, stride, images):
        images = np.asarray(reference_convolution(images, layer.weight, stride))
        mean, variance = images.mean((0, 1, 2)), images.var((0, 1, 2))
        means.append(mean)
        variances.append(variance)
        return (images - mean) / np.sqrt(variance + 1e-5) * layer.gain + layer.shift

    images = np.tanh(normalised(params.stem, 1, np.asarray(batch.arrays.images, float)))
    for block, stride in zip(params.blocks, (1, 2), strict=True):
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        inside = images
        for i, layer in enumerate(block.body):
            inside = normalised(layer, strides[i], np.tanh(inside) if i else inside)
        assert bool(block.shortcut) == (bottleneck or stride > 1)
        for layer in block.shortcut:
            images = normalised(layer, stride, images)
        images = np.tanh(inside + images)
    assert images.shape == (8, 4, 4, 24 if bottleneck else 6)
    last = params.last.layers[0]
    rows = images.mean((1, 2)) @ last.weight.T + last.bias
    expected = np.mean(np.log(np.exp(rows).sum(1)) - rows[np.arange(8), batch.arrays.labels])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for i, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        np.testing.assert_allclose(after.mean[i], 0.9 * 0.5 + 0.1 * mean, rtol=1e-6)
        np.testing.assert_allclose(after.variance[i], 0.9 * 1.5 + 0.1 * variance, rtol=1e-6)


def test_inference_with_the_moments_of_a_batch_is_training_on_it():
    task = make_task(momentum=0.0)
    params, batch = (
        compiled(task.init)(KEY),
        task.everything("valid_inner"),
    )  # 20 images: slices of 8
    loss, state = compiled(task.loss_and_state)(params, task.prepare(params, KEY), batch)
    logits = compiled(task.outputs)(params, state, batch.arrays.images)
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, batch.arrays.labels)
    np.testing.assert_allclose(np.mean(entropies), loss, rtol=1e-6)
    hits = np.mean(np.asarray(logits).argmax(axis=1) == np.asarray(batch.arrays.labels))
    metrics = compiled(task.metrics)(params, state, batch)
    np.testing.assert_allclose(metrics["accuracy"], hits)


def test_initial_weights():
    task = make_task(channels=(32, 64), zero_gain=True)
    params = compiled(task.init)(KEY)
    for layer in params.layers:
        fan_in = np.prod(layer.weight.shape[1:])
        tolerance = 5 / np.sqrt(2 * layer.weight.size)
        np.testing.assert_allclose(np.std(layer.weight), np.sqrt(2 / fan_in), rtol=tolerance)
    # With the last gains at zero, blocks are their shortcuts: bodies have no effect.
    assert all(bool((block.body[-1].gain == 0).all()) for block in params.blocks)
    assert all(
        bool((layer.gain == 1).all()) for block in params.blocks for layer in block.body[:-1]
    )
    changed = eqx.tree_at(lambda p: p.blocks[0].body[0].weight, params, replace_fn=lambda w: 2 - w)
    state, batch = task.prepare(params, KEY), task.batch(KEY)
    loss = quick_jit(lambda params: task.loss_and_state(params, state, batch)[0])
    assert loss(changed) == loss(params)


# ---------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------


def test_crops_and_mirrors_are_all_there_and_nothing_else():
    image = jnp.arange(1.0, 65.0).reshape(8, 8, 1)  # on 8x8, moves of one pixel
    framed = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
    possible = {
        framed[a : a + 8, b : b + 8][:, ::side].tobytes(): 0
        for a in range(3)
        for b in range(3)
        for side in (1, -1)
    }
    assert len(possible) == 18
    crops = quick_jit(jax.vmap(crop_and_flip, (0, None)))(jax.random.split(KEY, 1800), image)
    for crop in np.asarray(crops):
        possible[crop.tobytes()] += 1  # a KeyError for anything else
    # Each has a binomial number of hits, of mean 100 and deviation 9.7.
    assert all(60 < hits < 140 for hits in possible.values())


def test_a_frame_of_four_pixels_on_cifar():
    image = jnp.ones((32, 32, 3))
    crops = quick_jit(jax.vmap(crop_and_flip, (0, None)))(jax.random.split(KEY, 200), image)
    black = np.asarray((crops[..., 0] == 0).all(axis=2)).sum(axis=1)  # rows of the frame
    assert set(black) == {0, 1, 2, 3, 4}


def test_only_training_batches_are_augmented():
    plain, augmented = make_task(), make_task(augmentation=True)
    ours, theirs = compiled(augmented.batch)(KEY), plain.batch(KEY)
    np.testing.assert_array_equal(ours.arrays.labels, theirs.arrays.labels)
    assert not np.allclose(ours.arrays.images, theirs.arrays.images)
    np.testing.assert_array_equal(ours.arrays.images, compiled(augmented.batch)(KEY).arrays.images)
    for split in ("valid_inner", "valid_outer", "test"):
        ours, theirs = augmented.batch(KEY, split), plain.batch(KEY, split)
        np.testing.assert_array_equal(ours.arrays.images, theirs.arrays.images)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def test_it_learns_and_inference_follows():
    task, optimizer = make_task(batch_size=16), optax.sgd(0.05, momentum=0.9)
    begin = lopt.start(task, optimizer, compiled(task.init)(KEY), KEY)
    state, losses = quick_jit(lambda state: lopt.unroll(task, optimizer, state, 100))(begin)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    test = task.everything("test")
    metrics = compiled(task.metrics)(state.params, state.estimator_state, test)
    assert metrics["accuracy"] > 0.8


@pytest.mark.slow
def test_running_statistics_cross_the_border_of_a_window():
    """The published code overwrote them with noise, then crashed at the second window."""
    task = make_task(channels=(4,), depth=(1,), augmentation=True)
    inner = lopt.InnerTraining(task, lopt.LearnableSGD(0.05), horizon=4)
    estimator = lopt.TruncatedBackprop(inner, truncation=2, stagger=False)
    theta = inner.learned.init(KEY)
    estimate = compiled(estimator.estimate)
    state = compiled(estimator.prepare)(theta, KEY)
    seen = []
    for window in range(2):
        found, state = estimate(theta, state, jax.random.key(window))
        assert bool(jnp.isfinite(found.loss))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found.grads))
        assert any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(found.grads))
        seen.append(state.episode.train)
        assert seen[-1].step == 2 * (window + 1)
        assert all(bool((v > 0).all()) for v in seen[-1].estimator_state.variance)
    # The second window goes on from the statistics of the first, as a run without border does.
    optimizer = inner.learned.optimizer(theta)
    whole, _ = quick_jit(lambda state: lopt.unroll(task, optimizer, state, 2))(seen[0])
    for name in ("mean", "variance"):
        ours, theirs = (getattr(run.estimator_state, name) for run in (seen[1], whole))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
    moved = [
        bool((a != b).any())
        for a, b in zip(seen[0].estimator_state.mean, seen[1].estimator_state.mean, strict=True)
    ]
    assert all(moved)


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 1}, "resnet_classification.*batch_size=1.*try"),
        ({"channels": (4, 0)}, "channels=0.*try"),
        ({"depth": (1, 0)}, "blocks=0.*try"),
        ({"depth": (1,)}, r"channels=\(4, 6\), blocks=\(1,\).*try channels=\(64, 128\)"),
        ({"depth": (), "channels": ()}, r"at least one; try channels=\(64, 128\), blocks=\(2, 2\)"),
        ({"momentum": 1.0}, "momentum=1.0.*try"),
        ({"epsilon": 0.0}, "epsilon=0.0.*try"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        make_task(**options)


def test_a_depth_that_was_never_published():
    with pytest.raises(ValueError, match=r"depth=19.*18, 34, 50, 101, 152.*try depth=18"):
        resnet_classification(make_data(), 19)
