"""Any loss as a task: an Equinox model, or a dict of arrays, with a loss of one's own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Params, Scalar, Split


class ModelLoss(AbstractTask):
    """Trains a model on a loss of one's own.

    `symmetries` takes a weight and its bias to be named "weight" and "bias", "kernel" and "bias",
    "w" or "W" and "b", or "w1" and "b1". Others are tested by giving their generators, as `others`
    or to `check_symmetry`.

    Attributes:
        model: an Equinox module, or any pytree; its floating-point arrays are the params.
        evaluate: (model, batch) to the loss.
        sample: a key to a batch.

    Raises:
        ValueError: if the model has no floating-point arrays, or complex ones; in training, if
            `evaluate` returns something else than a number.

    Example:
        >>> import jax, jax.numpy as jnp, equinox as eqx
        >>> model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
        >>> def evaluate(model, batch):
        ...     return jnp.mean((jax.vmap(model)(batch) - 1) ** 2)
        >>> task = ModelLoss(model, evaluate, lambda key: jax.random.normal(key, (16, 4)))
        >>> len(jax.tree.leaves(task.init(jax.random.key(1))))
        4
    """

    model: PyTree
    evaluate: Callable[[Any, Batch], Scalar] = eqx.field(static=True)
    sample: Callable[[Key], Batch] = eqx.field(static=True)

    def __check_init__(self) -> None:
        arrays = jax.tree.leaves(eqx.filter(self.model, eqx.is_inexact_array))
        if any(map(jnp.iscomplexobj, arrays)):
            raise ValueError(
                f"ModelLoss(model={type(self.model).__name__}) has complex arrays, which "
                "optimizers here do not train; try one with real and imaginary parts apart."
            )
        if not arrays:
            raise ValueError(
                f"ModelLoss(model={type(self.model).__name__}) has no floating-point arrays to "
                "train; try a model whose weights are JAX arrays."
            )

    def init(self, key: Key) -> Params:
        """Returns the arrays of the model, whatever the key."""
        return eqx.filter(self.model, eqx.is_inexact_array)

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns a batch. Splits do not differ."""
        return self.sample(key)

    def loss(self, params: Params, batch: Batch) -> Scalar:
        """Returns the loss of the model with these params."""
        _, rest = eqx.partition(self.model, eqx.is_inexact_array)
        loss = self.evaluate(eqx.combine(params, rest), batch)
        if not eqx.is_inexact_array(loss) or loss.shape:
            said: Any = jax.eval_shape(lambda: loss) if eqx.is_array(loss) else loss
            raise ValueError(
                f"ModelLoss(evaluate) must return one floating-point number, and returns {said}; "
                "try the mean over the batch, and no auxiliary values."
            )
        return loss
