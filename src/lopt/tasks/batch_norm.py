"""Batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167): networks with a state."""

import math
import operator
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.checks import check_integer, check_positive
from lopt.core.types import Key, Params
from lopt.tasks.classification import Init, MultilayerPerceptron, classification, image_shape
from lopt.tasks.data import Data, Rows
from lopt.tasks.network_task import AbstractNetwork, Build, NetworkTask

Statistics: TypeAlias = tuple[Float[Array, " _"], ...]
# (values with channels last, gain, shift) to values normalised in each channel.
Normalise: TypeAlias = Callable[[Array, Array, Array], Float[Array, "n ... channel"]]

_GAINS = operator.itemgetter("gain")


class RunningStatistics(eqx.Module):
    """Moving averages of the moments of what each layer normalises, one entry per layer."""

    mean: Statistics
    variance: Statistics


class BatchNormNetwork(AbstractNetwork):
    """A network whose layers are normalised by means and variances of their channels.

    In training they are those of the batch, and running averages of them are kept:
    running' = momentum * running + (1 - momentum) * batch, from mean 0 and variance 1. In
    inference the running averages are used. Variances divide by the number of examples, times
    that of pixels.

        normalise(z, gain, shift) = gain (z - mean z) / sqrt(var z + epsilon) + shift

    Attributes:
        build: from a key to parameters.
        forward: (params, inputs, normalise) to outputs; calls `normalise` once a layer.
        gains: from parameters to the gain of each layer, in the order of these calls.
        momentum: of the running averages, per inner step.
        epsilon: added to variances.
        slice_size: how many examples are seen at once in inference; None for all.
    """

    build: Callable[[Key], Params] = eqx.field(static=True)
    forward: Callable[[Params, Array, Normalise], Array] = eqx.field(static=True)
    gains: Callable[[Params], Statistics] = eqx.field(static=True)
    momentum: float = eqx.field(static=True, default=0.9)
    epsilon: float = eqx.field(static=True, default=1e-5)
    slice_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"BatchNormNetwork(momentum={self.momentum}) must be in [0, 1); try 0.9."
            )
        check_positive("BatchNormNetwork", "epsilon", self.epsilon, hint="epsilon=1e-5")

    @override
    def init(self, key: Key) -> Params:
        return self.build(key)

    @override
    def prepare(self, params: Params) -> RunningStatistics:
        gains = self.gains(params)
        return RunningStatistics(
            tuple(map(jnp.zeros_like, gains)), tuple(map(jnp.ones_like, gains))
        )

    @override
    def apply(
        self, params: Params, state: RunningStatistics, inputs: Rows, inference: bool
    ) -> tuple[Array, RunningStatistics]:
        if inference:
            return self._infer(params, state, inputs.arrays), state
        moments = []

        def normalise(values: Array, gain: Array, shift: Array) -> Array:
            pixels = tuple(range(1, values.ndim - 1))
            mean = inputs.mean(jnp.mean(values, axis=pixels))
            squares = (values - jnp.broadcast_to(mean, values.shape)) ** 2
            moments.append((mean, inputs.mean(jnp.mean(squares, axis=pixels))))
            return self._normalised(values, gain, shift, *moments[-1])

        outputs = self.forward(params, inputs.arrays, normalise)
        found = RunningStatistics(*zip(*moments, strict=True))
        return outputs, optax.incremental_update(found, state, 1 - self.momentum)

    def _infer(self, params: Params, state: RunningStatistics, inputs: Array) -> Array:
        def outputs(inputs: Array) -> Array:
            kept = zip(state.mean, state.variance, strict=True)
            return self.forward(
                params, inputs, lambda *layer: self._normalised(*layer, *next(kept))
            )

        if self.slice_size is None:
            return outputs(inputs)
        # A whole test split in one piece would need far more memory than training.
        return jax.lax.map(lambda one: outputs(one[None])[0], inputs, batch_size=self.slice_size)

    def _normalised(self, values: Array, gain: Array, shift: Array, *moments: Array) -> Array:
        mean, variance = moments
        scale = gain * jax.lax.rsqrt(variance + self.epsilon)
        scale, mean, shift = (jnp.broadcast_to(part, values.shape) for part in (scale, mean, shift))
        return scale * (values - mean) + shift


def batch_norm_classification(
    data: Data,
    widths: tuple[int, ...] = (32,),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    init: Init = "truncated_normal",
) -> NetworkTask:
    """Returns classification by a multilayer perceptron whose hidden layers are normalised.

        layer(x) = activation(gain (z - mean z) / sqrt(var z + epsilon) + shift),    z = W x + b

    Parameters are `{"network": ..., "gain": ..., "shift": ...}`, gains one and shifts zero at
    first. The training loss normalises by the batch, metrics by running averages.

    For `momentum` and `epsilon` see `BatchNormNetwork`; other arguments are those of
    `mlp_classification`. There is at least one hidden layer, and a batch of 2.
    """
    check_integer("batch_norm_classification", "batch_size", batch_size, 2, hint="batch_size=128")
    if not widths:
        raise ValueError(
            "batch_norm_classification(widths=()) must have a hidden layer to normalise; "
            "try widths=(32,), or mlp_classification."
        )
    sizes = math.prod(image_shape(data)), widths, data.num_classes
    build = Build(_with_gains, Build(MultilayerPerceptron, *sizes, activation, init=init))
    network = BatchNormNetwork(build, _forward, _GAINS, momentum, epsilon)
    return classification(data, network, batch_size)


def _with_gains(perceptron: Build, key: Key) -> Params:
    network = perceptron(key)
    gain = tuple(jnp.ones_like(layer.bias) for layer in network.layers[:-1])
    return {"network": network, "gain": gain, "shift": tuple(map(jnp.zeros_like, gain))}


def _forward(
    params: Params, rows: Float[Array, "n input"], normalise: Normalise
) -> Float[Array, "n output"]:
    """Returns logits of flattened images."""
    network = params["network"]
    *hidden, last = network.layers
    for layer, gain, shift in zip(hidden, params["gain"], params["shift"], strict=True):
        rows = network.activation(normalise(jax.vmap(layer)(rows), gain, shift))
    return jax.vmap(last)(rows)
