"""Data in splits, which are windows on arrays: tasks on parts of the same data share it."""

import abc
import operator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num, PyTree

from lopt.core.checks import check_integer
from lopt.core.types import SPLITS, Key
from lopt.core.unroll import KEPT
from lopt.tasks.ranges import random_index

Image = Float[Array, "height width channel"]
Images = Float[Array, "n height width channel"]
HostImages = Num[np.ndarray, "n height width channel"]
HostLabels = Int[np.ndarray, " n"]
Index = Int[Array, ""] | int
# Windows of text that are judged as a whole at most: a step sees a few of them.
WHOLE = 256


class Labelled(NamedTuple):
    """Images, values between 0 and 1 of shape (n, height, width, channel), and their classes."""

    images: Any
    labels: Any


class Rows(eqx.Module):
    """A batch: some examples.

    Attributes:
        arrays: a pytree of arrays with one row per example, such as `Labelled`.
        weights: how much each example counts in a mean, or None if all count alike.
        key: what else is random, such as dropout, is drawn from it; None if nothing is.
    """

    arrays: PyTree
    weights: Float[Array, " n"] | None = None
    key: Any = None

    def mean(self, values: Num[Array, "n ..."]) -> Float[Array, "..."]:
        """Returns the weighted mean of `values` over examples, in their dtype."""
        if self.weights is None:
            return jnp.mean(values, axis=0)
        weights = self.weights.astype(values.dtype)
        return jnp.tensordot(weights, values, axes=1) / jnp.sum(weights)


class AbstractExamples(eqx.Module):
    """The examples first, ..., first + count - 1 of some store."""

    first: eqx.AbstractVar[Int[Array, ""]]
    count: eqx.AbstractVar[Int[Array, ""]]

    @abc.abstractmethod
    def draw(self, key: Key, size: int) -> Rows:
        """Returns `size` examples, drawn with replacement."""

    @abc.abstractmethod
    def everything(self) -> Rows | None:
        """Returns all examples, or None where they are too many."""


class Examples(AbstractExamples):
    """The rows first, ..., first + count - 1 of arrays of equal length.

    Attributes:
        arrays: a pytree of arrays with one row per example, or per token of a text.
        first, count: the window of rows that may be drawn; all rows by default.
        length: if not None, an example is so many consecutive rows, which begin anywhere and end
            within the window. At most `count`.
    """

    arrays: PyTree
    first: Int[Array, ""]
    count: Int[Array, ""]
    length: int | None = eqx.field(static=True)

    def __init__(
        self,
        arrays: PyTree,
        first: Index = 0,
        count: Index | None = None,
        length: int | None = None,
    ) -> None:
        rows = _length("Examples(arrays)", arrays)
        if length is not None:
            check_integer("Examples", "length", length, 1, rows, hint="length=64")
        self.arrays = jax.tree.map(jnp.asarray, arrays)
        self.first = jnp.asarray(first, jnp.int32)
        self.count = jnp.asarray(rows if count is None else count, jnp.int32)
        self.length = length

    def draw(self, key: Key, size: int) -> Rows:
        """Returns `size` examples, drawn with replacement."""
        starts = self.count if self.length is None else self.count - (self.length - 1)
        rows = random_index(key, starts, (size,)) + self.first.astype(jnp.int32)
        rows = checkpoint_name(rows, KEPT)
        if self.length is not None:
            rows = rows[:, None] + jnp.arange(self.length, dtype=jnp.int32)[None]
        # Windows lie within the arrays, so that no row has to be checked.
        options = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
        return Rows(jax.tree.map(lambda leaf: leaf.at[rows].get(**options), self.arrays))

    def everything(self) -> Rows | None:
        """Returns the whole window: all rows, those outside of it with weight zero.

        With a length, examples follow one another, and rows that fill no further one are left out;
        None if they are more than `WHOLE`.
        """
        total = len(jax.tree.leaves(self.arrays)[0])
        if self.length is not None:
            if total // self.length > WHOLE:
                return None
            place = jnp.arange(total // self.length, dtype=jnp.int32)
            steps = jnp.arange(self.length, dtype=jnp.int32)
            rows = self.first + self.length * place[:, None] + steps[None]
            arrays = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), self.arrays)
            return Rows(arrays, (place < self.count // self.length).astype(jnp.float32))
        rows = jnp.arange(total, dtype=self.first.dtype) - self.first
        return Rows(self.arrays, ((rows >= 0) & (rows < self.count)).astype(jnp.float32))


class Data(eqx.Module):
    """A data set in four disjoint splits.

    Each is `Examples`, or streamed.

    Attributes:
        train: for inner training.
        valid_inner: for meta-losses that ask for generalisation.
        valid_outer: for choices made by a person, such as a meta-learning rate.
        test: for the final word.
        num_classes: of labelled data: labels are 0, ..., num_classes - 1; of text, the number of
            tokens that there are.
    """

    train: Any
    valid_inner: Any
    valid_outer: Any
    test: Any
    num_classes: int | None = eqx.field(static=True, default=None)

    def split(self, name: str) -> Any:
        """Returns the split of that name."""
        if name not in SPLITS:
            raise ValueError(f"Data.split(name={name!r}) must be one of {', '.join(SPLITS)}.")
        return getattr(self, name)


def array_data(
    arrays: PyTree, test_arrays: PyTree = None, seed: int = 0, num_classes: int | None = None
) -> Data:
    """Shuffles NumPy arrays, parts them into splits and puts them on the device.

    With test arrays of their own, the others are parted into train, valid_inner and valid_outer
    80 : 10 : 10. Without, all are parted into these and test 70 : 10 : 10 : 10.

    Example:
        >>> import numpy as np, lopt
        >>> inputs = np.linspace(-1, 1, 100)[:, None]
        >>> data = lopt.tasks.array_data({"x": inputs, "y": np.sin(inputs)})
        >>> data.train.arrays["x"].shape
        (70, 1)
    """
    order = np.random.default_rng(seed).permutation(_length("array_data(arrays)", arrays))
    tenth = len(order) // 10
    if tenth == 0:
        raise ValueError(
            f"array_data(arrays of {len(order)} examples) must have at least 10, "
            "one in each split; try more."
        )
    ends = [-3 * tenth, -2 * tenth, -tenth] if test_arrays is None else [-2 * tenth, -tenth]
    parts = [jax.tree.map(operator.itemgetter(rows), arrays) for rows in np.split(order, ends)]
    train, valid_inner, valid_outer, test = map(Examples, [*parts, test_arrays][:4])
    return Data(train, valid_inner, valid_outer, test, num_classes)


def text_data(tokens: Int[np.ndarray, " n"], length: int, vocabulary: int | None = None) -> Data:
    """Parts a text into contiguous splits, train first, 70 : 10 : 10 : 10.

    Examples are `length` tokens from anywhere within one split. Tokens are integers from 0 to
    vocabulary - 1, by default up to the largest.

    Example:
        >>> import jax, numpy as np, lopt
        >>> data = lopt.tasks.text_data(np.arange(100), length=5)
        >>> data.train.draw(jax.random.key(0), size=3).arrays.shape
        (3, 5)
    """
    check_integer("text_data", "length", length, hint="length=64")
    tenth = len(tokens) // 10
    if tenth < length:
        raise ValueError(
            f"text_data({len(tokens)} tokens, length={length}) must have at least ten times as "
            f"many tokens as an example; try {f'length={tenth}' if tenth else 'a longer text'}."
        )
    low, high = int(tokens.min()), int(tokens.max())
    vocabulary = high + 1 if vocabulary is None else vocabulary
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"text_data(tokens) has tokens from {low} to {high}; must be between 0 and vocabulary "
            f"- 1 = {vocabulary - 1}, try vocabulary={high + 1}."
        )
    parts = np.split(tokens.astype(np.int32), [-3 * tenth, -2 * tenth, -tenth])
    train, valid_inner, valid_outer, test = (Examples(part, length=length) for part in parts)
    return Data(train, valid_inner, valid_outer, test, vocabulary)


def _length(owner: str, arrays: PyTree) -> int:
    """Returns the number of rows of arrays; raises ValueError if they differ in it."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(arrays)]
    if len({shape[:1] for shape in shapes}) != 1 or not all(shapes[0][:1]) or not shapes[0]:
        raise ValueError(
            f"{owner} has shapes {', '.join(map(str, shapes))}; all arrays must have the same "
            "number of rows, one for each example; try arrays of the same length."
        )
    return shapes[0][0]


def resize(images: HostImages, size: int) -> Float[np.ndarray, "n {size} {size} channel"]:
    """Resizes images to squares of float32 and the same range, on the host.

    Bilinear, with half-pixel centres and without antialiasing: an output pixel i lies at the
    input coordinate (i + 1/2) input_size / size - 1/2, clipped to the image.
    """
    check_integer("resize", "size", size, hint="size=8")
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
) -> Data:
    """Makes squares of images, and splits of `Labelled` arrays as `array_data` does.

    Images are bytes, or floats between 0 and 1; labels are smaller than `num_classes`.
    """
    check_integer("image_data", "num_classes", num_classes, hint="num_classes=10")
    if (test_images is None) != (test_labels is None):
        raise ValueError("image_data(test_images, test_labels) must be given both, or both None.")
    train = _labelled("train", train_images, train_labels, num_classes, size)
    if test_images is None or test_labels is None:
        return array_data(train, None, seed, num_classes)
    test = _labelled("test", test_images, test_labels, num_classes, size)
    return array_data(train, test, seed, num_classes)


def _labelled(
    which: str, images: HostImages, labels: HostLabels, num_classes: int, size: int
) -> Labelled:
    """Returns resized images and their labels, or raises ValueError if they do not fit."""
    owner = f"image_data({which}_images, {which}_labels)"
    _length(owner, (images, labels))
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
    largest = np.float32(255 if images.dtype == np.uint8 else 1)
    return Labelled(resize(images, size) / largest, labels.astype(np.int32))
