"""Images as the tasks of TaskSet see them: which data set, how much of it, and how augmented."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Key
from lopt.tasks.data import Data, Image, Labelled
from lopt.tasks.taskset.config import Draw, Load, Sampled, choice, drawn, drawn_after
from lopt.tasks.taskset.pieces import part_of

# Sorted, as published samplers choose from sorted names.
DATA_SETS = (
    *("cifar10", "cifar100", "coil100_32x32", "deep_weeds_32x32", "fashion_mnist"),
    *("food101_32x32", "imagenet_resized/16x16", "imagenet_resized/32x32"),
    *("mnist", "sun397_32x32"),
)
SMALL = ("mnist", "fashion_mnist")


@dataclasses.dataclass(frozen=True)
class Augmentation(Sampled):
    """How training images are changed at random: (key, example) to an example.

    Attributes:
        crop: how many rows and columns are cut off, at random ends, and replaced by black ones; in
            TaskSet images become smaller.
        left_right, up_down: whether images are mirrored, every other time.
        colour: whether images of three channels are changed by the rest.
        brightness, saturation, hue, contrast: the largest change: of values, as a share of
            saturation, in turns, and as a share of the distance from the mean.
    """

    crop: int = choice(0, 0, 0, 1, 2)
    left_right: bool = choice(False, True)
    up_down: bool = choice(False, True)
    colour: bool = choice(False, True)
    brightness: float = drawn(lambda draw: draw.log_uniform(0.001, 64 / 255))
    saturation: float = drawn(lambda draw: draw.log_uniform(0.01, 1.0))
    hue: float = drawn(lambda draw: draw.log_uniform(0.01, 0.5))
    contrast: float = drawn(lambda draw: draw.log_uniform(0.01, 1.0))

    def __call__(self, key: Key, example: Labelled) -> Labelled:
        """Returns a changed example; values stay between 0 and 1."""
        image, keys = example.images, jax.random.split(key, 7)
        for axis in (0, 1) if self.crop else ():
            cut = jax.random.randint(keys[axis], (), 0, self.crop + 1)  # of them at the beginning
            place = jnp.arange(image.shape[axis]) - cut
            kept = (place >= 0) & (place < image.shape[axis] - self.crop)
            image = jnp.where(jnp.expand_dims(kept, (1 - axis, 2)), image, jnp.zeros_like(image))
        for axis, mirrored in enumerate((self.up_down, self.left_right)):
            if mirrored:
                mirror = jax.random.bernoulli(keys[2 + axis])
                image = jnp.where(mirror, jnp.flip(image, axis), image)
        if self.colour and image.shape[2] == 3:
            largest = jnp.array([self.brightness, self.saturation, self.hue, self.contrast])
            signed = jax.random.uniform(keys[4], (4,), image.dtype, -1, 1)
            image = _recolour(image, largest.astype(image.dtype) * signed)
        return Labelled(image, example.labels)


def _recolour(image: Image, changes: Float[Array, "4"]) -> Image:
    """Returns an image of another brightness, saturation, hue and contrast."""
    brightness, saturation, hue, contrast = changes
    image = jnp.clip(image + brightness, 0, 1)
    # Of hue, saturation and value: value is the largest channel, chroma the range of the three.
    red, green, blue = jnp.moveaxis(image, 2, 0)
    value = jnp.max(image, axis=2)
    chroma = value - jnp.min(image, axis=2)
    safe = jnp.where(chroma > 0, chroma, 1)
    sextant = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    chroma = jnp.minimum(chroma * (1 + saturation), value)
    places = [jnp.mod(sextant + 6 * hue + place, 6) for place in (5, 3, 1)]
    lost = [chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1) for place in places]
    image = jnp.stack([value - part for part in lost], axis=2)
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)
    return jnp.clip((image - mean) * (1 + contrast) + mean, 0, 1)


def _draw_train_examples(draw: Draw, found: dict[str, Any]) -> int | None:
    name = found["data_set"]
    if name not in (*SMALL, "cifar10", "cifar100"):
        return None
    return round(draw.uniform(1000, 55000 if name in SMALL else 50000))


@dataclasses.dataclass(frozen=True)
class ImageConfig(Sampled):
    """A data set of images as a task uses it.

    Attributes:
        data_set: its name.
        augmentation: of training images, or None.
        batch_size: examples per step.
        train_examples: how many examples are trained on, if there are so many; None for all.
        just_train: whether all splits are the training split. TaskSet samples this for images and
            then leaves it at that, so that it is False under compat="taskset".
    """

    data_set: str = choice(*DATA_SETS)
    augmentation: Augmentation | None = drawn(
        lambda draw: Augmentation.draw(draw) if draw.flag(0.3) else None
    )
    batch_size: int = drawn_after(
        lambda draw, found: draw.log_integer(8, 512 if found["data_set"] in SMALL else 256)
    )
    train_examples: int | None = drawn_after(_draw_train_examples)
    just_train: bool = drawn_after(
        lambda draw, found: (
            draw.flag(0.1 if found["data_set"] in SMALL else 0.2) and draw.compat == "clean"
        )
    )

    def load(self, load: Load) -> Data:
        """Returns the data, `load` giving all of a data set."""
        return part_of(load(self.data_set), self.train_examples, self.just_train)
