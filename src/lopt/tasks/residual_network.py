"""Residual networks with batch normalisation (He et al. 2015, arXiv:1512.03385).

In the form for small images: a 3x3 stem and no pooling before the blocks. The network maps a whole
batch, since that is what moments are taken of, and is told by its caller which moments to use.
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
from lopt.tasks.batch_norm import Moments, along_channels
from lopt.tasks.classification import MultilayerPerceptron, initial_weights
from lopt.tasks.data import Images

EXPANSION = 4  # a bottleneck block is so many times as wide outside as inside


def convolve(
    images: Float[Array, "n height width input"],
    weight: Float[Array, "output input kernel kernel"],
    stride: int,
) -> Float[Array, "n rows columns output"]:
    """Returns the convolution of images with zeros around them, at every `stride`-th pixel.

    y[i, j, o] = sum over a, b, c of weight[o, c, a, b] x[stride i + a - p, stride j + b - p, c]

    with p = (kernel - 1) // 2.
    """
    # A product of matrices, as in `lopt.tasks.convolutional`, and not XLA's convolution. Within
    # `lopt.unroll` on two CPU cores a step of ResNet-50 on a batch of 2 takes 1.8 s instead of
    # 12 s; one of four basic blocks (8 to 16 channels, 8x8 images, batch 32) takes half the time,
    # also with weights mapped over. Of the convolutions of ResNet-50 two thirds are 1x1, without
    # patches: its gradient at batch 128 needs 6.9 GB of temporary memory instead of 5.1 GB.
    height, width = images.shape[1:3]
    outputs, _, kernel, _ = weight.shape
    before = (kernel - 1) // 2
    ends = (before, kernel - 1 - before)
    padded = jnp.pad(images, ((0, 0), ends, ends, (0, 0)))
    rows = jnp.concatenate([padded[:, a : a + height : stride] for a in range(kernel)], axis=3)
    patches = jnp.concatenate([rows[:, :, b : b + width : stride] for b in range(kernel)], axis=3)
    return patches @ weight.transpose(3, 2, 1, 0).reshape(-1, outputs)


class NormalisedConvolution(eqx.Module):
    """A convolution without bias, then batch normalisation.

        y = gain (z - mean z) / sqrt(var z + epsilon) + shift,    z = weight * x

    Attributes:
        weight: of the convolution.
        gain, shift: of each output channel.
        stride: of the convolution.
    """

    weight: Float[Array, "output input kernel kernel"]
    gain: Float[Array, " output"]
    shift: Float[Array, " output"]
    stride: int = eqx.field(static=True)

    def __call__(
        self, images: Float[Array, "n height width input"], moments: Moments, epsilon: float
    ) -> Float[Array, "n rows columns output"]:
        """Returns the normalised outputs; `moments` says by which mean and variance."""
        outputs = convolve(images, self.weight, self.stride)
        mean, variance = moments(outputs)
        scale = self.gain * jax.lax.rsqrt(variance + epsilon)
        scale, mean, shift = (along_channels(part, 4) for part in (scale, mean, self.shift))
        return scale * (outputs - mean) + shift


class ResidualBlock(eqx.Module):
    """x to activation(body(x) + shortcut(x)), with activations between the layers of the body.

    Attributes:
        body: two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck block.
        shortcut: a 1x1 convolution where size or channels change, otherwise nothing: x itself.
    """

    body: tuple[NormalisedConvolution, ...]
    shortcut: tuple[NormalisedConvolution, ...]

    def __call__(
        self,
        images: Float[Array, "n height width input"],
        moments: Moments,
        epsilon: float,
        activation: Callable[[Array], Array],
    ) -> Float[Array, "n rows columns output"]:
        """Returns the outputs of the block."""
        *hidden, last = self.body
        inside = images
        for layer in hidden:
            inside = activation(layer(inside, moments, epsilon))
        inside = last(inside, moments, epsilon)
        for layer in self.shortcut:
            images = layer(images, moments, epsilon)
        return activation(inside + images)


class ResidualNetwork(eqx.Module):
    """A 3x3 stem, stages of residual blocks, the mean over all pixels, a linear layer.

    The first block of every stage but the first has stride 2, in a bottleneck block that of its
    3x3 convolution. Convolutions start normal with variance 2 / fan in (He et al. 2015,
    arXiv:1502.01852), gains at one, shifts and biases at zero.

    Attributes:
        stem: the first layer.
        blocks: those of all stages.
        last: the linear layer.
        activation: applied after the stem, within blocks and after each.
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
        """Draws the weights.

        Args:
            inputs: the number of channels of an image.
            channels: of each stage; bottleneck blocks have four times as many outside.
            blocks: how many of them each stage has.
            bottleneck: whether blocks are 1x1, 3x3, 1x1 and not 3x3, 3x3.
            outputs: the number of logits.
            activation: applied after the stem, within blocks and after each.
            key: of the weights.
            zero_gain: whether the last gain of each block starts at zero, so that every block
                starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677).

        Raises:
            ValueError: if a number is not positive, or `channels` and `blocks` differ in length.
        """
        for number in channels:
            check_integer("ResidualNetwork", "channels", number, hint="channels=64")
        for number in blocks:
            check_integer("ResidualNetwork", "blocks", number, hint="blocks=2")
        if len(channels) != len(blocks) or not blocks:
            fitting = tuple(64 * 2**stage for stage in range(max(1, len(blocks))))
            raise ValueError(
                f"ResidualNetwork(channels={channels}, blocks={blocks}) must have one entry for "
                f"each stage in both, and at least one; try channels={fitting}, "
                f"blocks={blocks or (2,)}."
            )
        stem = _Layer(channels[0], inputs, 3)
        plan = list(_plan(channels, blocks, bottleneck, 0.0 if zero_gain else 1.0))
        wanted = [stem, *(layer for body, shortcut in plan for layer in (*body, *shortcut))]
        shapes = [(one.outputs, one.inputs, one.kernel, one.kernel) for one in wanted]
        key, last_key = jax.random.split(key)
        normals = initial_weights("ResidualNetwork", shapes, key, 1.0)
        layers = iter([_initial_layer(*pair) for pair in zip(wanted, normals, strict=True)])
        self.stem = next(layers)
        self.blocks = tuple(
            ResidualBlock(
                body=tuple(next(layers) for _ in body),
                shortcut=tuple(next(layers) for _ in shortcut),
            )
            for body, shortcut in plan
        )
        width = channels[-1] * (EXPANSION if bottleneck else 1)
        self.last = MultilayerPerceptron(width, (), outputs, activation, last_key)
        self.activation = activation

    @property
    def layers(self) -> tuple[NormalisedConvolution, ...]:
        """All normalised layers, in the order in which a call asks for their moments."""
        blocks = (layer for block in self.blocks for layer in (*block.body, *block.shortcut))
        return (self.stem, *blocks)

    def __call__(
        self, images: Images, moments: Moments, epsilon: float
    ) -> Float[Array, "n outputs"]:
        """Returns the logits of each image.

        Args:
            images: in the dtype of the weights.
            moments: from the outputs of a convolution to the mean and variance of each channel to
                normalise by; called once for each layer, in the order of `layers`.
            epsilon: added to variances.
        """
        images = self.activation(self.stem(images, moments, epsilon))
        for block in self.blocks:
            images = block(images, moments, epsilon, self.activation)
        return jax.vmap(self.last)(jnp.mean(images, axis=(1, 2)))


class _Layer(NamedTuple):
    """What is to be built."""

    outputs: int
    inputs: int
    kernel: int
    stride: int = 1
    gain: float = 1.0


def _plan(
    channels: tuple[int, ...], blocks: tuple[int, ...], bottleneck: bool, last_gain: float
) -> Iterator[tuple[list[_Layer], list[_Layer]]]:
    """Yields body and shortcut of each block."""
    before = channels[0]
    for stage, (inside, number) in enumerate(zip(channels, blocks, strict=True)):
        after = inside * (EXPANSION if bottleneck else 1)
        for block in range(number):
            stride = 2 if stage > 0 and block == 0 else 1
            if bottleneck:
                body = [
                    _Layer(inside, before, 1),
                    _Layer(inside, inside, 3, stride),
                    _Layer(after, inside, 1, gain=last_gain),
                ]
            else:
                body = [
                    _Layer(inside, before, 3, stride),
                    _Layer(after, inside, 3, gain=last_gain),
                ]
            changes = stride > 1 or before != after
            yield body, [_Layer(after, before, 1, stride)] if changes else []
            before = after


def _initial_layer(
    layer: _Layer, normal: Float[Array, "output input kernel kernel"]
) -> NormalisedConvolution:
    return NormalisedConvolution(
        weight=normal * (2 / math.prod(normal.shape[1:])) ** 0.5,
        gain=jnp.full(layer.outputs, layer.gain, normal.dtype),
        shift=jnp.zeros(layer.outputs, normal.dtype),
        stride=layer.stride,
    )
