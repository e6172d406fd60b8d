"""The coordinatewise LSTM: a small recurrent network that every coordinate runs on its own.

Andrychowicz et al. 2016 (arXiv:1606.04474), and with a layer in front and a bounded output RNNProp
(Lv et al. 2017, arXiv:1703.03633).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.learned import AbstractRule, Columns, Tensor
from lopt.core.types import Key, Theta
from lopt.learned.rules import check_inputs

Memory = tuple[tuple[Columns, Columns], ...]


class LSTM(AbstractRule):
    """LSTM cells, one after the other, between an optional layer with ELU and a linear output.

    Attributes:
        inputs: the number of features.
        hidden: the width of each cell.
        dense: the width of the layer in front, or 0 for none.
        squash: whether the output goes through tanh.
        biases: of each cell: 1, or 2 that add up, as cells of PyTorch have them.

    Weights and biases start uniform within 1 / sqrt(width) of a cell, or 1 / sqrt(inputs) of a
    layer. The memory is the output and the state of each cell, and starts at zero.
    """

    inputs: int = eqx.field(static=True)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(20, 20))
    dense: int = eqx.field(static=True, default=0)
    squash: bool = eqx.field(static=True, default=False)
    biases: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        for width in (self.inputs, *self.hidden, self.dense or 1):
            if width < 1:
                raise ValueError(f"{self}: every layer must have at least one unit.")
        if not self.hidden:
            raise ValueError("LSTM(hidden=()) must have at least one cell; try (20, 20).")
        if self.biases not in (1, 2):
            raise ValueError(f"LSTM(biases={self.biases}) must be 1 or 2.")

    def init(self, key: Key) -> Theta:
        """Returns `{"dense": {"w", "b"}, "cell0": {"w", "b"}, ..., "output": {"w", "b"}}`.

        Rows of a cell's weights are its input, forget, cell and output gates; columns its inputs,
        then its own last output.
        """
        keys = iter(jax.random.split(key, 2 * (len(self.hidden) + 2)))

        def uniform(shape: tuple[int, ...], fan: int) -> Tensor:
            return jax.random.uniform(next(keys), shape, minval=-1, maxval=1) / fan**0.5

        theta, width = {}, self.inputs
        if self.dense:
            shape = (self.dense, width)
            theta["dense"] = {"w": uniform(shape, width), "b": uniform(shape[:1], width)}
            width = self.dense
        for i, hidden in enumerate(self.hidden):
            bias = (self.biases, 4 * hidden) if self.biases > 1 else (4 * hidden,)
            weights = uniform((4 * hidden, width + hidden), hidden)
            theta[f"cell{i}"] = {"w": weights, "b": uniform(bias, hidden)}
            width = hidden
        theta["output"] = {"w": uniform((1, width), width), "b": uniform((1,), width)}
        return theta

    @override
    def begin(self, theta: Theta, shape: tuple[int, ...]) -> Memory:
        dtype = theta["output"]["b"].dtype
        zeros = [jnp.zeros((hidden, *shape), dtype) for hidden in self.hidden]
        return tuple((zero, zero) for zero in zeros)

    @override
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: Memory
    ) -> tuple[Columns, Memory]:
        check_inputs(self, self.inputs, columns, shared)
        shape = columns.shape[1:]
        common = shared.reshape(-1, *(1,) * len(shape))
        layer = jnp.concatenate([columns, jnp.broadcast_to(common, (len(shared), *shape))])
        if self.dense:
            layer = jax.nn.elu(affine(theta["dense"], layer))
        new = []
        for i, old in enumerate(memory):
            layer, cell = lstm_cell(theta[f"cell{i}"], layer, old)
            new.append((layer, cell))
        layer = affine(theta["output"], layer)
        return (jnp.tanh(layer) if self.squash else layer), tuple(new)


class Scaled(eqx.Module):
    """The update that is the only output times a multiplier."""

    multiplier: float = eqx.field(static=True, default=0.01)

    def __call__(self, outputs: Columns) -> Tensor:
        """Returns the update, which is added to the parameter."""
        (output,) = outputs
        return self.multiplier * output


def lstm_cell(
    theta: Theta, layer: Columns, memory: tuple[Columns, Columns]
) -> tuple[Columns, Columns]:
    """Returns the next output and state of an LSTM cell, features first in all arrays."""
    output, cell = memory
    into, forget, candidate, out = jnp.split(affine(theta, jnp.concatenate([layer, output])), 4)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(into) * jnp.tanh(candidate)
    return jax.nn.sigmoid(out) * jnp.tanh(cell), cell


def affine(theta: Theta, layer: Columns) -> Columns:
    """Returns w @ layer + b, features first; of several biases in rows, their sum."""
    bias = theta["b"] if theta["b"].ndim == 1 else theta["b"].sum(axis=0)
    product = jnp.tensordot(theta["w"], layer, axes=1)
    return product + bias.reshape(-1, *(1,) * (product.ndim - 1))
