"""Examples that do not fit into memory: the host reads them when a step draws them."""

import hashlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree
from typing_extensions import override

from lopt.core.types import Key
from lopt.tasks.data import AbstractExamples, Data, Rows
from lopt.tasks.ranges import random_index


class _Reader:
    """Reads rows of a source by their place in an order."""

    def __init__(self, source: Any, order: np.ndarray) -> None:
        self.source, self.order = source, order
        self.shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, source[int(order[0])]))

    def __repr__(self) -> str:
        """Tells sources apart, by some of their examples."""
        rows = self.order[:: -(-len(self.order) // 16)]
        found = hashlib.sha256()
        for leaf in jax.tree.leaves([self.source[int(row)] for row in rows]):
            found.update(np.ascontiguousarray(leaf).tobytes())
        return f"{type(self.source).__name__} of {len(self.order)}, {found.hexdigest()[:16]}"

    def __call__(self, places: Int[Array, "..."]) -> PyTree:
        rows = self.order[np.asarray(places)]
        examples = [self.source[int(row)] for row in rows.ravel()]

        def stack(like: jax.ShapeDtypeStruct, *parts: Any) -> np.ndarray:
            return np.stack(parts).astype(like.dtype).reshape(*rows.shape, *like.shape)

        return jax.tree.map(stack, self.shapes, *examples)


class StreamedExamples(AbstractExamples):
    """The places first, ..., first + count - 1 of a source on the host, in a shuffled order.

    Tasks are judged on batches of them, and a step waits until its batch is read.
    """

    read: _Reader = eqx.field(static=True)
    first: Int[Array, ""]
    count: Int[Array, ""]
    length: None = eqx.field(static=True, default=None)

    @property
    def arrays(self) -> PyTree:
        """The shapes and dtypes that arrays of all examples would have."""
        return self._shapes(len(self.read.order))

    def _shapes(self, count: int) -> PyTree:
        return jax.tree.map(
            lambda like: jax.ShapeDtypeStruct((count, *like.shape), like.dtype), self.read.shapes
        )

    @override
    def draw(self, key: Key, size: int) -> Rows:
        places = random_index(key, self.count, (size,)) + self.first
        return Rows(
            jax.pure_callback(self.read, self._shapes(size), places, vmap_method="expand_dims")
        )

    @override
    def everything(self) -> None:
        return None


def streamed_data(source: Any, seed: int = 0, num_classes: int | None = None) -> Data:
    """Returns data that stays where it is, in splits 70 : 10 : 10 : 10.

    Args:
        source: has a length, and gives an example for each index, the same one each time: a pytree
            of arrays of one shape, such as `lopt.tasks.Labelled`. A `grain.MapDataset`, which
            reads files and transforms what it reads, or a list. A source that is random shall
            derive its randomness from the index.
        seed: of the shuffle before parting.
        num_classes: of labelled data.

    Example:
        >>> import jax, numpy as np, lopt
        >>> source = [{"x": np.full(3, i, np.float32)} for i in range(50)]
        >>> data = lopt.tasks.streamed_data(source)
        >>> data.train.draw(jax.random.key(0), 8).arrays["x"].shape
        (8, 3)
    """
    if len(source) < 10:
        raise ValueError(
            f"streamed_data(source of {len(source)} examples) must have at least 10, one in each "
            "split; try more."
        )
    order = np.random.default_rng(seed).permutation(len(source))
    read, tenth = _Reader(source, order), len(order) // 10
    counts = jnp.array([len(order) - 3 * tenth, tenth, tenth, tenth], jnp.int32)
    windows = zip(jnp.cumsum(counts) - counts, counts, strict=True)
    splits = (StreamedExamples(read=read, first=first, count=n) for first, n in windows)
    train, valid_inner, valid_outer, test = splits
    return Data(train, valid_inner, valid_outer, test, num_classes)
