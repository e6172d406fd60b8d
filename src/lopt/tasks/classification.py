"""Classification of images by any network, and the multilayer perceptron in particular."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt.core.checks import check_integer, is_real
from lopt.core.types import Key, Scalar
from lopt.tasks.data import Data, Rows
from lopt.tasks.network_task import (
    AnyNetwork,
    Augment,
    Build,
    EquinoxNetwork,
    NetworkTask,
    Predict,
    as_network,
)
from lopt.tasks.ranges import check_scale

# From a key and a shape (outputs, inputs ...) to the weights of a layer.
Initialise: TypeAlias = Callable[[Key, tuple[int, ...]], Float[Array, "..."]]
Init: TypeAlias = Literal["truncated_normal", "torch"] | Initialise


class MultilayerPerceptron(eqx.Module):
    """A multilayer perceptron; with no hidden layers, a linear map.

    Biases start at zero and weights normal: of standard deviation `stddev`, or by default of
    1 / sqrt(fan in), cut at two of them. With `init="torch"` both start as in PyTorch, uniform
    between -1 and 1 over sqrt(fan in). Any other `init` is called with a key and a shape.

    With `layer_norm`, hidden layers are normalised before the activation (Ba et al. 2016,
    arXiv:1607.06450). Called with a key, hidden units are dropped after it with probability
    `dropout`, and others divided by 1 - dropout (Srivastava et al. 2014).
    """

    layers: tuple[eqx.nn.Linear, ...]
    norms: tuple[eqx.nn.LayerNorm, ...]
    activation: Callable[[Array], Array] = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        widths: tuple[int, ...],
        outputs: int,
        activation: Callable[[Array], Array],
        key: Key,
        stddev: float | None = None,
        init: Init = "truncated_normal",
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        for width in widths:
            check_integer("MultilayerPerceptron", "width", width, hint="width=32")
        for name, size in (("inputs", inputs), ("outputs", outputs)):
            check_integer("MultilayerPerceptron", name, size, hint=f"{name}=10")
        check_scale("MultilayerPerceptron", "stddev", 0.0 if stddev is None else stddev)
        alone = init == "torch" or callable(init)
        if not (alone or init == "truncated_normal") or (alone and stddev is not None):
            said = f"MultilayerPerceptron(init={init!r}, stddev={stddev})"
            raise ValueError(
                f'{said} needs "truncated_normal", or "torch" or a function and no stddev; '
                "try stddev=None."
            )
        if not is_real(dropout) or not 0 <= dropout < 1:
            raise ValueError(
                f"MultilayerPerceptron(dropout={dropout!r}) must be a share, at least 0 and less "
                "than 1; try 0.5."
            )
        sizes = list(itertools.pairwise((inputs, *widths, outputs)))
        self.activation, self.dropout = activation, dropout
        self.norms = tuple(map(eqx.nn.LayerNorm, widths)) if layer_norm else ()
        if init == "torch":
            keys = jax.random.split(key, len(sizes))
            self.layers = tuple(eqx.nn.Linear(*s, key=k) for s, k in zip(sizes, keys, strict=True))
        else:
            shapes = [(after, before) for before, after in sizes]
            weights = initial_weights(shapes, key, stddev, init)
            self.layers = tuple(map(_linear, weights))

    def __call__(
        self, inputs: Float[Array, " inputs"], key: Key | None = None
    ) -> Float[Array, " outputs"]:
        """Returns the outputs for one input; units are dropped only if there is a key."""
        for i, layer in enumerate(self.layers[:-1]):
            inputs = layer(inputs)
            inputs = self.activation(self.norms[i](inputs) if self.norms else inputs)
            if key is not None and self.dropout:
                chance = 1 - self.dropout
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), chance, inputs.shape)
                inputs = jnp.where(kept, inputs / (1 - self.dropout), 0)
        return self.layers[-1](inputs)


def initial_weights(
    shapes: Sequence[tuple[int, ...]],
    key: Key,
    stddev: float | None,
    init: Init = "truncated_normal",
) -> list[Float[Array, "output ..."]]:
    """Draws the weights of layers, of shape (outputs, what each of them is a sum over ...).

    They are normal with standard deviation `stddev`; by default with 1 / sqrt(fan in), cut at two
    of them, which leaves 0.88 / sqrt(fan in). A function `init` draws them instead.
    """
    if callable(init):
        keys = jax.random.split(key, len(shapes))
        return [init(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    # One flat draw for all layers: every further one costs as much compilation again.
    if stddev is None:
        flat = jax.random.truncated_normal(key, -2, 2, (ends[-1],))
    else:
        flat = stddev * jax.random.normal(key, (ends[-1],))
    parts = jnp.split(flat, ends[:-1])
    weights = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if stddev is not None:
        return weights
    return [weight / math.prod(weight.shape[1:]) ** 0.5 for weight in weights]


def _linear(weight: Float[Array, "output input"]) -> eqx.nn.Linear:
    """Returns a layer with that weight and no bias yet, without drawing weights to discard."""
    fan_out, fan_in = weight.shape
    layer = eqx.filter_eval_shape(eqx.nn.Linear, fan_in, fan_out, key=jax.random.key(0))
    bias = jnp.zeros(fan_out, weight.dtype)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))


def label_metrics(
    logits: Float[Array, "*n outputs"], labels: Int[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Returns the cross entropy of each prediction, and 1 where the largest logit is right."""
    # A logit looked up by index has a scatter as its derivative: slow on a CPU.
    ones = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    found = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return optax.softmax_cross_entropy(logits, ones), found.astype(logits.dtype)


class CrossEntropy(eqx.Module):
    """The objective of classification: "loss", the mean softmax cross entropy, and "accuracy".

    Accuracy is the share of examples whose largest logit is that of their label.

    Attributes:
        num_classes: the number of logits.
        flatten: whether the network is given images as rows of pixels.
        centre: whether it is given pixels between -1 and 1, and not 0 and 1.
    """

    num_classes: int | None = eqx.field(static=True)
    flatten: bool = eqx.field(static=True, default=True)
    centre: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_integer("Data", "num_classes", self.num_classes, hint="num_classes=10")

    def __call__(self, predict: Predict, rows: Rows) -> dict[str, Scalar]:
        """Returns both metrics of a network on a batch of `Labelled` images."""
        images, labels = rows.arrays
        images = 2 * images - 1 if self.centre else images
        logits = predict(images.reshape(len(images), -1) if self.flatten else images)
        if logits.shape != (len(labels), self.num_classes):
            raise ValueError(
                f"classification(network) gives logits of shape {logits.shape[1:]}; data has "
                f"{self.num_classes} classes, try {self.num_classes} outputs."
            )
        losses, right = label_metrics(logits, labels)
        return {"loss": rows.mean(losses), "accuracy": rows.mean(right)}


def classification(
    data: Data,
    network: AnyNetwork,
    batch_size: int = 128,
    flatten: bool = True,
    augment: Augment | None = None,
    centre: bool = False,
    stochastic: bool = False,
) -> NetworkTask:
    """Returns classification of images by a network of any kind: see `NetworkTask`.

    Args:
        data: `Labelled` images, from `image_data` or `lopt.load_images`.
        network: from images to logits; in Equinox, from one image.
        batch_size, augment, stochastic: see `NetworkTask`.
        flatten, centre: see `CrossEntropy`.
    """
    objective = CrossEntropy(data.num_classes, flatten, centre)
    return NetworkTask(data, as_network(network), objective, batch_size, augment, stochastic)


def image_shape(data: Data) -> tuple[int, ...]:
    """Returns height, width and channels of labelled images."""
    return data.train.arrays.images.shape[1:]


def mlp_classification(
    data: Data,
    widths: tuple[int, ...] = (32,),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    stddev: float | None = None,
    init: Init = "truncated_normal",
    dropout: float = 0.0,
    layer_norm: bool = False,
    augment: Augment | None = None,
    centre: bool = False,
) -> NetworkTask:
    """Returns classification by a multilayer perceptron.

    Args:
        data: `Labelled` images.
        widths: the length of each hidden layer; empty for a linear model.
        activation: applied between layers.
        batch_size: examples per step.
        stddev, init, dropout, layer_norm: see `MultilayerPerceptron`.
        augment: of training examples, (key, example) to an example.
        centre: whether the network is given pixels between -1 and 1, and not 0 and 1.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, lopt
        >>> images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
        >>> data = lopt.tasks.image_data(images, labels, None, None, num_classes=10, size=8)
        >>> task = lopt.tasks.mlp_classification(data, widths=(32,))
        >>> params = task.init(jax.random.key(0))
        >>> print(jnp.round(task.loss(params, task.everything("test")), 3))  # all logits zero
        2.303
    """
    sizes = math.prod(image_shape(data)), widths, data.num_classes
    how = {"stddev": stddev, "init": init, "dropout": dropout, "layer_norm": layer_norm}
    build = Build(MultilayerPerceptron, *sizes, activation, **how)
    network = EquinoxNetwork(build, dropout > 0)
    return classification(data, network, batch_size, True, augment, centre, dropout > 0)
