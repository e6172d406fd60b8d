"""Classification of images by a convolutional network.

The default sizes are those of the CIFAR-10 network in Wu et al. 2018 (arXiv:1803.02021): three
blocks of a 5x5 convolution, pooling and ReLU, then 1024-100-10; 182,838 weights for 32x32x3.
"""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer
from lopt.core.types import Key
from lopt.tasks.classification import (
    MultilayerPerceptron,
    classification,
    image_shape,
    initial_weights,
)
from lopt.tasks.data import Data, Image, Images
from lopt.tasks.network_task import Build, NetworkTask


def convolve(
    images: Images, weight: Float[Array, "output channel kernel kernel"], stride: int
) -> Float[Array, "n rows columns output"]:
    """Returns the convolution of images with zeros around them, at every `stride`-th pixel.

    y[i, j, o] = sum over a, b, c of weight[o, c, a, b] x[stride i + a - p, stride j + b - p, c]

    with p = (kernel - 1) // 2.
    """
    # A product of matrices, and not XLA's convolution. Within `lopt.unroll` on two CPU cores a
    # step of ResNet-50 on a batch of 2 takes 1.8 s instead of 12 s, one of four small blocks half
    # the time, also with weights mapped over. The gradient of ResNet-50 at batch 128 needs 6.9 GB
    # of temporary memory instead of 5.1 GB: two thirds of its convolutions are 1x1.
    height, width = images.shape[1:3]
    outputs, _, kernel, _ = weight.shape
    before = (kernel - 1) // 2
    ends = (before, kernel - 1 - before)
    padded = jnp.pad(images, ((0, 0), ends, ends, (0, 0)))
    # All shifts in one direction, then in the other: 2 kernel slices instead of kernel^2.
    rows = jnp.concatenate([padded[:, a : a + height : stride] for a in range(kernel)], axis=3)
    patches = jnp.concatenate([rows[:, :, b : b + width : stride] for b in range(kernel)], axis=3)
    return patches @ weight.transpose(3, 2, 1, 0).reshape(-1, outputs)


class Convolution(eqx.Module):
    """A convolution of one image, see `convolve`; weights are laid out as by Equinox."""

    weight: Float[Array, "output input kernel kernel"]
    bias: Float[Array, " output"]

    def __call__(self, image: Image) -> Float[Array, "height width output"]:
        """Returns the convolved image."""
        return convolve(image[None], self.weight, 1)[0] + self.bias[None, None]


def max_pool(image: Image) -> Float[Array, "rows columns channel"]:
    """Returns the maximum of each 2x2 square; an odd last row or column is left out.

    Where several pixels are the maximum, they share the derivative equally. All derivatives are
    elementwise, unlike those of `jax.lax.reduce_window`.
    """
    rows, columns = (length // 2 for length in image.shape[:2])
    squares = image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, -1)
    return jnp.max(squares, axis=(1, 3))


class ConvolutionalNetwork(eqx.Module):
    """Blocks of convolution, 2x2 max-pooling and activation, then a multilayer perceptron.

    Weights start as those of a `MultilayerPerceptron`, with fan in = input channels * kernel^2
    for convolutions; biases at zero. For sizes see `conv_classification`.
    """

    convolutions: tuple[Convolution, ...]
    perceptron: MultilayerPerceptron
    image_shape: tuple[int, ...] = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

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
    ) -> None:
        check_integer("ConvolutionalNetwork", "kernel", kernel, hint="kernel=5")
        for number in channels:
            check_integer("ConvolutionalNetwork", "channels", number, hint="channels=32")
        height, width, inputs = image_shape
        possible = min(height, width).bit_length() - 1  # how often the sides can be halved
        if not 0 < len(channels) <= possible:
            raise ValueError(
                f"ConvolutionalNetwork(channels={channels}) must have at least one and at most "
                f"{possible} blocks, as each halves an image of {height} x {width}; try (32,)."
            )
        key, dense_key = jax.random.split(key)
        sizes = itertools.pairwise((inputs, *channels))
        shapes = [(after, before, kernel, kernel) for before, after in sizes]
        self.convolutions = tuple(
            Convolution(weight, jnp.zeros(len(weight), weight.dtype))
            for weight in initial_weights(shapes, key, stddev)
        )
        length = (height >> len(channels)) * (width >> len(channels)) * channels[-1]
        dense = length, hidden, outputs, activation
        self.perceptron = MultilayerPerceptron(*dense, dense_key, stddev)
        self.image_shape, self.activation = image_shape, activation

    def __call__(self, pixels: Float[Array, " pixels"]) -> Float[Array, " outputs"]:
        """Returns the logits of one flattened image, its channels last."""
        image = pixels.reshape(self.image_shape)
        for convolution in self.convolutions:
            image = self.activation(max_pool(convolution(image)))
        return self.perceptron(image.reshape(-1))


def conv_classification(
    data: Data,
    channels: tuple[int, ...] = (32, 32, 64),
    kernel: int = 5,
    hidden: tuple[int, ...] = (100,),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    stddev: float | None = None,
) -> NetworkTask:
    """Returns classification by a convolutional network.

    Args:
        data: the images.
        batch_size: examples per step.
        channels: the number of channels after each block of convolution, pooling, activation.
        kernel: height and width of the convolutions.
        hidden: the length of each hidden layer after the blocks; may be empty.
        activation: applied after each pooling and between the last layers.
        stddev: of a normal to draw all weights from (0.1 in the paper); by default it depends
            on the fan in.
    """
    sizes = image_shape(data), channels, kernel, hidden, data.num_classes
    network = Build(ConvolutionalNetwork, *sizes, activation, stddev=stddev)
    return classification(data, network, batch_size)
