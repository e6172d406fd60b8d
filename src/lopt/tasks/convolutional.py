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
    num_classes_of,
)
from lopt.tasks.data import Data
from lopt.tasks.network_task import Build, NetworkTask


class Convolution(eqx.Module):
    """A convolution of one image, channels last, padded with zeros to keep its size.

        y[i, j, o] = bias[o] + sum over a, b, c of weight[o, c, a, b] x[i + a - p, j + b - p, c]

    with p = (kernel - 1) // 2. It equals `jax.lax.conv_general_dilated(padding="SAME")`, but is a
    product of matrices: within a scan, where training takes place, XLA's convolution is several
    times slower on a CPU, the more so if weights are mapped over.

    Attributes:
        weight: in the layout of `equinox.nn.Conv2d`.
        bias: added to each output channel.
    """

    weight: Float[Array, "output input kernel kernel"]
    bias: Float[Array, " output"]

    def __call__(
        self, image: Float[Array, "height width input"]
    ) -> Float[Array, "height width output"]:
        """Returns the convolved image."""
        height, width, _ = image.shape
        outputs, _, kernel, _ = self.weight.shape
        before = (kernel - 1) // 2
        ends = (before, kernel - 1 - before)
        padded = jnp.pad(image, (ends, ends, (0, 0)))
        # All shifts in one direction, then in the other: 2 kernel slices instead of kernel^2.
        rows = jnp.concatenate([padded[a : a + height] for a in range(kernel)], axis=2)
        patches = jnp.concatenate([rows[:, b : b + width] for b in range(kernel)], axis=2)
        matrix = self.weight.transpose(3, 2, 1, 0).reshape(-1, outputs)
        return patches @ matrix + self.bias[None, None]


def max_pool(image: Float[Array, "height width channel"]) -> Float[Array, "rows columns channel"]:
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
    for convolutions; biases at zero.

    Attributes:
        convolutions: one per block.
        perceptron: from the last block's outputs to logits.
        image_shape: height, width and channels.
        activation: applied after each pooling and between the layers of the perceptron.
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
        """Draws the weights.

        Args:
            image_shape: height, width and channels.
            channels: the number of channels after each block, at least one block.
            kernel: height and width of the convolutions.
            hidden: the length of each hidden layer of the perceptron; may be empty.
            outputs: the number of logits.
            activation: applied after each pooling and between the layers of the perceptron.
            key: of the weights.
            stddev: of a normal to draw all weights from; by default it depends on the fan in.

        Raises:
            ValueError: if there is no block, the images are too small for so many, a number is
                not positive, or `stddev` negative.
        """
        check_integer("ConvolutionalNetwork", "kernel", kernel, hint="kernel=5")
        for number in channels:
            check_integer("ConvolutionalNetwork", "channels", number, hint="channels=32")
        height, width, inputs = image_shape
        possible = min(height, width).bit_length() - 1  # how often the sides can be halved
        if not 0 < len(channels) <= possible:
            raise ValueError(
                f"ConvolutionalNetwork(channels={channels}) must have at least one and at most "
                f"{possible} blocks, as each halves an image of {height} x {width}; try "
                "channels=(32,), larger images, or MultilayerPerceptron."
            )
        shapes = [
            (after, before, kernel, kernel)
            for before, after in itertools.pairwise((inputs, *channels))
        ]
        key, dense_key = jax.random.split(key)
        weights = initial_weights("ConvolutionalNetwork", shapes, key, stddev)
        self.convolutions = tuple(
            Convolution(weight, jnp.zeros(len(weight), weight.dtype)) for weight in weights
        )
        length = (height >> len(channels)) * (width >> len(channels)) * channels[-1]
        self.perceptron = MultilayerPerceptron(
            length, hidden, outputs, activation, dense_key, stddev
        )
        self.image_shape = image_shape
        self.activation = activation

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
        channels: the number of channels after each block of convolution, pooling, activation.
        kernel: height and width of the convolutions.
        hidden: the length of each hidden layer after the blocks; may be empty.
        activation: applied after each pooling and between the last layers.
        batch_size: examples per step.
        stddev: of a normal to draw all weights from (0.1 in the paper); by default it depends
            on the fan in.

    Example:
        >>> import jax, lopt
        >>> task = lopt.tasks.conv_classification(lopt.load_images("digits"), channels=(8, 8))
        >>> params = task.init(jax.random.key(0))
        >>> [convolution.weight.shape for convolution in params.convolutions]
        [(8, 1, 5, 5), (8, 8, 5, 5)]
    """
    blocks = image_shape(data), channels, kernel
    network = Build(
        ConvolutionalNetwork, *blocks, hidden, num_classes_of(data), activation, stddev=stddev
    )
    return classification(data, network, batch_size)
