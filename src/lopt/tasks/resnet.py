"""Classification by residual networks of any size, from 8x8 digits to ResNet-50 on CIFAR-10.

What Zheng et al. 2022 (arXiv:2203.06578) meta-tune symbolic rules on. Running statistics are the
estimator's state, as in `lopt.tasks.batch_norm`: no optimizer ever sees them, and they travel
from window to window with the rest of an episode.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lopt.core.task import AbstractTask
from lopt.core.types import Key, Scalar, Split
from lopt.tasks.batch_norm import RunningStatistics, check_normalisation
from lopt.tasks.classification import cross_entropy, hit_rate
from lopt.tasks.data import ImageData, Images, Labelled
from lopt.tasks.ranges import check_count
from lopt.tasks.residual_network import ResidualNetwork, check_stages

# Blocks of each stage, and whether they are bottlenecks (He et al. 2015, table 1).
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class ResidualClassification(AbstractTask):
    """Classification of images by a `ResidualNetwork`, whose arrays are the parameters.

    In training, each layer is normalised by the moments of the batch, and running averages of them
    are kept: running' = momentum * running + (1 - momentum) * batch, from mean 0 and variance 1.
    In inference these are used. The loss is that of training; `logits` and `accuracy` are those of
    inference. Variances divide by the number of pixels of all examples.

    Attributes:
        data: the images, of any size.
        channels: of each stage; bottleneck blocks have four times as many outside.
        blocks: how many of them each stage has.
        bottleneck: whether blocks are 1x1, 3x3, 1x1 and not 3x3, 3x3.
        activation: applied after the stem, within blocks and after each.
        batch_size: examples per step; in inference, examples at once.
        momentum: of the running averages, per inner step.
        epsilon: added to variances.
        augmentation: whether training images are cropped and flipped, see `crop_and_flip`.
        zero_gain: whether the last gain of each block starts at zero.
    """

    data: ImageData
    channels: tuple[int, ...] = eqx.field(static=True, default=(64, 128, 256, 512))
    blocks: tuple[int, ...] = eqx.field(static=True, default=(2, 2, 2, 2))
    bottleneck: bool = eqx.field(static=True, default=False)
    activation: Callable[[Array], Array] = eqx.field(static=True, default=jax.nn.relu)
    batch_size: int = eqx.field(static=True, default=128)
    momentum: float = eqx.field(static=True, default=0.9)
    epsilon: float = eqx.field(static=True, default=1e-5)
    augmentation: bool = eqx.field(static=True, default=False)
    zero_gain: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_stages("ResidualClassification", self.channels, self.blocks)
        check_count("ResidualClassification", "batch_size", self.batch_size, 2, 128)
        check_normalisation("ResidualClassification", self.momentum, self.epsilon)

    def init(self, key: Key) -> ResidualNetwork:
        """Returns a new network."""
        return ResidualNetwork(
            self.data.image_shape[-1],
            self.channels,
            self.blocks,
            self.bottleneck,
            self.data.num_classes,
            self.activation,
            key,
            self.zero_gain,
        )

    def prepare(self, params: ResidualNetwork, key: Key) -> RunningStatistics:
        """Returns running means of zero and variances of one."""
        return RunningStatistics(
            mean=tuple(jnp.zeros_like(layer.gain) for layer in params.layers),
            variance=tuple(jnp.ones_like(layer.gain) for layer in params.layers),
        )

    def batch(self, key: Key, split: Split = "train") -> Labelled:
        """Returns `batch_size` examples, drawn with replacement; those to train on augmented."""
        draw_key, augmentation_key = jax.random.split(key)
        batch = self.data.split(split).draw(draw_key, self.batch_size)
        if not self.augmentation or split != "train":
            return batch
        keys = jax.random.split(augmentation_key, self.batch_size)
        return Labelled(jax.vmap(crop_and_flip)(keys, batch.images), batch.labels)

    def everything(self, split: Split = "train") -> Labelled:
        """Returns the whole split as one batch, for evaluation."""
        return self.data.split(split).everything()

    def loss_and_state(
        self, params: ResidualNetwork, state: RunningStatistics, batch: Labelled
    ) -> tuple[Scalar, RunningStatistics]:
        """Returns the mean cross entropy in training mode, and the next running statistics."""
        means, variances = [], []

        def moments(images: Images) -> tuple[Float[Array, " channel"], Float[Array, " channel"]]:
            means.append(batch.mean(jnp.mean(images, axis=(1, 2))))
            squares = (images - means[-1][None, None, None]) ** 2
            variances.append(batch.mean(jnp.mean(squares, axis=(1, 2))))
            return means[-1], variances[-1]

        logits = params(_like(params, batch.images), moments, self.epsilon)
        found = RunningStatistics(tuple(means), tuple(variances))
        state = optax.incremental_update(found, state, 1 - self.momentum)
        return cross_entropy(logits, batch), state

    def logits(
        self, params: ResidualNetwork, state: RunningStatistics, images: Images
    ) -> Float[Array, "n label"]:
        """Returns the logits of each image in inference mode, `batch_size` of them at once."""

        def logits(image: Float[Array, "height width channel"]) -> Float[Array, " label"]:
            kept = zip(state.mean, state.variance, strict=True)
            return params(image[None], lambda _: next(kept), self.epsilon)[0]

        # A whole test split in one piece would need far more memory than training.
        return jax.lax.map(logits, _like(params, images), batch_size=self.batch_size)

    def accuracy(
        self, params: ResidualNetwork, state: RunningStatistics, batch: Labelled
    ) -> Scalar:
        """Returns the share of images classified rightly in inference mode."""
        return hit_rate(self.logits(params, state, batch.images), batch)


def resnet_classification(
    data: ImageData,
    depth: int | tuple[int, ...] = 18,
    channels: tuple[int, ...] = (64, 128, 256, 512),
    bottleneck: bool | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    augmentation: bool = False,
    zero_gain: bool = False,
) -> ResidualClassification:
    """Returns classification by a residual network of a published depth, or of any other.

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
        batch_size: examples per step.
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
    return ResidualClassification(
        data,
        channels,
        blocks,
        usual if bottleneck is None else bottleneck,
        activation,
        batch_size,
        momentum,
        epsilon,
        augmentation,
        zero_gain,
    )


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


def _like(params: ResidualNetwork, images: Images) -> Images:
    """Returns images in the dtype of the parameters."""
    return images.astype(params.stem.weight.dtype)
