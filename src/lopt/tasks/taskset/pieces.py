"""What families of TaskSet share: activations, initial weights, and the data of a task."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Key
from lopt.tasks.taskset.config import Draw, known

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


def draw_widths(draw: Draw, counts: Sequence[int], low: int, high: int) -> tuple[int, ...]:
    """Samples the number of layers, then a log-uniform width for each."""
    return tuple(draw.log_integer(low, high) for _ in range(draw.choice(counts)))


INITIALIZERS = (
    *("glorot_normal", "glorot_uniform", "he_normal", "he_uniform"),
    *("orthogonal", "random_normal", "random_uniform", "truncated_normal", "variance_scaling"),
)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """How weights begin.

    Attributes:
        name: one of INITIALIZERS.
        scale: of those that have one; 1 for others.
        truncated: whether "truncated_normal" is cut at two standard deviations; as published it
            is a plain normal.
    """

    name: str
    scale: float
    truncated: bool

    def __post_init__(self) -> None:
        known("initializer", self.name, INITIALIZERS)

    @classmethod
    def draw(cls, draw: Draw) -> "Initializer":
        """Samples an initializer."""
        name = draw.choice(INITIALIZERS, (2, 2, 2, 2, 1, 1, 1, 1, 1))
        scale = 1.0 if name in INITIALIZERS[:4] else draw.log_uniform(0.1, 10)
        return cls(name, scale, draw.compat == "clean")

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Returns weights of shape (outputs, inputs ...), as Equinox lays them out."""
        own = jax.nn.initializers
        axes: Any = {"in_axis": tuple(range(1, len(shape))), "out_axis": 0}
        match self.name.split("_"):
            case ["he", "normal"]:
                found = own.he_normal(**axes)
            case ["he", "uniform"]:
                found = own.he_uniform(**axes)
            case ["glorot", "normal"]:
                found = own.glorot_normal(**axes)
            case ["glorot", "uniform"]:
                found = own.glorot_uniform(**axes)
            case ["variance", "scaling"]:
                found = own.variance_scaling(self.scale, "fan_in", "truncated_normal", **axes)
            case ["orthogonal"]:
                found = own.orthogonal(self.scale, column_axis=0)
            case ["random", "uniform"]:
                return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale)
            case ["truncated", "normal"] if self.truncated:
                return self.scale * jax.random.truncated_normal(key, -2, 2, shape)
            case _:
                found = own.normal(self.scale)
        return found(key, shape)
