"""What families of TaskSet share: activations, initial weights, and the data of a task."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Key
from lopt.tasks.taskset.config import Draw

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "cos": jnp.cos,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.swish,
    "leaky_relu4": functools.partial(jax.nn.leaky_relu, negative_slope=0.4),
    "leaky_relu2": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
    "leaky_relu1": functools.partial(jax.nn.leaky_relu, negative_slope=0.1),
}


def draw_activation(draw: Draw) -> str:
    """Samples the name of an activation."""
    return draw.choice(list(ACTIVATIONS), (6, 3, 1, 1, 1, 1, 1, 1, 1))


INITIALIZERS = (
    *("he_normal", "he_uniform", "glorot_normal", "glorot_uniform"),
    *("orthogonal", "random_uniform", "random_normal", "truncated_normal", "variance_scaling"),
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
