"""A multilayer perceptron with batch normalisation (Ioffe and Szegedy 2015, arXiv:1502.03167).

The task with a state: running means and variances travel through inner training as the
estimator's state. They are plain arrays, which pass through scan, vmap and rematerialisation.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, Scalar, Split
from lopt.tasks.classification import (
    MultilayerPerceptron,
    check_uniform,
    cross_entropy,
    flatten_images,
    hit_rate,
)
from lopt.tasks.data import ImageData, Images, Labelled
from lopt.tasks.ranges import check_count

Statistics = tuple[Float[Array, " _"], ...]


class RunningStatistics(eqx.Module):
    """Moving averages of the moments of each hidden layer's inputs, one entry per layer."""

    mean: Statistics
    variance: Statistics


class BatchNormClassification(AbstractTask):
    """Classification by a multilayer perceptron whose hidden layers are normalised.

        layer(x) = activation(gain (z - mean z) / sqrt(var z + epsilon) + shift),    z = W x + b

    In training, mean and variance are those of the batch, and running averages of them are kept:
    running' = momentum * running + (1 - momentum) * batch, from mean 0 and variance 1. In
    inference the running averages are used. The loss is that of training; `logits` and `accuracy`
    are those of inference. Variances divide by the number of examples.

    Attributes:
        data: the images.
        widths: the length of each hidden layer, at least one.
        activation: applied after each normalisation.
        batch_size: examples per step.
        momentum: of the running averages, per inner step.
        epsilon: added to variances.
        uniform: how weights begin, see `mlp_classification`.
    """

    data: ImageData
    widths: tuple[int, ...] = eqx.field(static=True, default=(32,))
    activation: Callable[[Array], Array] = eqx.field(static=True, default=jax.nn.relu)
    batch_size: int = eqx.field(static=True, default=128)
    momentum: float = eqx.field(static=True, default=0.9)
    epsilon: float = eqx.field(static=True, default=1e-5)
    uniform: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_count("BatchNormClassification", "batch_size", self.batch_size, 2, 128)
        for width in self.widths:
            check_count("BatchNormClassification", "width", width, 1, 32)
        if not self.widths:
            raise ValueError(
                "BatchNormClassification(widths=()) must have a hidden layer to normalise; "
                "try widths=(32,), or mlp_classification."
            )
        check_uniform("BatchNormClassification", self.uniform, None)
        check_normalisation("BatchNormClassification", self.momentum, self.epsilon)

    def init(self, key: Key) -> Params:
        """Returns `{"network": ..., "gain": ..., "shift": ...}`, gains one and shifts zero."""
        network = MultilayerPerceptron(
            math.prod(self.data.image_shape),
            self.widths,
            self.data.num_classes,
            self.activation,
            key,
            uniform=self.uniform,
        )
        weights = [layer.weight for layer in network.layers[:-1]]
        return {
            "network": network,
            "gain": tuple(jnp.ones(len(weight), weight.dtype) for weight in weights),
            "shift": tuple(jnp.zeros(len(weight), weight.dtype) for weight in weights),
        }

    def prepare(self, params: Params, key: Key) -> RunningStatistics:
        """Returns running means of zero and variances of one."""
        return RunningStatistics(
            mean=tuple(jnp.zeros_like(gain) for gain in params["gain"]),
            variance=tuple(jnp.ones_like(gain) for gain in params["gain"]),
        )

    def batch(self, key: Key, split: Split = "train") -> Labelled:
        """Returns `batch_size` examples, drawn with replacement."""
        return self.data.split(split).draw(key, self.batch_size)

    def everything(self, split: Split = "train") -> Labelled:
        """Returns the whole split as one batch, for evaluation."""
        return self.data.split(split).everything()

    def loss_and_state(
        self, params: Params, state: RunningStatistics, batch: Labelled
    ) -> tuple[Scalar, RunningStatistics]:
        """Returns the mean cross entropy in training mode, and the next running statistics."""
        means, variances = [], []

        def moments(
            i: int, inputs: Float[Array, "n width"]
        ) -> tuple[Float[Array, " width"], Float[Array, " width"]]:
            mean = batch.mean(inputs)
            variance = batch.mean((inputs - mean[None]) ** 2)
            means.append(self._average(state.mean[i], mean))
            variances.append(self._average(state.variance[i], variance))
            return mean, variance

        logits = self._forward(params, batch.images, moments)
        return cross_entropy(logits, batch), RunningStatistics(tuple(means), tuple(variances))

    def logits(
        self, params: Params, state: RunningStatistics, images: Images
    ) -> Float[Array, "n label"]:
        """Returns the logits of each image in inference mode."""
        return self._forward(params, images, lambda i, _: (state.mean[i], state.variance[i]))

    def accuracy(self, params: Params, state: RunningStatistics, batch: Labelled) -> Scalar:
        """Returns the share of images classified rightly in inference mode."""
        return hit_rate(self.logits(params, state, batch.images), batch)

    def _average(
        self, old: Float[Array, " width"], new: Float[Array, " width"]
    ) -> Float[Array, " width"]:
        return self.momentum * old + (1 - self.momentum) * new

    def _forward(
        self, params: Params, images: Images, moments: Callable
    ) -> Float[Array, "n label"]:
        """Returns logits; `moments(i, z)` says with which mean and variance to normalise z."""
        *hidden, last = params["network"].layers
        rows = flatten_images(images, params)
        for i, layer in enumerate(hidden):
            rows = jax.vmap(layer)(rows)
            mean, variance = moments(i, rows)
            scale = params["gain"][i] * jax.lax.rsqrt(variance + self.epsilon)
            rows = self.activation((rows - mean[None]) * scale[None] + params["shift"][i][None])
        return jax.vmap(last)(rows)


def check_normalisation(owner: str, momentum: float, epsilon: float) -> None:
    """Refuses a momentum of running averages, or an epsilon, that is out of range."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"{owner}(momentum={momentum!r}) must be at least 0 and below 1; try momentum=0.9."
        )
    if not epsilon > 0:
        raise ValueError(f"{owner}(epsilon={epsilon!r}) must be positive; try epsilon=1e-5.")
