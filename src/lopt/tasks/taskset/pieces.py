"""What families of TaskSet share: activations, initial weights, and the data of a task."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Key
from lopt.tasks.data import Data
from lopt.tasks.taskset.config import Draw, Sampled, choice, drawn, drawn_after, known

# Sorted, as published samplers choose from sorted names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "cos": jnp.cos,
    "elu": jax.nn.elu,
    "leaky_relu1": functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
    "leaky_relu2": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
    "leaky_relu4": functools.partial(jax.nn.leaky_relu, negative_slope=0.4),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
}


def draw_activation(draw: Draw) -> str:
    """Samples the name of an activation."""
    return draw.choice(list(ACTIVATIONS), (1, 1, 1, 1, 1, 6, 1, 1, 3))


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the activation of that name."""
    return ACTIVATIONS[known("activation", name, ACTIVATIONS)]


def widths_of(counts: Sequence[int], low: int, high: int) -> Any:
    """A field of one of some numbers of layers, with a log-uniform width for each."""
    return drawn(
        lambda draw: tuple(draw.log_integer(low, high) for _ in range(draw.choice(counts)))
    )


INITIALIZERS = (
    *("glorot_normal", "glorot_uniform", "he_normal", "he_uniform"),
    *("orthogonal", "random_normal", "random_uniform", "truncated_normal", "variance_scaling"),
)
SCALELESS = INITIALIZERS[:4]


@dataclasses.dataclass(frozen=True)
class Initializer(Sampled):
    """How weights begin.

    Attributes:
        name: one of INITIALIZERS.
        scale: of those that have one; 1 for others.
        truncated: whether "truncated_normal" is cut at two standard deviations; as published it
            is a plain normal.
    """

    name: str = choice(*INITIALIZERS, weights=(2, 2, 2, 2, 1, 1, 1, 1, 1))
    scale: float = drawn_after(
        lambda draw, found: draw.log_uniform(0.1, 10) if found["name"] not in SCALELESS else 1.0
    )
    truncated: bool = drawn(lambda draw: draw.compat == "clean")

    def __post_init__(self) -> None:
        known("initializer", self.name, INITIALIZERS)

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Returns weights of shape (outputs, inputs ...), as Equinox lays them out."""
        own = jax.nn.initializers
        axes: Any = {"in_axis": tuple(range(1, len(shape))), "out_axis": 0}
        match self.name:
            case "random_uniform":
                return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)
            case "truncated_normal" if self.truncated:
                return self.scale * jax.random.truncated_normal(key, -2, 2, shape)
            case "random_normal" | "truncated_normal":
                return self.scale * jax.random.normal(key, shape)
            case "orthogonal":
                return own.orthogonal(self.scale, column_axis=0)(key, shape)
            case "variance_scaling":
                found = own.variance_scaling(self.scale, "fan_in", "truncated_normal", **axes)
            case _:
                found = getattr(own, self.name)(**axes)
        return found(key, shape)


def part_of(data: Data, train_examples: int | None, just_train: bool) -> Data:
    """Returns data with at most so many training examples, which may be all splits.

    Of a text, an example counts as many tokens as it is long.
    """
    if train_examples is not None:
        count = jnp.minimum(data.train.count, train_examples * (data.train.length or 1))
        data = eqx.tree_at(lambda data: data.train.count, data, count)
    return Data(*(data.train,) * 4, data.num_classes) if just_train else data
