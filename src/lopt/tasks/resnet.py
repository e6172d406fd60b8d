"""Classification by residual networks of any size, from 8x8 digits to ResNet-50 on CIFAR-10.

What Zheng et al. 2022 (arXiv:2203.06578) meta-tune symbolic rules on. Running statistics are the
task's estimator state, as in `lopt.tasks.batch_norm`: no optimizer ever sees them, and they travel
from window to window with the rest of an episode.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer
from lopt.core.types import Key
from lopt.tasks.batch_norm import BatchNormNetwork, Moments, Statistics
from lopt.tasks.classification import CrossEntropy, image_shape, num_classes_of
from lopt.tasks.data import Data, Images, Labelled
from lopt.tasks.network_task import Build, NetworkTask
from lopt.tasks.residual_network import ResidualNetwork

# Blocks of each stage, and whether they are bottlenecks (He et al. 2015, table 1).
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


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

    Layers are normalised as in `batch_norm_classification`.

    Memory: one window of `TruncatedBackprop` over 20 steps of ResNet-50 at batch 128 on 32x32x3
    images in float32 needs about 16 GB besides the data with an optimizer without state, about
    20 GB with two accumulators per weight, and with `segments=4` about 15 and 17 GB. This is an
    estimate from XLA's analysis of compiled CPU programs (`memory_analysis`): the gradient of one
    step needs 6.9 GB; of ResNet-14 with the same stages, (1, 1, 1, 1) bottlenecks, a window was
    found to need 2.03 times the gradient of one step, and for each step another training state,
    which of ResNet-50 is 94 MB of weights and as much for each accumulator.

    Args:
        data: the images, of any size.
        depth: 18, 34, 50, 101 or 152, or the number of blocks in each stage.
        channels: of each stage; bottleneck blocks have four times as many outside.
        bottleneck: whether blocks are 1x1, 3x3, 1x1 and not 3x3, 3x3; by default, from depth 50 on.
        activation: applied after the stem, within blocks and after each.
        batch_size: examples per step, at least 2; in inference, examples at once.
        momentum: of the running averages, per inner step.
        epsilon: added to variances.
        augmentation: whether training images are cropped and flipped, see
            `lopt.tasks.resnet.crop_and_flip`.
        zero_gain: whether the last gain of each block starts at zero.

    Raises:
        ValueError: if the depth is none of these, or a number is out of its range.

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
            f"resnet_classification(depth={depth!r}) must be one of "
            f"{', '.join(map(str, DEPTHS))}, or the number of blocks in each stage; "
            "try depth=18 or depth=(2, 2, 2, 2)."
        )
    check_integer("resnet_classification", "batch_size", batch_size, 2, hint="batch_size=128")
    build = Build(
        ResidualNetwork,
        image_shape(data)[-1],
        channels,
        blocks,
        usual if bottleneck is None else bottleneck,
        num_classes_of(data),
        activation,
        zero_gain=zero_gain,
    )
    network = BatchNormNetwork(build, _forward, _gains, momentum, epsilon, slice_size=batch_size)
    objective = CrossEntropy(num_classes_of(data), flatten=False)
    augment = _augmented if augmentation else _unchanged
    return NetworkTask(data, network, objective, batch_size, augment)


def _forward(
    params: ResidualNetwork, images: Images, moments: Moments, epsilon: float
) -> Float[Array, "n label"]:
    return params(images, moments, epsilon)


def _gains(params: ResidualNetwork) -> Statistics:
    return tuple(layer.gain for layer in params.layers)


def _augmented(key: Key, example: Labelled) -> Labelled:
    return Labelled(crop_and_flip(key, example.images), example.labels)


def _unchanged(key: Key, example: Labelled) -> Labelled:
    """Returns the example; the same key then draws the same rows with augmentation and without."""
    return example


def crop_and_flip(
    key: Key, image: Float[Array, "height width channel"]
) -> Float[Array, "height width channel"]:
    """Returns a random crop of an image in a black frame, mirrored every other time.

    The frame is 4 pixels wide, and on images smaller than 32 an eighth of their side: moves of up
    to so many pixels in any direction, all equally likely. Mirroring is left to right.
    """
    row_key, column_key, flip_key = jax.random.split(key, 3)
    frame = [min(4, side // 8) for side in image.shape[:2]]
    padded = jnp.pad(image, [(width, width) for width in (*frame, 0)])
    places = [
        jax.random.randint(place_key, (), 0, 2 * width + 1)
        for place_key, width in zip((row_key, column_key), frame, strict=True)
    ]
    image = jax.lax.dynamic_slice(padded, (*places, jnp.zeros_like(places[0])), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
