"""Classification of images by a convolutional network.

The default sizes are those of the CIFAR-10 network in Wu et al. 2018 (arXiv:1803.02021): three
blocks of a 5x5 convolution, pooling and ReLU, then 1024-100-10; 182,838 weights for 32x32x3.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer
from lopt.core.types import Key
from lopt.tasks.classification import (
    Init,
    MultilayerPerceptron,
    classification,
    image_shape,
    initial_weights,
)
from lopt.tasks.data import Data, Image, Images
from lopt.tasks.network_task import Augment, Build, NetworkTask

Padding: TypeAlias = Literal["SAME", "VALID"]
Pool: TypeAlias = Literal["mean", "max", "squared_mean"]


def convolve(
    images: Images,
    weight: Float[Array, "output channel kernel kernel"],
    stride: int,
    padding: Padding = "SAME",
) -> Float[Array, "n rows columns output"]:
    """Returns the convolution of images, at every `stride`-th pixel.

    y[i, j, o] = sum over a, b, c of weight[o, c, a, b] x[stride i + a - p, stride j + b - p, c]

    With "SAME" padding there are zeros around images and p = (kernel - 1) // 2. With "VALID" p = 0,
    and outputs that would need a pixel outside are left out.
    """
    # A product of matrices, and not XLA's convolution. Within `lopt.unroll` on two CPU cores a
    # step of ResNet-50 on a batch of 2 takes 1.8 s instead of 12 s, one of four small blocks half
    # the time, also with weights mapped over. The gradient of ResNet-50 at batch 128 needs 6.9 GB
    # of temporary memory instead of 5.1 GB: two thirds of its convolutions are 1x1. For 3x3 kernels
    # at batches of 16 and 64 on images of 16 and 32 pixels, with a busy second core, value and both
    # gradients took 7 to 50 times as long in XLA's, with either stride and padding.
    outputs, _, kernel, _ = weight.shape
    before = (kernel - 1) // 2
    ends = (before, kernel - 1 - before) if padding == "SAME" else (0, 0)
    padded = jnp.pad(images, ((0, 0), ends, ends, (0, 0)))
    height, width = (length - kernel + 1 for length in padded.shape[1:3])
    # All shifts in one direction, then in the other: 2 kernel slices instead of kernel^2.
    rows = jnp.concatenate([padded[:, a : a + height : stride] for a in range(kernel)], axis=3)
    patches = jnp.concatenate([rows[:, :, b : b + width : stride] for b in range(kernel)], axis=3)
    return patches @ weight.transpose(3, 2, 1, 0).reshape(-1, outputs)


def remaining(side: int, kernel: int, stride: int, padding: Padding) -> int:
    """Returns how many rows a convolution leaves of `side`; 0 where an image is too small."""
    return max(0, -(-(side - (0 if padding == "SAME" else kernel - 1)) // stride))


class Convolution(eqx.Module):
    """A convolution of one image, see `convolve`; weights are laid out as by Equinox."""

    weight: Float[Array, "output input kernel kernel"]
    bias: Float[Array, " output"] | None
    stride: int = eqx.field(static=True, default=1)
    padding: Padding = eqx.field(static=True, default="SAME")

    def __call__(self, image: Image) -> Float[Array, "rows columns output"]:
        """Returns the convolved image."""
        outputs = convolve(image[None], self.weight, self.stride, self.padding)[0]
        return outputs if self.bias is None else outputs + self.bias[None, None]


def max_pool(image: Image) -> Float[Array, "rows columns channel"]:
    """Returns the maximum of each 2x2 square; an odd last row or column is left out.

    Where several pixels are the maximum, they share the derivative equally. All derivatives are
    elementwise, unlike those of `jax.lax.reduce_window`.
    """
    rows, columns = (length // 2 for length in image.shape[:2])
    squares = image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, -1)
    return jnp.max(squares, axis=(1, 3))


def pool(image: Image, kind: Pool) -> Float[Array, " channel"]:
    """Returns the mean, the maximum or the mean square of each channel."""
    if kind == "max":
        return jnp.max(image, axis=(0, 1))
    return jnp.mean(image**2 if kind == "squared_mean" else image, axis=(0, 1))


class ConvolutionalNetwork(eqx.Module):
    """Convolutions, then a multilayer perceptron.

    By default each convolution is followed by 2x2 max-pooling and the activation. With `strides`,
    one for each convolution, there is no such pooling. `pool_all` gives the perceptron one number
    per channel: its mean, maximum or mean square over the image.

    Weights start as those of a `MultilayerPerceptron`, with fan in = input channels * kernel^2
    for convolutions; biases at zero. For sizes see `conv_classification`.
    """

    convolutions: tuple[Convolution, ...]
    perceptron: MultilayerPerceptron
    image_shape: tuple[int, ...] = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)
    halve: bool = eqx.field(static=True)
    pool_all: Pool | None = eqx.field(static=True)

    def __init__(
        self,
        image_shape: tuple[int, ...],
        channels: tuple[int, ...],
        kernel: int,
        hidden: tuple[int, ...],
        outputs: int,
        activation: Callable[[Array], Array],
        key: Key,
        stddev: float | None = None,
        init: Init = "truncated_normal",
        strides: tuple[int, ...] | None = None,
        padding: tuple[Padding, ...] | None = None,
        pool_all: Pool | None = None,
        bias: bool = True,
    ) -> None:
        check_integer("ConvolutionalNetwork", "kernel", kernel, hint="kernel=5")
        for name, numbers in (("channels", channels), ("strides", strides or ())):
            for number in numbers:
                check_integer("ConvolutionalNetwork", name, number, hint=f"{name}=2")
        height, width, inputs = image_shape
        possible = min(height, width).bit_length() - 1  # how often the sides can be halved
        if not 0 < len(channels) <= (possible if strides is None else len(channels)):
            raise ValueError(
                f"ConvolutionalNetwork(channels={channels}) must have at least one and at most "
                f"{possible} blocks, as each halves an image of {height} x {width}; try (32,)."
            )
        self.halve, self.pool_all = strides is None, pool_all
        same: tuple[Padding, ...] = tuple("SAME" for _ in channels)
        steps = strides or (1,) * len(channels)
        ends = same if padding is None else padding
        if not len(steps) == len(ends) == len(channels):
            raise ValueError(
                f"ConvolutionalNetwork(channels={channels}, strides={steps}, padding={ends}) must "
                f"have one entry for each convolution in all; try padding={same}."
            )
        for stride, end in zip(steps, ends, strict=True):
            sides = (remaining(side, kernel, stride, end) for side in (height, width))
            height, width = (side // 2 if self.halve else side for side in sides)
        if min(height, width) < 1:
            raise ValueError(
                f"ConvolutionalNetwork(strides={steps}, padding={ends}) leaves nothing of an image "
                f"of {image_shape[0]} x {image_shape[1]}; try padding={same}."
            )
        key, dense_key = jax.random.split(key)
        sizes = itertools.pairwise((inputs, *channels))
        shapes = [(after, before, kernel, kernel) for before, after in sizes]
        weights = initial_weights(shapes, key, stddev, init)
        self.convolutions = tuple(
            Convolution(weight, jnp.zeros(len(weight), weight.dtype) if bias else None, stride, end)
            for weight, stride, end in zip(weights, steps, ends, strict=True)
        )
        self.image_shape, self.activation = image_shape, activation
        length = channels[-1] * (1 if pool_all else height * width)
        dense = length, hidden, outputs, activation
        self.perceptron = MultilayerPerceptron(*dense, dense_key, stddev, init)

    def __call__(self, pixels: Float[Array, " pixels"]) -> Float[Array, " outputs"]:
        """Returns the logits of one flattened image, its channels last."""
        image = pixels.reshape(self.image_shape)
        for convolution in self.convolutions:
            image = convolution(image)
            image = self.activation(max_pool(image) if self.halve else image)
        pooled = pool(image, self.pool_all) if self.pool_all else image.reshape(-1)
        return self.perceptron(pooled)


def conv_classification(
    data: Data,
    channels: tuple[int, ...] = (32, 32, 64),
    kernel: int = 5,
    hidden: tuple[int, ...] = (100,),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    stddev: float | None = None,
    augment: Augment | None = None,
    centre: bool = False,
    **options: Any,
) -> NetworkTask:
    """Returns classification by a convolutional network.

    Other arguments are those of `mlp_classification`.

    Args:
        channels: the number of channels after each block of convolution, pooling, activation.
        kernel: height and width of the convolutions.
        hidden: the length of each hidden layer after the blocks; may be empty.
        activation: applied after each pooling and between the last layers.
        stddev: of all weights, 0.1 in the paper.
        options: others of `ConvolutionalNetwork`: init, strides, padding, pool_all, bias.
    """
    sizes = image_shape(data), channels, kernel, hidden, data.num_classes
    network = Build(ConvolutionalNetwork, *sizes, activation, stddev=stddev, **options)
    return classification(data, network, batch_size, True, augment, centre)
