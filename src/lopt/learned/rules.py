"""Rules from the features of one coordinate to the outputs that make its update.

The multilayer perceptron of Metz et al. (arXiv:1810.10180, arXiv:2203.11860), and the step from its
two outputs, a direction and a log magnitude.
"""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.learned import AbstractRule, Columns, Tensor
from lopt.core.types import Key, State, Theta

Layers = list[tuple[Tensor, Tensor]]
# Perceptrons of at most so many weights are faster without products of matrices.
SMALL = 512


class MLP(AbstractRule):
    """A multilayer perceptron with ReLU between its layers.

    Attributes:
        inputs: the number of features.
        hidden: the width of each hidden layer.
        outputs: the number of outputs.

    Weights start truncated normal, at two standard deviations of 1 / sqrt(fan in); biases at zero.
    """

    inputs: int = eqx.field(static=True)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(32, 32))
    outputs: int = eqx.field(static=True, default=2)

    def __check_init__(self) -> None:
        for width in self._sizes():
            if width < 1:
                raise ValueError(f"{self}: every layer must have at least one unit.")

    def _sizes(self) -> tuple[int, ...]:
        return (self.inputs, *self.hidden, self.outputs)

    def _is_small(self) -> bool:
        return sum(n * m for n, m in itertools.pairwise(self._sizes())) <= SMALL

    def init(self, key: Key) -> Theta:
        """Returns `{"w0": (hidden, inputs), "b0": (hidden,), "w1": ...}`, outputs first."""
        theta: dict[str, Tensor] = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(self._sizes())):
            normal = jax.random.truncated_normal(
                jax.random.fold_in(key, i), -2.0, 2.0, (fan_in, fan_out)
            )
            theta |= {f"w{i}": normal.T / fan_in**0.5, f"b{i}": jnp.zeros(fan_out)}
        return theta

    @override
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        check_inputs(self, self.inputs, columns, shared)
        layers = [(theta[f"w{i}"], theta[f"b{i}"]) for i in range(len(self.hidden) + 1)]
        # What all coordinates share is multiplied once and joins the bias.
        own, common = theta["w0"][:, : len(columns)], theta["w0"][:, len(columns) :].T
        layers[0] = own, theta["b0"] + shared @ common
        # Many small tensors, end to end, would make a loop of their own for each tensor.
        apply = _as_sums if self._is_small() and columns.ndim > 2 else _as_products
        return apply(layers, columns), memory


def check_inputs(
    rule: AbstractRule, inputs: int, columns: Columns, shared: Float[Array, " shared"]
) -> None:
    """Refuses a number of features other than `inputs`."""
    given = len(columns) + len(shared)
    if given != inputs:
        raise ValueError(
            f"{rule} was given {len(columns)} + {len(shared)} features; try inputs={given}."
        )


def _as_products(layers: Layers, columns: Columns) -> Columns:
    """Returns the outputs of a perceptron, layer by layer."""
    layer = columns.reshape(len(columns), -1)
    for i, (weights, bias) in enumerate(layers):
        layer = weights @ (jax.nn.relu(layer) if i else layer) + bias[:, None]
    return layer.reshape(-1, *columns.shape[1:])


@jax.custom_jvp
def _as_sums(layers: Layers, columns: Columns) -> Columns:
    """Returns the same, written out for each unit: one loop, in which all layers are registers."""
    units = list(columns)
    for i, (weights, bias) in enumerate(layers):
        units = [jnp.maximum(unit, jnp.zeros((), unit.dtype)) for unit in units] if i else units
        rows = zip(weights, bias, strict=True)
        units = [sum((w * x for w, x in zip(row, units, strict=True)), b) for row, b in rows]
    return jnp.stack(units)


@_as_sums.defjvp
def _(primals: Any, tangents: Any) -> tuple[Columns, Columns]:
    # Sums would take minutes to compile here, and their derivative no longer fits into registers.
    return jax.jvp(_as_products, primals, tangents)


class DirectionMagnitude(eqx.Module):
    """The step -d exp(exp_multiplier * m) * step_multiplier of the first outputs, d and m."""

    exp_multiplier: float = eqx.field(static=True, default=0.001)
    step_multiplier: float = eqx.field(static=True, default=0.001)

    def __call__(self, outputs: Columns) -> Tensor:
        """Returns the update, which is added to the parameter."""
        direction, magnitude = outputs[:2]
        return -direction * jnp.exp(magnitude * self.exp_multiplier) * self.step_multiplier
