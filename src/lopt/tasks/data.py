"""Images and labels as tasks hold them, and how arrays become that. No file is read here.

A split is a window on arrays: a first row and a number of rows, both arrays themselves, so that
tasks on different parts of the same data share it, also when many of them are mapped over.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num

from lopt.core.types import SPLITS, Key
from lopt.core.unroll import KEPT
from lopt.tasks.ranges import check_count

Images = Float[Array, "n height width channel"]
Labels = Int[Array, " n"]
HostImages = Num[np.ndarray, "n height width channel"]
HostLabels = Int[np.ndarray, " n"]


class Labelled(eqx.Module):
    """Some images with their labels.

    Attributes:
        images: values between 0 and 1.
        labels: the class of each image.
        weights: how much each image counts in a mean, or `None` if all count alike.
    """

    images: Images
    labels: Labels
    weights: Float[Array, " n"] | None = None

    def mean(self, values: Num[Array, "n ..."]) -> Float[Array, "..."]:
        """Returns the weighted mean over images of `values`, in their dtype."""
        if self.weights is None:
            return jnp.mean(values, axis=0)
        weights = self.weights.astype(values.dtype)
        return jnp.tensordot(weights, values, axes=1) / jnp.sum(weights)


class Examples(eqx.Module):
    """The rows first, ..., first + count - 1 of some images and labels.

    Attributes:
        images: values between 0 and 1; labels: the class of each.
        first, count: the window of rows that may be drawn.
    """

    images: Images
    labels: Labels
    first: Int[Array, ""]
    count: Int[Array, ""]

    def draw(self, key: Key, size: int) -> Labelled:
        """Returns `size` images, drawn with replacement.

        Random bits modulo `count` compile faster than `jax.random.randint`, and are uniform up to
        a relative error of count / 2^32.
        """
        bits = jax.random.bits(key, (size,), jnp.uint32)
        rows = jax.lax.rem(bits, jnp.broadcast_to(self.count.astype(jnp.uint32), (size,)))
        rows = rows.astype(jnp.int32) + self.first.astype(jnp.int32)
        rows = checkpoint_name(rows, KEPT)
        # Windows lie within the arrays, so that no row has to be checked.
        images, labels = jax.tree.map(
            lambda leaf: leaf.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False),
            (self.images, self.labels),
        )
        return Labelled(images, labels)

    def everything(self) -> Labelled:
        """Returns the whole window: all rows, those outside of it with weight zero."""
        rows = jnp.arange(len(self.labels), dtype=self.first.dtype) - self.first
        weights = (rows >= 0) & (rows < self.count)
        return Labelled(self.images, self.labels, weights.astype(self.images.dtype))


class ImageData(eqx.Module):
    """A data set in four disjoint splits.

    Attributes:
        train: for inner training.
        valid_inner: for meta-losses that ask for generalisation.
        valid_outer: for choices made by a person, such as a meta-learning rate.
        test: for the final word.
        num_classes: labels are 0, ..., num_classes - 1.
    """

    train: Examples
    valid_inner: Examples
    valid_outer: Examples
    test: Examples
    num_classes: int = eqx.field(static=True)

    def split(self, name: str) -> Examples:
        """Returns the split of that name.

        Raises:
            ValueError: if there is none.
        """
        splits = dict(
            zip(SPLITS, (self.train, self.valid_inner, self.valid_outer, self.test), strict=True)
        )
        if name not in splits:
            raise ValueError(f"ImageData.split(name={name!r}) must be one of {', '.join(SPLITS)}.")
        return splits[name]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return self.train.images.shape[1:]


def resize(images: HostImages, size: int) -> Float[np.ndarray, "n {size} {size} channel"]:
    """Resizes images to squares, on the host.

    Bilinear, with half-pixel centres and without antialiasing: an output pixel i lies at the
    input coordinate (i + 1/2) input_size / size - 1/2, clipped to the image.

    Args:
        images: integers or floats of any range.
        size: the height and width to give them.

    Returns:
        float32 images of the same range.

    Raises:
        ValueError: if `size` is not positive.
    """
    check_count("resize", "size", size, 1, 8)
    if images.shape[1:3] == (size, size):
        return images.astype(np.float32)  # what the products below give, but in no time
    rows, columns = (_interpolation(length, size) for length in images.shape[1:3])
    resized = np.einsum("rh,nhwc->nrwc", rows, images.astype(np.float32))
    return np.einsum("sw,nrwc->nrsc", columns, resized)


def _interpolation(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """Returns the matrix that interpolates a line of `length` pixels at `size` points."""
    place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    # A hat of width 1 around each place reaches its two neighbours and no others.
    distance = np.abs(place[:, None] - np.arange(length)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def image_data(
    train_images: HostImages,
    train_labels: HostLabels,
    test_images: Num[np.ndarray, "m test_height test_width channel"] | None,
    test_labels: Int[np.ndarray, " m"] | None,
    num_classes: int,
    size: int,
    seed: int = 0,
) -> ImageData:
    """Makes splits of arrays: shuffles, resizes, and puts them on the device as float32.

    With a test set of its own, the training set is parted into train, valid_inner and valid_outer
    80 : 10 : 10. Without, all is parted into train, valid_inner, valid_outer and test
    70 : 10 : 10 : 10.

    Args:
        train_images: bytes, or floats between 0 and 1.
        train_labels: the class of each.
        test_images: the like, or `None`.
        test_labels: the like, or `None`.
        num_classes: the number of classes; labels are smaller.
        size: the height and width that images are given.
        seed: of the shuffle before parting.

    Raises:
        ValueError: if images and labels do not belong together, values are out of range, or there
            are too few examples for a split.
    """
    check_count("image_data", "num_classes", num_classes, 1, 10)
    if (test_images is None) != (test_labels is None):
        raise ValueError("image_data(test_images, test_labels) must be given both, or both None.")
    _check_images("train", train_images, train_labels, num_classes)
    order = np.random.default_rng(seed).permutation(len(train_labels))
    tenth = len(order) // 10
    if tenth == 0:
        raise ValueError(
            f"image_data(train_images of {len(order)} examples) must have at least 10, "
            "one in each split; try more."
        )
    num_parts = 2 if test_images is not None else 3
    ends = [len(order) - tenth * i for i in range(num_parts, 0, -1)]
    splits = [
        _examples(train_images[rows], train_labels[rows], size) for rows in np.split(order, ends)
    ]
    if test_images is not None and test_labels is not None:
        _check_images("test", test_images, test_labels, num_classes)
        splits.append(_examples(test_images, test_labels, size))
    train, valid_inner, valid_outer, test = splits
    return ImageData(train, valid_inner, valid_outer, test, num_classes)


def _examples(images: HostImages, labels: HostLabels, size: int) -> Examples:
    resized = resize(images, size)
    resized = resized / np.float32(255) if images.dtype == np.uint8 else resized
    return Examples(
        jnp.asarray(resized),
        jnp.asarray(labels, jnp.int32),
        first=jnp.zeros((), jnp.int32),
        count=jnp.asarray(len(labels), jnp.int32),
    )


def _check_images(which: str, images: HostImages, labels: HostLabels, num_classes: int) -> None:
    """Raises ValueError if images and labels are not as `image_data` needs them."""
    owner = f"image_data({which}_images, {which}_labels)"
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{owner} has {len(images)} images and {len(labels)} labels; "
            "there must be as many of both, and at least one."
        )
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"{owner} has values from {images.min()} to {images.max()}; must be bytes or floats "
            "between 0 and 1, try dividing by the largest possible value."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{owner} has labels from {labels.min()} to {labels.max()}; must be between 0 and "
            f"num_classes - 1 = {num_classes - 1}, try num_classes={labels.max() + 1}."
        )
