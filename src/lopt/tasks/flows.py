"""Normalising flows of images: densities by maps to a standard normal, and their Jacobians.

RealNVP is Dinh et al. 2016 (arXiv:1605.08803), the masked autoregressive flow is Papamakarios et
al. 2017 (arXiv:1705.07057). Both scale and shift some values by functions of others.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lopt.core.checks import check_integer
from lopt.core.types import Key, Scalar
from lopt.tasks.autoencoding import flatten
from lopt.tasks.classification import Init, MultilayerPerceptron, image_shape
from lopt.tasks.data import Data, Rows
from lopt.tasks.network_task import Augment, Build, EquinoxNetwork, NetworkTask, Predict
from lopt.tasks.ranges import check_scale

FlowKind: TypeAlias = Literal["real_nvp", "autoregressive"]
LOG_SCALES = -5, 3  # the range that logarithms of scales are clipped to


class Flow(eqx.Module):
    """Layers x to (x - shift(x)) exp(-log_scale(x)), fixed permutations between them.

    Behind the last layer is a standard normal. Jacobians are triangular: in RealNVP the first half
    of values stays, and tells how the second is changed; in an autoregressive flow all values
    before one tell how it is changed, as weights are masked (Germain et al. 2015,
    arXiv:1502.03509). For `quirks` see `normalising_flow`.
    """

    networks: tuple[MultilayerPerceptron, ...]
    kind: FlowKind = eqx.field(static=True)
    quirks: bool = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        kind: FlowKind,
        widths: tuple[int, ...],
        layers: int,
        activation: Callable[[Array], Array],
        key: Key,
        init: Init,
        quirks: bool,
    ) -> None:
        check_integer("Flow", "layers", layers, hint="layers=4")
        self.kind, self.quirks = kind, quirks
        inputs, outputs = (dims // 2, dims - dims // 2) if kind == "real_nvp" else (dims, dims)
        self.networks = tuple(
            MultilayerPerceptron(inputs, widths, 2 * outputs, activation, key, init=init)
            for key in jax.random.split(key, layers)
        )

    def transform(
        self, values: Float[Array, " dims"]
    ) -> tuple[Float[Array, " dims"], Float[Array, ""]]:
        """Returns what values are mapped to, and the log determinant of the map's Jacobian."""
        log_determinant = jnp.zeros((), values.dtype)
        for i, network in enumerate(self.networks):
            if i:
                order = np.random.RandomState(i - 1).permutation(len(values))
                values = values.at[order].get(unique_indices=True, mode="promise_in_bounds")
            shift, log_scale = self._shift_and_log_scale(network, values)
            values = (values - shift) * jnp.exp(-log_scale)
            log_determinant = log_determinant - jnp.sum(log_scale)
        return values, log_determinant

    def _shift_and_log_scale(
        self, network: MultilayerPerceptron, values: Float[Array, " dims"]
    ) -> tuple[Float[Array, " dims"], Float[Array, " dims"]]:
        if self.kind == "real_nvp":
            half = len(values) // 2
            both = jnp.pad(network(values[:half]).reshape(2, -1), ((0, 0), (half, 0)))
            return both[0], both[1] if self.quirks else jnp.clip(both[1], *LOG_SCALES)
        masks = _masks(len(values), [len(layer.weight) for layer in network.layers[:-1]])
        masks[-1] &= not self.quirks
        layers = zip(masks, network.layers, strict=True)
        weights = [jnp.where(mask, layer.weight, 0) for mask, layer in layers]
        network = eqx.tree_at(lambda n: [layer.weight for layer in n.layers], network, weights)
        shift, log_scale = network(values).reshape(2, -1)
        return shift, jnp.clip(log_scale, *LOG_SCALES)

    def __call__(self, values: Float[Array, " dims"]) -> Float[Array, ""]:
        """Returns the logarithm of the density."""
        values, log_determinant = self.transform(values)
        return log_determinant - jnp.sum(values**2 + math.log(2 * math.pi)) / 2


def _masks(dims: int, widths: list[int]) -> list[Bool[np.ndarray, "output input"]]:
    # A unit of degree d sees the first d values, and the i-th output those before the i-th.
    places = np.arange(dims) + 1
    degrees = [places, *(np.arange(width) * (dims - 1) // width + 1 for width in widths)]
    hidden = [after[:, None] >= before[None] for before, after in itertools.pairwise(degrees)]
    return [*hidden, np.tile(places[:, None] > degrees[-1][None], (2, 1))]


class NegativeLogDensity(eqx.Module):
    """The objective of flows: "loss", the mean of -log p over noisy images.

    Attributes:
        noise: the standard deviation of what is added to pixels, as without it densities of images
            have no bound.
    """

    noise: float = eqx.field(static=True, default=0.01)

    def __check_init__(self) -> None:
        check_scale("NegativeLogDensity", "noise", self.noise)

    def __call__(self, predict: Predict, rows: Rows) -> dict[str, Scalar]:
        """Returns the loss of a network on a batch."""
        pixels = flatten(rows)
        noise = self.noise * jax.random.normal(rows.key, pixels.shape, pixels.dtype)
        return {"loss": -rows.mean(predict(pixels + noise))}


def normalising_flow(
    data: Data,
    kind: FlowKind = "real_nvp",
    widths: tuple[int, ...] = (64,),
    layers: int = 4,
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    init: Init = "truncated_normal",
    augment: Augment | None = None,
    noise: float = 0.01,
    quirks: bool = False,
) -> NetworkTask:
    """Returns density estimation of images by RealNVP or a masked autoregressive flow.

    Other arguments are those of `mlp_classification`, of the perceptron in each layer.

    Args:
        data: images of at least two pixels.
        kind: "real_nvp" or "autoregressive", see `Flow`.
        layers: the number of layers of the flow.
        noise: the standard deviation of what is added to pixels.
        quirks: whether as in TaskSet. There scales of RealNVP have no bounds, so that more losses
            overflow. As masks of layers narrower than the image leave no weight, its
            autoregressive flows scale and shift each pixel by constants.
    """
    sizes = math.prod(image_shape(data)), kind, widths, layers, activation
    network = EquinoxNetwork(Build(Flow, *sizes, init=init, quirks=quirks))
    return NetworkTask(data, network, NegativeLogDensity(noise), batch_size, augment, True)
