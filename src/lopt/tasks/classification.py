"""Classification of images by any Equinox network, and the multilayer perceptron in particular."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, Scalar, Split
from lopt.tasks.data import ImageData, Images, Labelled
from lopt.tasks.ranges import check_count, check_scale


class MultilayerPerceptron(eqx.Module):
    """A multilayer perceptron; with no hidden layers, a linear map.

    Weights start as `initial_weights` draws them and biases at zero, or all of them as layers of
    Equinox and PyTorch begin.

    Attributes:
        layers: the linear layers.
        activation: applied between them.
    """

    layers: tuple[eqx.nn.Linear, ...]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        widths: tuple[int, ...],
        outputs: int,
        activation: Callable[[Array], Array],
        key: Key,
        deviation: float | None = None,
        uniform: bool = False,
    ) -> None:
        """Draws the weights.

        Args:
            inputs: the length of the input.
            widths: the length of each hidden layer; may be empty.
            outputs: the length of the output.
            activation: applied between layers.
            key: of the weights.
            deviation: of a normal to draw all weights from; by default it depends on the fan in.
            uniform: whether to draw weights and biases between -1 and 1, over sqrt(fan in).

        Raises:
            ValueError: if a length is not positive, the deviation negative, or `uniform` asked for
                with a deviation.
        """
        check_count("MultilayerPerceptron", "inputs", inputs, 1, 64)
        check_count("MultilayerPerceptron", "outputs", outputs, 1, 10)
        for width in widths:
            check_count("MultilayerPerceptron", "width", width, 1, 32)
        shapes = [
            (after, before) for before, after in itertools.pairwise((inputs, *widths, outputs))
        ]
        self.activation = activation
        check_uniform("MultilayerPerceptron", uniform, deviation)
        if uniform:
            keys = jax.random.split(key, len(shapes))
            self.layers = tuple(
                eqx.nn.Linear(before, after, key=key)
                for (after, before), key in zip(shapes, keys, strict=True)
            )
            return
        weights = initial_weights("MultilayerPerceptron", shapes, key, deviation)
        self.layers = tuple(_linear(weight) for weight in weights)

    def __call__(self, inputs: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        """Returns the outputs for one input."""
        for layer in self.layers[:-1]:
            inputs = self.activation(layer(inputs))
        return self.layers[-1](inputs)


class PerceptronOf(eqx.Module):
    """Builds a `MultilayerPerceptron` of these sizes from a key.

    Unlike a closure it equals another one of the same sizes, so that tasks on other data of the
    same shape compile nothing again.
    """

    inputs: int = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)
    outputs: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)
    deviation: float | None = eqx.field(static=True, default=None)
    uniform: bool = eqx.field(static=True, default=False)

    def __call__(self, key: Key) -> MultilayerPerceptron:
        """Returns a new network."""
        sizes = self.inputs, self.widths, self.outputs
        return MultilayerPerceptron(*sizes, self.activation, key, self.deviation, self.uniform)


def check_uniform(owner: str, uniform: bool, deviation: float | None) -> None:
    """Refuses what is no boolean, and weights that are to be uniform and normal at once.

    Raises:
        ValueError: naming the owner.
    """
    if not isinstance(uniform, bool):
        raise ValueError(f"{owner}(uniform={uniform!r}) must be True or False.")
    if uniform and deviation is not None:
        raise ValueError(
            f"{owner}(uniform=True, deviation={deviation!r}) cannot be both uniform and normal; "
            "try deviation=None."
        )


def initial_weights(
    owner: str, shapes: Sequence[tuple[int, ...]], key: Key, deviation: float | None
) -> list[Float[Array, "output ..."]]:
    """Draws the weights of layers, of shape (outputs, what each of them is a sum over ...).

    Args:
        owner: whose weights, for the message of an error.
        shapes: of each layer.
        key: of all of them.
        deviation: of a normal; by default a normal of deviation 1 / sqrt(fan in) is cut at two
            deviations (its deviation is then 0.88 / sqrt(fan in)).

    Raises:
        ValueError: if the deviation is negative or not finite.
    """
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    # One flat draw for all layers: every further one costs as much compilation again.
    if deviation is None:
        flat = jax.random.truncated_normal(key, -2, 2, (ends[-1],))
    else:
        check_scale(owner, "deviation", deviation)
        flat = deviation * jax.random.normal(key, (ends[-1],))
    parts = jnp.split(flat, ends[:-1])
    weights = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if deviation is not None:
        return weights
    return [weight / math.prod(weight.shape[1:]) ** 0.5 for weight in weights]


def _linear(weight: Float[Array, "output input"]) -> eqx.nn.Linear:
    """Returns a layer with that weight and no bias yet, without drawing weights to discard."""
    fan_out, fan_in = weight.shape
    layer = eqx.filter_eval_shape(eqx.nn.Linear, fan_in, fan_out, key=jax.random.key(0))
    bias = jnp.zeros(fan_out, weight.dtype)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))


class Classification(AbstractTask):
    """Trains a network to classify images: the mean softmax cross entropy of its logits.

    Parameters are the floating-point arrays of the network, in its structure.

    Attributes:
        data: the images.
        network: from a key to an Equinox module, which maps one flattened image to logits.
        batch_size: examples per step.
        structure: what the network has besides arrays, as leaves and tree definition.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, lopt
        >>> images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
        >>> data = lopt.tasks.image_data(images, labels, None, None, num_classes=10, size=8)
        >>> task = lopt.tasks.mlp_classification(data, widths=(32,))
        >>> params = task.init(jax.random.key(0))
        >>> print(jnp.round(task.loss(params, task.everything("test")), 3))  # all logits zero
        2.303
    """

    data: ImageData
    network: Callable[[Key], eqx.Module] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True, default=128)
    structure: tuple[tuple[Any, ...], Any] = eqx.field(static=True, init=False)

    def __post_init__(self) -> None:
        shapes = eqx.filter_eval_shape(self.network, jax.random.key(0))
        # Flattened, because a network that holds a list or a dict cannot be hashed as it is.
        leaves, treedef = jax.tree.flatten(eqx.partition(shapes, _is_shape)[1])
        self.structure = tuple(leaves), treedef

    def __check_init__(self) -> None:
        check_count("Classification", "batch_size", self.batch_size, 1, 128)
        shapes = eqx.filter_eval_shape(self.network, jax.random.key(0))
        for leaf in jax.tree.leaves(eqx.filter(shapes, _is_shape)):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"Classification(network) has an array of dtype {leaf.dtype}; all must be "
                    "floating-point, try keeping others in static fields."
                )
        pixels = jnp.zeros(math.prod(self.data.image_shape), jax.tree.leaves(shapes)[0].dtype)
        found = eqx.filter_eval_shape(lambda network, image: network(image), shapes, pixels)
        if found.shape != (self.data.num_classes,):
            raise ValueError(
                f"Classification(network) gives logits of shape {found.shape}; data has "
                f"{self.data.num_classes} classes, try {self.data.num_classes} outputs."
            )

    def init(self, key: Key) -> Params:
        """Returns the arrays of a new network."""
        return eqx.filter(self.network(key), eqx.is_inexact_array)

    def batch(self, key: Key, split: Split = "train") -> Labelled:
        """Returns `batch_size` examples, drawn with replacement."""
        return self.data.split(split).draw(key, self.batch_size)

    def everything(self, split: Split = "train") -> Labelled:
        """Returns the whole split as one batch, for evaluation."""
        return self.data.split(split).everything()

    def logits(self, params: Params, images: Images) -> Float[Array, "n label"]:
        """Returns the logits of each image, computed in the dtype of the parameters."""
        leaves, treedef = self.structure
        network = eqx.combine(params, treedef.unflatten(leaves))
        return jax.vmap(network)(flatten_images(images, params))

    def loss(self, params: Params, batch: Labelled) -> Scalar:
        """Returns the mean of -log softmax(logits)[label]."""
        return cross_entropy(self.logits(params, batch.images), batch)

    def accuracy(self, params: Params, batch: Labelled) -> Scalar:
        """Returns the share of images whose largest logit is that of their label."""
        return hit_rate(self.logits(params, batch.images), batch)


def mlp_classification(
    data: ImageData,
    widths: tuple[int, ...] = (32,),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    deviation: float | None = None,
    uniform: bool = False,
) -> Classification:
    """Returns classification by a multilayer perceptron.

    Args:
        data: the images.
        widths: the length of each hidden layer; empty for a linear model.
        activation: applied between layers.
        batch_size: examples per step.
        deviation: of a normal to draw all weights from; by default it depends on the fan in.
        uniform: whether to draw weights and biases between -1 and 1, over sqrt(fan in), as layers
            of Equinox and PyTorch begin.
    """
    sizes = math.prod(data.image_shape), widths, data.num_classes
    network = PerceptronOf(*sizes, activation, deviation, uniform)
    return Classification(data, network, batch_size)


def flatten_images(images: Images, params: Params) -> Float[Array, "n pixel"]:
    """Returns images as rows, in the dtype of the parameters."""
    dtype = jax.tree.leaves(params)[0].dtype
    return images.reshape(len(images), -1).astype(dtype)


def cross_entropy(logits: Float[Array, "n label"], batch: Labelled) -> Scalar:
    """Returns the mean softmax cross entropy."""
    # Looked up by index, the label's logit would have a scatter as its derivative: slow on a CPU.
    targets = jax.nn.one_hot(batch.labels, logits.shape[-1], dtype=logits.dtype)
    return batch.mean(optax.softmax_cross_entropy(logits, targets))


def hit_rate(logits: Float[Array, "n label"], batch: Labelled) -> Scalar:
    """Returns the share of images whose largest logit is that of their label."""
    labels: Int[Array, " n"] = jnp.argmax(logits, axis=-1).astype(batch.labels.dtype)
    return batch.mean((labels == batch.labels).astype(logits.dtype))


def _is_shape(leaf: object) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
