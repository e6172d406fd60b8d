"""Multilayer perceptrons of many kinds in one compiled program."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key, Params, State
from lopt.tasks.classification import MultilayerPerceptron, classification, image_shape
from lopt.tasks.data import Data, Rows
from lopt.tasks.network_task import AbstractNetwork, Build, NetworkTask
from lopt.tasks.ranges import random_index

Activation = Callable[[Array], Array]


class MaskedPerceptron(AbstractNetwork):
    """A perceptron of which `widths` hidden units count, with one of several activations.

    It is the narrow network: others are zero, with zero gradients. Mapped over, all activations are
    computed.

    Attributes:
        build: from a key to a `MultilayerPerceptron` of the largest widths.
        activations: to choose from.
        which: the index of the one that is used.
        widths: how many units of each hidden layer count.
    """

    build: Callable[[Key], MultilayerPerceptron] = eqx.field(static=True)
    activations: tuple[Activation, ...] = eqx.field(static=True)
    which: Int[Array, ""]
    widths: Int[Array, " layers"]

    @override
    def init(self, key: Key) -> Params:
        layers = []
        narrow: Array | None = None  # the units before a layer that count
        for i, layer in enumerate(self.build(key).layers):
            weight = layer.weight
            if narrow is not None:
                # Standard deviations go by the inputs that count.
                fan_in = jnp.sqrt(narrow.size / jnp.sum(narrow)).astype(weight.dtype)
                weight = weight * fan_in * narrow[None]
            if i < len(self.widths):
                narrow = self._mask(i, len(weight)).astype(weight.dtype)
                weight = weight * narrow[:, None]
            layers.append((weight, layer.bias))
        return tuple(layers)

    @override
    def apply(
        self, params: Params, state: State, inputs: Rows, inference: bool
    ) -> tuple[Float[Array, "n outputs"], State]:
        hidden = inputs.arrays
        for i, (weight, bias) in enumerate(params):
            hidden = hidden @ weight.T + bias[None]
            if i < len(self.widths):
                active = jax.lax.switch(self.which, self.activations, hidden)
                hidden = jnp.where(self._mask(i, len(bias))[None], active, 0)
        return hidden, state

    def _mask(self, layer: int, size: int) -> Array:
        return jnp.arange(size, dtype=jnp.int32) < self.widths[layer]


class MLPFamily(AbstractTaskFamily):
    """Classification by perceptrons that differ in widths and activation.

    All are one compiled program, as large as the largest. Initial and input scales, subsets of the
    data, labels and batches are drawn by augmentations around it.

    Attributes:
        data: the images.
        widths: the largest length of each hidden layer.
        activations: of which each task has one, all alike.
        smallest: the least length of a hidden layer; lengths are log-uniform.
        batch_size: examples per step.
    """

    data: Data
    widths: tuple[int, ...] = eqx.field(static=True, default=(32,))
    activations: tuple[Activation, ...] = eqx.field(static=True, default=(jax.nn.relu, jnp.tanh))
    smallest: int = eqx.field(static=True, default=4)
    batch_size: int = eqx.field(static=True, default=128)

    def __check_init__(self) -> None:
        if not self.activations or not self.widths:
            raise ValueError("MLPFamily must have activations and widths; try (jax.nn.relu,).")
        most = min(self.widths)
        check_integer("MLPFamily", "smallest", self.smallest, most=most, hint="smallest=4")

    @override
    def draw(self, key: Key) -> NetworkTask:
        which_key, width_key = jax.random.split(key)
        which = random_index(which_key, jnp.asarray(len(self.activations), jnp.int32))
        share = jax.random.uniform(width_key, (len(self.widths),))
        largest = jnp.asarray(self.widths, share.dtype)
        widths = jnp.round(self.smallest * (largest / self.smallest) ** share).astype(jnp.int32)
        size = math.prod(image_shape(self.data))
        build = Build(MultilayerPerceptron, size, self.widths, self.data.num_classes, jax.nn.relu)
        network = MaskedPerceptron(build, self.activations, which, widths)
        return classification(self.data, network, self.batch_size)
