"""Which examples a task sees: families that differ in their data, by windows on shared arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import SPLITS, Key
from lopt.tasks.classification import Classification
from lopt.tasks.data import Examples, ImageData
from lopt.tasks.ranges import check_count


class DataSubset(AbstractTaskFamily):
    """Tasks that train on few examples: a window of the training split, at a random place.

    Other splits stay whole. The images are not copied.

    Attributes:
        family: any family of tasks on images, such as a `Classification`.
        size: the number of training examples that each task may draw.
    """

    family: AbstractTaskFamily
    size: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_count("DataSubset", "size", self.size, 1, 100)
        for data in image_data_within("DataSubset", self.family):
            # Inside a compiled function the count may be unknown; `draw` then keeps to it.
            if not isinstance(data.train.count, jax.core.Tracer) and self.size > data.train.count:
                raise ValueError(
                    f"DataSubset(size={self.size}) must not exceed the {data.train.count} examples "
                    f"of the training split; try size={data.train.count}."
                )

    def draw(self, key: Key) -> AbstractTask:
        """Returns a task of `family` that sees `size` training examples."""
        task_key, place_key = jax.random.split(key)

        def narrow(leaf: object) -> object:
            if not isinstance(leaf, ImageData):
                return leaf
            size = jnp.minimum(jnp.asarray(self.size, jnp.int32), leaf.train.count)
            first = leaf.train.first + _below(place_key, leaf.train.count - size + 1)
            window = first, size
            return eqx.tree_at(lambda d: (d.train.first, d.train.count), leaf, window)

        return jax.tree.map(narrow, self.family.draw(task_key), is_leaf=_is_image_data)


class Choice(AbstractTaskFamily):
    """One of several classification tasks on different data, each as likely as the others.

    Their images are joined once; a draw chooses the window of one task. They must agree in
    everything but data: image shape, number of classes, network and batch size.

    Attributes:
        joined: the tasks' common network, on the joined images.
        first, count: the windows of each task, in the order of `lopt.core.types.SPLITS`.
    """

    joined: Classification
    first: Int[Array, "split task"]
    count: Int[Array, "split task"]

    def __init__(self, tasks: tuple[Classification, ...]) -> None:
        """Joins the tasks' images.

        Args:
            tasks: at least one.

        Raises:
            ValueError: if there is none, or they differ in more than data.
        """
        if not tasks:
            raise ValueError("Choice(tasks=()) must have at least one task to choose from.")
        for task in tasks[1:]:
            _check_alike(tasks[0], task)
        first, count, splits = [], [], []
        for name in SPLITS:
            parts = [task.data.split(name) for task in tasks]
            lengths = jnp.array([len(part.labels) for part in parts], jnp.int32)
            first.append(jnp.cumsum(lengths) - lengths + jnp.stack([part.first for part in parts]))
            count.append(jnp.stack([part.count for part in parts]))
            # Until a task is drawn the window is that of the smallest, for checks to go by.
            smallest = jnp.argmin(count[-1])
            splits.append(
                Examples(
                    jnp.concatenate([part.images for part in parts]),
                    jnp.concatenate([part.labels for part in parts]),
                    first[-1][smallest],
                    count[-1][smallest],
                )
            )
        train, valid_inner, valid_outer, test = splits
        classes = tasks[0].data.num_classes
        data = ImageData(train, valid_inner, valid_outer, test, classes)
        self.joined = eqx.tree_at(lambda task: task.data, tasks[0], data)
        self.first, self.count = jnp.stack(first), jnp.stack(count)

    def draw(self, key: Key) -> Classification:
        """Returns one of the tasks."""
        which = _below(key, jnp.asarray(self.first.shape[1], jnp.int32))
        windows = [*self.first[:, which], *self.count[:, which]]
        return eqx.tree_at(
            lambda task: [
                *(task.data.split(name).first for name in SPLITS),
                *(task.data.split(name).count for name in SPLITS),
            ],
            self.joined,
            windows,
        )


def image_data_within(owner: str, family: AbstractTaskFamily) -> list[ImageData]:
    """Returns all image data within a family.

    Raises:
        ValueError: if there is none.
    """
    leaves = jax.tree.leaves(family, is_leaf=_is_image_data)
    found = [leaf for leaf in leaves if _is_image_data(leaf)]
    if not found:
        raise ValueError(
            f"{owner}(family={type(family).__name__}(...)) must be a family of tasks on images; "
            "try a Classification."
        )
    return found


def _below(key: Key, count: Int[Array, ""]) -> Int[Array, ""]:
    """Returns a random integer from 0 to count - 1."""
    bits = jax.random.bits(key, (), jnp.uint32)
    return jax.lax.rem(bits, count.astype(jnp.uint32)).astype(jnp.int32)


def _is_image_data(leaf: object) -> bool:
    return isinstance(leaf, ImageData)


def _check_alike(one: Classification, other: Classification) -> None:
    """Raises ValueError if two tasks differ in more than data."""
    for what, left, right in (
        ("image shape", one.data.image_shape, other.data.image_shape),
        ("num_classes", one.data.num_classes, other.data.num_classes),
        ("batch_size", one.batch_size, other.batch_size),
        ("network", one.network, other.network),
    ):
        if left != right:
            raise ValueError(
                f"Choice(tasks) have different {what}, {left} and {right}; must be equal, try "
                "building them with the same arguments but for the data."
            )
