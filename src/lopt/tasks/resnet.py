"""Classification by residual networks (He et al. 2015, arXiv:1512.03385) with batch normalisation.

In the form for small images: a 3x3 stem and no pooling before the blocks. From 8x8 digits to
ResNet-50 on CIFAR-10, which Zheng et al. 2022 (arXiv:2203.06578) meta-tune symbolic rules on.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer
from lopt.core.types import Key
from lopt.tasks.batch_norm import BatchNormNetwork, Normalise, Statistics
from lopt.tasks.classification import (
    MultilayerPerceptron,
    classification,
    image_shape,
    initial_weights,
)
from lopt.tasks.convolutional import convolve
from lopt.tasks.data import Data, Image, Images, Labelled
from lopt.tasks.network_task import Build, NetworkTask

EXPANSION = 4  # a bottleneck block is so many times as wide outside as inside

# Blocks of each stage, and whether they are bottlenecks (He et al. 2015, table 1).
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class NormalisedConvolution(eqx.Module):
    """A convolution without bias, then batch normalisation, see `BatchNormNetwork`."""

    weight: Float[Array, "output input kernel kernel"]
    gain: Float[Array, " output"]
    shift: Float[Array, " output"]
    stride: int = eqx.field(static=True)

    def __call__(
        self, images: Images, normalise: Normalise
    ) -> Float[Array, "n rows columns output"]:
        """Returns the normalised outputs."""
        return normalise(convolve(images, self.weight, self.stride), self.gain, self.shift)


class ResidualBlock(eqx.Module):
    """x to activation(body(x) + shortcut(x)), with activations between the layers of the body.

    Attributes:
        body: two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck block.
        shortcut: a 1x1 convolution where size or channels change, otherwise nothing: x itself.
    """

    body: tuple[NormalisedConvolution, ...]
    shortcut: tuple[NormalisedConvolution, ...]

    def __call__(
        self, images: Images, normalise: Normalise, activation: Callable[[Array], Array]
    ) -> Float[Array, "n rows columns output"]:
        """Returns the outputs of the block."""
        *hidden, last = self.body
        inside = images
        for layer in hidden:
            inside = activation(layer(inside, normalise))
        inside = last(inside, normalise)
        for layer in self.shortcut:
            images = layer(images, normalise)
        return activation(inside + images)


class ResidualNetwork(eqx.Module):
    """A 3x3 stem, stages of residual blocks, the mean over all pixels, a linear layer.

    It maps a whole batch, since that is what moments are taken of. The first block of every stage
    but the first has stride 2, in a bottleneck block that of its 3x3 convolution. Convolutions
    start normal with variance 2 / fan in (He et al. 2015, arXiv:1502.01852), gains at one, shifts
    and biases at zero. For sizes see `resnet_classification`.
    """

    stem: NormalisedConvolution
    blocks: tuple[ResidualBlock, ...]
    last: MultilayerPerceptron
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        channels: tuple[int, ...],
        blocks: tuple[int, ...],
        bottleneck: bool,
        outputs: int,
        activation: Callable[[Array], Array],
        key: Key,
        zero_gain: bool = False,
    ) -> None:
        for name, numbers in (("channels", channels), ("blocks", blocks)):
            for number in numbers:
                check_integer("ResidualNetwork", name, number, hint=f"{name}=2")
        if len(channels) != len(blocks) or not blocks:
            raise ValueError(
                f"ResidualNetwork(channels={channels}, blocks={blocks}) must have one entry for "
                "each stage in both, and at least one; try channels=(64, 128), blocks=(2, 2)."
            )
        stem = _Sizes(channels[0], inputs, 3)
        plan = stem, list(_blocks(channels, blocks, bottleneck, 0.0 if zero_gain else 1.0))
        sizes, structure = jax.tree.flatten(plan, is_leaf=lambda leaf: isinstance(leaf, _Sizes))
        key, last_key = jax.random.split(key)
        weights = initial_weights([(s[0], s[1], s[2], s[2]) for s in sizes], key, 1.0)
        layers = map(_initial_layer, sizes, weights)
        self.stem, stages = jax.tree.unflatten(structure, layers)
        self.blocks = tuple(ResidualBlock(*block) for block in stages)
        width = channels[-1] * (EXPANSION if bottleneck else 1)
        self.last = MultilayerPerceptron(width, (), outputs, activation, last_key)
        self.activation = activation

    @property
    def layers(self) -> tuple[NormalisedConvolution, ...]:
        """All normalised layers, in the order in which a call normalises."""
        blocks = (layer for block in self.blocks for layer in (*block.body, *block.shortcut))
        return (self.stem, *blocks)

    def gains(self) -> Statistics:
        """Returns the gains of all layers."""
        return tuple(layer.gain for layer in self.layers)

    def __call__(self, images: Images, normalise: Normalise) -> Float[Array, "n outputs"]:
        """Returns the logits of each image; see `BatchNormNetwork` for `normalise`."""
        images = self.activation(self.stem(images, normalise))
        for block in self.blocks:
            images = block(images, normalise, self.activation)
        return jax.vmap(self.last)(jnp.mean(images, axis=(1, 2)))


class _Sizes(NamedTuple):
    """What a normalised convolution is made from."""

    outputs: int
    inputs: int
    kernel: int
    stride: int = 1
    gain: float = 1.0


def _blocks(
    channels: tuple[int, ...], blocks: tuple[int, ...], bottleneck: bool, last_gain: float
) -> Iterator[tuple[tuple[_Sizes, ...], tuple[_Sizes, ...]]]:
    """Yields the layers of body and shortcut of each block."""
    before = channels[0]
    for stage, (inside, number) in enumerate(zip(channels, blocks, strict=True)):
        after = inside * (EXPANSION if bottleneck else 1)
        for block in range(number):
            stride = 2 if stage > 0 and block == 0 else 1
            if bottleneck:
                hidden = [_Sizes(inside, before, 1), _Sizes(inside, inside, 3, stride)]
            else:
                hidden = [_Sizes(inside, before, 3, stride)]
            last = _Sizes(after, inside, 1 if bottleneck else 3, 1, last_gain)
            changes = stride > 1 or before != after
            shortcut = (_Sizes(after, before, 1, stride),) if changes else ()
            yield (*hidden, last), shortcut
            before = after


def _initial_layer(sizes: _Sizes, normal: Float[Array, "..."]) -> NormalisedConvolution:
    return NormalisedConvolution(
        weight=normal * (2 / math.prod(normal.shape[1:])) ** 0.5,
        gain=jnp.full(sizes.outputs, sizes.gain, normal.dtype),
        shift=jnp.zeros(sizes.outputs, normal.dtype),
        stride=sizes.stride,
    )


def resnet_classification(
    data: Data,
    depth: int | tuple[int, ...] = 18,
    channels: tuple[int, ...] = (64, 128, 256, 512),
    bottleneck: bool | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    augmentation: bool = False,
    zero_gain: bool = False,
) -> NetworkTask:
    """Returns classification by a residual network of a published depth, or of any other.

    Memory: one window of `TruncatedBackprop` over 20 steps of ResNet-50 at batch 128 on 32x32x3
    images in float32 needs about 16 GB besides the data with an optimizer without state, about
    20 GB with two accumulators per weight, and with `segments=4` about 15 and 17 GB, as XLA's
    analysis of compiled CPU programs estimates.

    Args:
        depth: 18, 34, 50, 101 or 152, or the number of blocks in each stage.
        channels: of each stage; bottleneck blocks have four times as many outside.
        bottleneck: whether blocks are 1x1, 3x3, 1x1 and not 3x3, 3x3; by default, from depth 50 on.
        activation: applied after the stem, within blocks and after each.
        batch_size: examples per step, at least 2; in inference, examples at once.
        momentum, epsilon: see `BatchNormNetwork`.
        augmentation: whether training images are cropped and flipped, see `crop_and_flip`.
        zero_gain: whether the last gain of each block starts at zero, so that every block starts
            as its shortcut (Goyal et al. 2017, arXiv:1706.02677).

    Example:
        >>> import jax, lopt
        >>> data = lopt.load_images("digits")
        >>> task = lopt.tasks.resnet_classification(data, (1, 1), channels=(8, 16))
        >>> params = task.init(jax.random.key(0))
        >>> [layer.weight.shape for layer in params.layers]
        [(8, 1, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3),
         (16, 8, 3, 3), (16, 16, 3, 3), (16, 8, 1, 1)]
    """
    if isinstance(depth, tuple):
        blocks, usual = depth, False
    elif depth in DEPTHS:
        blocks, usual = DEPTHS[depth]
    else:
        raise ValueError(
            f"resnet_classification(depth={depth!r}) must be one of {', '.join(map(str, DEPTHS))}, "
            "or the number of blocks in each stage; try depth=18 or depth=(2, 2, 2, 2)."
        )
    check_integer("resnet_classification", "batch_size", batch_size, 2, hint="batch_size=128")
    bottleneck = usual if bottleneck is None else bottleneck
    sizes = image_shape(data)[-1], channels, blocks, bottleneck, data.num_classes
    build = Build(ResidualNetwork, *sizes, activation, zero_gain=zero_gain)
    functions = ResidualNetwork.__call__, ResidualNetwork.gains
    network = BatchNormNetwork(build, *functions, momentum, epsilon, slice_size=batch_size)
    augment = _augment if augmentation else _keep
    return classification(data, network, batch_size, flatten=False, augment=augment)


def _augment(key: Key, example: Labelled) -> Labelled:
    return Labelled(crop_and_flip(key, example.images), example.labels)


def _keep(key: Key, example: Labelled) -> Labelled:
    return example  # the same key then draws the same rows with augmentation and without


def crop_and_flip(key: Key, image: Image) -> Image:
    """Returns a random crop of an image in a black frame, mirrored every other time.

    The frame is 4 pixels wide, and on images smaller than 32 an eighth of their side: moves of up
    to so many pixels in any direction, all equally likely. Mirroring is left to right.
    """
    *place_keys, flip_key = jax.random.split(key, 3)
    frame = [min(4, side // 8) for side in image.shape[:2]]
    padded = jnp.pad(image, [(width, width) for width in (*frame, 0)])
    places = [
        jax.random.randint(place_key, (), 0, 2 * width + 1)
        for place_key, width in zip(place_keys, frame, strict=True)
    ]
    image = jax.lax.dynamic_slice(padded, (*places, jnp.zeros_like(places[0])), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
