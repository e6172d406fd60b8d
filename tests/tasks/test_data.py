"""Images: resizing against golden numbers and a plain loop, splits, drawing."""

import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.core.types import SPLITS
from lopt.tasks import Examples, array_data, image_data, resize

KEY = jax.random.key(0)
GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "image_resize.npz"


def make_data(num=100, num_test=0, size=4):
    """Every image has its own number, which resizing keeps, as its only value."""
    values = np.arange(num + num_test) / (num + num_test)
    images = np.ones((1, 8, 8, 1)) * values[:, None, None, None]
    labels = np.arange(num + num_test) % 10
    test = (images[num:], labels[num:]) if num_test else (None, None)
    return image_data(images[:num], labels[:num], *test, 10, size)


def resize_slowly(image, size):
    """One output pixel after the other, from the definition."""
    height, width, channels = image.shape
    result = np.zeros((size, size, channels))
    for i in range(size):
        for j in range(size):
            y = min(max((i + 0.5) * height / size - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / size - 0.5, 0), width - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (left + 1 - x) + image[top, right] * (x - left)
            lower = image[bottom, left] * (left + 1 - x) + image[bottom, right] * (x - left)
            result[i, j] = upper * (top + 1 - y) + lower * (y - top)
    return result


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"golden numbers are not at {GOLDEN}")
def test_resize_golden():
    golden = np.load(GOLDEN)
    for size in (8, 16, 28, 32):
        found = resize(golden["random_u8_28x28"], size) / 255
        np.testing.assert_allclose(found, golden[f"random_resized_{size}"], atol=1e-5)
    found = resize(golden["random_u8_32x32x3"], 8) / 255
    np.testing.assert_allclose(found, golden["random_rgb_resized_8"], atol=1e-5)
    found = resize(golden["fmnist/test_first16_u8"].astype(np.float32) / 255, 8)
    np.testing.assert_allclose(found, golden["fmnist8/test_first16"], atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 9, 20])
def test_resize_equals_plain_loop(size):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    slow = np.stack([resize_slowly(image.astype(np.float64), size) for image in images])
    found = resize(images, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow, atol=1e-3)


@pytest.mark.parametrize(
    ("num_test", "sizes"), [(0, (73, 10, 10, 10)), (7, (83, 10, 10, 7))], ids=["parted", "given"]
)
def test_splits_are_disjoint_and_complete(num_test, sizes):
    data = make_data(103, num_test)
    numbers = [np.asarray(data.split(name).arrays.images)[:, 0, 0, 0] for name in SPLITS]
    assert tuple(len(part) for part in numbers) == sizes
    total = 103 + num_test
    found = np.sort(np.concatenate(numbers))
    np.testing.assert_allclose(found, np.arange(total) / total, atol=1e-6)
    for name, part in zip(SPLITS, numbers, strict=True):
        # Labels went with their images.
        np.testing.assert_array_equal(data.split(name).arrays.labels, np.rint(part * total) % 10)
    assert not np.all(np.diff(numbers[0]) > 0), "the training set was not shuffled"


def test_draws_are_uniform_within_the_window():
    data = make_data(100).train
    window = Examples(data.arrays, jnp.int32(20), jnp.int32(7))
    drawn = jax.jit(lambda key: window.draw(key, 70_000))(KEY)
    inside = np.asarray(data.arrays.images)[20:27, 0, 0, 0]
    found = np.asarray(drawn.arrays.images)[:, 0, 0, 0]
    counts = np.array([np.sum(found == number) for number in inside])
    assert counts.sum() == 70_000
    assert np.all(np.abs(counts - 10_000) < 4 * np.sqrt(70_000 * 1 / 7 * 6 / 7))
    assert not np.array_equal(
        window.draw(jax.random.key(1), 5).arrays.images, drawn.arrays.images[:5]
    )


def test_everything_is_the_mean_over_the_window():
    data = make_data(100).train
    window = eqx.tree_at(lambda e: (e.first, e.count), data, (jnp.int32(20), jnp.int32(7)))
    batch = window.everything()
    found = batch.mean(batch.arrays.images)
    np.testing.assert_allclose(found, np.mean(data.arrays.images[20:27], axis=0), rtol=1e-6)
    whole = data.everything()
    np.testing.assert_allclose(
        whole.mean(whole.arrays.images), np.mean(data.arrays.images, axis=0), rtol=1e-5
    )


def test_bytes_are_divided_by_255():
    images = np.full((20, 8, 8, 1), 255, np.uint8)
    data = image_data(images, np.arange(20) % 10, None, None, 10, 8)
    assert data.train.arrays.images.dtype == jnp.float32
    np.testing.assert_allclose(data.train.arrays.images, 1, rtol=1e-6)


def test_any_pytree_of_arrays_is_parted():
    numbers = np.arange(50)
    arrays = {"x": numbers[:, None] / 50, "y": (numbers, numbers.astype(np.float32))}
    data = array_data(arrays, seed=1)
    assert [int(data.split(name).count) for name in SPLITS] == [35, 5, 5, 5]
    seen = np.concatenate([data.split(name).arrays["y"][0] for name in SPLITS])
    np.testing.assert_array_equal(np.sort(seen), numbers)
    rows = data.train.draw(KEY, 20).arrays
    np.testing.assert_allclose(rows["x"][:, 0] * 50, rows["y"][0], rtol=1e-6)
    assert rows["y"][1].dtype == np.float32
    given = array_data(arrays, {"x": np.ones((3, 1)), "y": (np.ones(3, int), np.ones(3))})
    assert [int(given.split(name).count) for name in SPLITS] == [40, 5, 5, 3]


IMAGES, LABELS = np.zeros((20, 8, 8, 1)), np.arange(20) % 10


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make_data().split("tset"), "Data.split.*'tset'.*valid_outer"),
        (lambda: Examples({"x": np.ones((5, 2)), "y": np.ones(4)}), r"Examples.*5, 2.*4,.*try"),
        (lambda: array_data((np.ones(50), np.ones(49))), "array_data.*50.*49.*same number.*try"),
        (lambda: Examples(()), "Examples.*try"),
        (lambda: resize(IMAGES, 0), "resize.*size=0.*try"),
        (lambda: image_data(IMAGES[:5], LABELS[:5], None, None, 10, 8), "5 examples.*at least 10"),
        (lambda: image_data(IMAGES, LABELS, IMAGES, None, 10, 8), "both"),
        (lambda: image_data(IMAGES, LABELS, None, None, 9, 8), "labels from 0 to 9.*num_classes"),
        (lambda: image_data(IMAGES + 2, LABELS, None, None, 10, 8), "2.0 to 2.0.*try dividing"),
        (lambda: image_data(IMAGES, LABELS, IMAGES[:0], LABELS[:0], 10, 8), r"test_im.*\(0, 8"),
        (lambda: image_data(IMAGES, LABELS, None, None, 0, 8), "num_classes=0"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()
