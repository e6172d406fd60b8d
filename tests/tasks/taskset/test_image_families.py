"""TaskSet's families on images: distributions, published configurations, and tasks that train."""

import collections
import colorsys
import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.tasks import Labelled, image_data, taskset
from lopt.tasks.taskset.images import DATA_SETS, Augmentation, ImageConfig
from lopt.tasks.taskset.pieces import ACTIVATIONS, INITIALIZERS, Initializer

KEY = jax.random.key(0)
NAMES = [
    *("mlp_family", "conv_pooling_family", "conv_fc_family", "mlp_ae_family"),
    *("mlp_vae_family", "nvp_family", "maf_family"),
]
# Those of `lopt.tasks.taskset.image_families`, by their fields: ranges and chances.
WIDTHS = {
    ("mlp_family", "widths"): (1, 6, 16, 128),
    ("mlp_ae_family", "widths"): (1, 6, 32, 128),
    ("mlp_vae_family", "encoder"): (1, 4, 32, 128),
    ("mlp_vae_family", "decoder"): (1, 3, 32, 128),
    ("nvp_family", "widths"): (1, 2, 16, 128),
    ("maf_family", "widths"): (1, 2, 16, 128),
    ("conv_pooling_family", "channels"): (1, 5, 8, 64),
    ("conv_fc_family", "channels"): (1, 5, 8, 64),
    ("conv_fc_family", "hidden"): (0, 3, 32, 128),
}
CHOICES = {
    "centre": {True: 1, False: 1},
    "bias": {True: 1, False: 1},
    "pool_all": {"mean": 1, "max": 1, "squared_mean": 1},
    "output": {"tanh": 2, "sigmoid": 2, "linear_center": 1, "linear": 1},
    "distance": {"l2": 2, "l1": 1},
    "reduce": {"mean": 1, "sum": 1},
    "layers": {1: 1, 2: 1, 3: 1, 4: 1},
    "activation": dict.fromkeys(ACTIVATIONS, 1) | {"relu": 6, "tanh": 3},
    "initializer": dict.fromkeys(INITIALIZERS[:4], 2) | dict.fromkeys(INITIALIZERS[4:], 1),
    "data_set": dict.fromkeys(DATA_SETS, 1),
}


def assert_shares(found, weights):
    """Checks that each share is within four standard errors of its binomial."""
    counts, total = collections.Counter(found), sum(weights.values())
    assert counts.keys() <= weights.keys()
    for name, weight in weights.items():
        share = weight / total
        error = (share * (1 - share) / len(found)) ** 0.5
        assert abs(counts[name] / len(found) - share) < 4 * error, (name, counts)


def assert_log_uniform(found, low, high):
    """Checks range and mean of logarithms."""
    found = np.log(found) - np.log(low)
    length = np.log(high) - np.log(low)
    assert found.min() >= -1e-9
    assert found.max() <= length + 1e-9
    assert abs(found.mean() - length / 2) < 4 * length / np.sqrt(12 * len(found)) + 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_seeds_are_distributed_as_published(name):
    configs = [taskset.sample(name, seed) for seed in range(1000)]
    fields = collections.defaultdict(list)
    for config in configs:
        for field in dataclasses.fields(config):
            fields[field.name].append(getattr(config, field.name))
    fields["initializer"] = [initializer.name for initializer in fields["initializer"]]
    fields["data_set"] = [images.data_set for images in fields["images"]]
    for field, weights in CHOICES.items():
        if field in fields:
            assert_shares(fields[field], weights)
    for (family, field), (fewest, most, low, high) in WIDTHS.items():
        if family == name:
            widths = fields[field]
            assert_shares([len(w) for w in widths], dict.fromkeys(range(fewest, most + 1), 1))
            assert_log_uniform(np.concatenate([w for w in widths if w]), low, high)
    scales = [c.initializer.scale for c in configs if c.initializer.name in INITIALIZERS[4:]]
    assert_log_uniform(scales, 0.1, 10)
    if "strides" in fields:
        deep = [config.strides for config in configs if len(config.strides) > 1]
        assert_shares([strides[:2] for strides in deep], {(2, 2): 1, (1, 2): 1, (2, 1): 1})
        assert all(a[2:] == a[:-2] for a in deep)
        assert_shares([p for c in configs for p in c.padding], {"SAME": 1, "VALID": 1})
        assert all(len(c.padding) == len(c.channels) == len(c.strides) for c in configs)
    check_images(fields["images"])


@pytest.mark.parametrize("compat", ["clean", "taskset"])
@pytest.mark.parametrize("name", NAMES)
def test_quirks_are_kept_or_mended(name, compat):
    configs = [taskset.sample(name, seed, compat) for seed in range(50)]
    assert {config.initializer.truncated for config in configs} == {compat == "clean"}
    assert any(config.images.just_train for config in configs) == (compat == "clean")
    assert {getattr(config, "quirks", compat == "taskset") for config in configs} == {
        compat == "taskset"
    }
    assert {getattr(config, "clip", compat == "clean") for config in configs} == {compat == "clean"}


def check_images(images):
    groups = collections.defaultdict(list)
    for one in images:
        kind = "small" if "mnist" in one.data_set else "other"
        groups["cifar" if "cifar" in one.data_set else kind].append(one)
    for kind, most_batch, most, just_train in [
        ("small", 512, 55000, 0.1),
        ("cifar", 256, 50000, 0.2),
        ("other", 256, None, 0.2),
    ]:
        group = groups[kind]
        assert_log_uniform([one.batch_size for one in group], 8, most_batch)
        counts = [one.train_examples for one in group]
        if most is None:
            assert set(counts) == {None}
        else:
            assert 1000 <= min(counts) < 0.1 * most
            assert 0.9 * most < max(counts) <= most
        assert_shares([one.just_train for one in group], {True: just_train, False: 1 - just_train})
    augmentations = [one.augmentation for one in images]
    assert_shares([one is not None for one in augmentations], {True: 3, False: 7})
    augmentations = [one for one in augmentations if one is not None]
    assert_shares([one.crop for one in augmentations], {0: 3, 1: 1, 2: 1})
    for flag in ("left_right", "up_down", "colour"):
        assert_shares([getattr(one, flag) for one in augmentations], {True: 1, False: 1})
    for field, low, high in [
        ("brightness", 0.001, 64 / 255),
        ("saturation", 0.01, 1),
        ("hue", 0.01, 0.5),
        ("contrast", 0.01, 1),
    ]:
        assert_log_uniform([getattr(one, field) for one in augmentations], low, high)


# Some of the published configurations: name, activation, initializer and scale, data set, batch
# size, training examples, and the fields of the family.
PUBLISHED = [
    ("mlp_family", 104, "swish", ("random_normal", 3.311296652326694), ("mnist", 258, 2002),
     {"widths": (43,), "centre": False}),
    ("mlp_family", 100, "leaky_relu1", ("orthogonal", 0.3663479597831705),
     ("sun397_32x32", 109, None), {"widths": (24, 21, 33), "centre": True}),
    ("conv_pooling_family", 105, "tanh", ("glorot_normal", 1.0), ("cifar100", 10, 27385),
     {"strides": (1,), "channels": (16,), "padding": ("SAME",), "pool_all": "mean",
      "bias": False, "centre": True}),
    ("conv_fc_family", 0, "leaky_relu4", ("glorot_normal", 1.0), ("sun397_32x32", 29, None),
     {"strides": (1, 2, 1, 2, 1), "channels": (46, 48, 47, 29, 18),
      "padding": ("SAME", "SAME", "VALID", "SAME", "VALID"), "hidden": (62, 55, 102),
      "bias": True, "centre": False}),
    ("mlp_ae_family", 1, "relu", ("orthogonal", 7.4315283965743735),
     ("fashion_mnist", 138, 12040), {"widths": (128, 117, 38, 128, 44, 55), "output": "linear",
      "distance": "l1", "reduce": "mean"}),
    ("mlp_vae_family", 104, "relu", ("variance_scaling", 0.9368088194958434),
     ("mnist", 384, 10024), {"encoder": (38, 95), "decoder": (48, 41, 93)}),
    ("nvp_family", 10, "relu", ("random_normal", 0.24060810037073008), ("mnist", 94, 29259),
     {"widths": (28, 41), "layers": 4}),
    ("maf_family", 10, "swish", ("orthogonal", 4.13452557078367), ("cifar10", 33, 46802),
     {"widths": (80,), "layers": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "seed", "activation", "initializer", "images", "own"), PUBLISHED)
def test_seeds_give_the_published_configurations(name, seed, activation, initializer, images, own):
    config = taskset.sample(name, seed, "taskset")
    assert config.activation == activation
    assert (config.initializer.name, config.initializer.scale) == initializer
    found = config.images
    assert (found.data_set, found.batch_size, found.train_examples) == images
    assert {field: getattr(config, field) for field in own} == own


def test_a_published_augmentation():
    found = taskset.sample("nvp_family", 10, "taskset").images.augmentation
    colours = 0.0994769866924565, 0.02066753058811258, 0.04564741890115948, 0.019354273200733917
    assert found == Augmentation(1, True, True, True, *colours)


def test_families_share_draws_only_as_published():
    pooling, dense = (taskset.sample(n, 5, "taskset") for n in NAMES[1:3])
    assert (pooling.channels, pooling.padding) == (dense.channels, dense.padding)
    pooling, dense = (taskset.sample(n, 5) for n in NAMES[1:3])
    assert (pooling.channels, pooling.padding) != (dense.channels, dense.padding)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_survive_json(name):
    for seed in range(20):
        config = taskset.sample(name, seed)
        assert taskset.from_json(json.loads(json.dumps(taskset.to_json(config)))) == config
    values = taskset.to_json(config)
    with pytest.raises(ValueError, match="images"):
        taskset.from_json({key: value for key, value in values.items() if key != "images"})
    with pytest.raises(ValueError, match=r"initializer 'he_norml'.*try 'he_normal'"):
        taskset.from_json(values | {"initializer": values["initializer"] | {"name": "he_norml"}})


def digits(size=8, channels=1, num=60):
    generator = np.random.default_rng(0)
    images = generator.uniform(size=(num, size, size, channels))
    return image_data(images, generator.integers(0, 3, num), None, None, 3, size)


def small(name, seed=0, **changes):
    """A configuration with small layers and batches."""
    config = taskset.sample(name, seed)
    images = dataclasses.replace(config.images, batch_size=4, **changes)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    narrow = {
        field: tuple(3 for _ in value[:2])
        for field, value in fields.items()
        if field in ("widths", "hidden", "encoder", "decoder", "channels")
    }
    if "channels" in narrow:
        narrow |= {field: fields[field][:2] for field in ("strides", "padding")}
    return dataclasses.replace(config, images=images, **narrow)


def train(task, steps=20):
    # Gradients span tens of orders of magnitude: steps of one length are finite for all.
    optimizer = optax.sign_sgd(1e-5)

    @quick_jit
    def run(key):
        return lopt.unroll(task, optimizer, lopt.start(task, optimizer, task.init(key), key), steps)

    state, losses = run(KEY)
    return losses, state.params


def is_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", NAMES)
def test_small_tasks_take_twenty_finite_steps(name):
    task = small(name).build(lambda name: digits())
    losses, params = train(task)
    assert losses.shape == (20,)
    assert is_finite((losses, params))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fifty_tasks_take_twenty_finite_steps(name):
    data = digits(8, 3)
    for seed in range(50):
        task = taskset.sample(name, seed).build(lambda name: data)
        losses, params = train(task)
        assert is_finite((losses, params)), seed
        jax.clear_caches()


def test_tasks_of_one_shape_are_one_program():
    configs = [small("mlp_family", train_examples=count, just_train=False) for count in (10, 20)]
    first, second = (config.build(lambda name: digits()) for config in configs)
    family = lopt.tasks.Mixture([first, second])
    assert len(family.architectures()) == 1
    optimizer = optax.sgd(0.1)

    def run(key):
        task = family.draw(key)
        return lopt.unroll(task, optimizer, lopt.start(task, optimizer, task.init(key), key), 3)[1]

    assert is_finite(eqx.filter_jit(eqx.filter_vmap(run))(jax.random.split(KEY, 4)))


def test_data_are_used_as_configured():
    data = digits()
    config = ImageConfig("mnist", None, 8, 10, False)
    asked = []
    loaded = config.load(lambda name: asked.append(name) or data)
    assert asked == ["mnist"]
    assert (int(loaded.train.count), int(loaded.test.count)) == (10, int(data.test.count))
    everything = dataclasses.replace(config, train_examples=55000, just_train=True)
    loaded = everything.load(lambda name: data)
    assert all(loaded.split(name) is loaded.train for name in lopt.core.types.SPLITS)
    assert int(loaded.train.count) == int(data.train.count)


def test_too_small_images_are_padded():
    config = dataclasses.replace(
        small("conv_fc_family"),
        strides=(2, 2, 2),
        channels=(2, 2, 2),
        padding=("VALID", "VALID", "VALID"),
        hidden=(),
    )
    params = config.build(lambda name: digits(8)).init(KEY)
    assert [layer.padding for layer in params.convolutions] == ["VALID", "VALID", "SAME"]
    assert params.perceptron.layers[0].weight.shape == (3, 2)


# ---------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------


def test_initial_weights_have_the_deviation_of_their_name():
    shape, fan_in, fan_out = (40, 50), 50, 40
    expected = {
        "he": (2 / fan_in) ** 0.5,
        "glorot": (2 / (fan_in + fan_out)) ** 0.5,
        "orthogonal": 3 / max(shape) ** 0.5,
        "random_uniform": 3 / 3**0.5,
        "random_normal": 3,
        "truncated_normal": 3 * 0.8796,
        "variance_scaling": (3 / fan_in) ** 0.5,
    }
    for name in INITIALIZERS:
        deviation = next(value for start, value in expected.items() if name.startswith(start))
        weights = Initializer(name, 3.0, True)(KEY, shape)
        assert weights.shape == shape
        assert abs(weights.std() / deviation - 1) < 5 / np.sqrt(2 * weights.size), name
    assert jnp.abs(Initializer("truncated_normal", 1.0, True)(KEY, shape)).max() <= 2
    assert jnp.abs(Initializer("truncated_normal", 1.0, False)(KEY, shape)).max() > 2


PLAIN = Augmentation(0, False, False, False, 0.1, 0.1, 0.1, 0.1)


def augmented(augmentation, image, num=64):
    example = Labelled(image, jnp.zeros((), jnp.int32))
    return jax.vmap(lambda key: augmentation(key, example).images)(jax.random.split(KEY, num))


def test_crops_and_flips():
    image = 1 + jnp.arange(12.0).reshape(3, 4, 1)
    np.testing.assert_array_equal(augmented(PLAIN, image, 2), jnp.stack([image, image]))
    flipped = augmented(dataclasses.replace(PLAIN, left_right=True, up_down=True), image)
    assert len({tuple(np.asarray(one).ravel()) for one in flipped}) == 4
    np.testing.assert_array_equal(
        jnp.sort(flipped.reshape(64, -1)), jnp.tile(image.ravel(), (64, 1))
    )
    cropped = augmented(dataclasses.replace(PLAIN, crop=2), image)
    assert len({tuple(np.asarray(one).ravel()) for one in cropped}) == 9
    assert set(np.asarray((cropped > 0).sum((1, 2, 3)))) == {2}  # one row, two columns
    assert bool(jnp.all((cropped == 0) | (cropped == image[None])))  # in their place


def test_colours_change_as_they_say():
    image = jax.random.uniform(KEY, (4, 5, 3), minval=0.3, maxval=0.7)
    colour = Augmentation(0, False, False, True, 0.0, 0.0, 0.0, 0.0)
    same = augmented(colour, image)
    np.testing.assert_allclose(same, jnp.tile(image, (64, 1, 1, 1)), atol=1e-12)
    brighter = augmented(dataclasses.replace(colour, brightness=0.2), image)
    shift = brighter - image[None]
    np.testing.assert_allclose(shift, shift[:, :1, :1, :1] * jnp.ones_like(shift), atol=1e-12)
    assert 0.15 < jnp.abs(shift).max() <= 0.2
    contrast = augmented(dataclasses.replace(colour, contrast=0.3), image)
    np.testing.assert_allclose(contrast.mean((1, 2)), jnp.tile(image.mean((0, 1)), (64, 1)))
    # Against the standard library: all pixels are turned and faded alike.
    before = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in np.asarray(image).reshape(-1, 3)])
    for changes in ({"hue": 0.3}, {"saturation": 0.5}):
        for one in np.asarray(augmented(dataclasses.replace(colour, **changes), image, 8)):
            after = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in one.reshape(-1, 3)])
            np.testing.assert_allclose(after[:, 2], before[:, 2])
            turns = after[:, 0] - before[:, 0]
            turns = (turns - turns[0] + 0.5) % 1 - 0.5
            np.testing.assert_allclose(turns, 0, atol=1e-9)
            ratios = after[:, 1] / before[:, 1]
            np.testing.assert_allclose(ratios, ratios[0])
            changed = ratios[0] - 1 if "saturation" in changes else 6 * (after - before)[0, 0]
            assert abs(changed) > 1e-3
