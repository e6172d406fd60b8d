"""Classification by a small vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.checks import check_integer
from lopt.core.types import Key
from lopt.tasks.classification import classification, image_shape
from lopt.tasks.data import Data, Image
from lopt.tasks.language import Block, initial_blocks, normalise
from lopt.tasks.network_task import Build, NetworkTask


class VisionTransformer(eqx.Module):
    """From an image to logits: patches, blocks that all see each other, the mean over patches."""

    embedding: Float[Array, "width pixels"]
    positions: Float[Array, "patches width"]
    outputs: Float[Array, "classes width"]
    blocks: tuple[Block, ...]
    scale: Float[Array, " width"]
    shift: Float[Array, " width"]
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        key: Key,
    ) -> None:
        height, breadth, channels = shape
        count = (height // patch) * (breadth // patch)
        ends = [(width, patch**2 * channels), (count, width), (classes, width)]
        drawn, self.blocks = initial_blocks(
            "VisionTransformer", ends, width, depth, heads, key, causal=False
        )
        self.embedding, self.positions, self.outputs = drawn
        dtype = self.outputs.dtype
        self.scale, self.shift, self.patch = jnp.ones(width, dtype), jnp.zeros(width, dtype), patch

    def __call__(self, image: Image) -> Float[Array, " classes"]:
        """Returns the logits of one image."""
        size, (height, breadth, channels) = self.patch, image.shape
        rows = image.reshape(height // size, size, breadth // size, size, channels)
        patches = rows.swapaxes(1, 2).reshape(len(self.positions), -1)
        values = patches.astype(self.embedding.dtype) @ self.embedding.T + self.positions
        for block in self.blocks:
            values = block(values)
        return self.outputs @ jnp.mean(normalise(values, self.scale, self.shift), axis=0)


def vit_classification(
    data: Data,
    patch: int | None = None,
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
    batch_size: int = 128,
) -> NetworkTask:
    """Returns classification by a small vision transformer.

    Args:
        data: the images.
        patch: pixels along each side of a patch, a divisor of those of the image; by default a
            quarter, so that there are 16 patches.
        width: the length of the vectors that stand for a patch; a multiple of `heads`.
        depth: the number of blocks of attention and a perceptron.
        heads: the number of attention heads.
        batch_size: examples per step.
    """
    shape = image_shape(data)
    size = max(1, shape[0] // 4) if patch is None else patch
    check_integer("vit_classification", "patch", size, hint="patch=2")
    if shape[0] % size or shape[1] % size:
        raise ValueError(
            f"vit_classification(patch={size}) must divide images of {shape[0]} x {shape[1]} "
            "pixels; try patch=1."
        )
    network = Build(VisionTransformer, shape, data.num_classes, size, width, depth, heads)
    return classification(data, network, batch_size, flatten=False)
