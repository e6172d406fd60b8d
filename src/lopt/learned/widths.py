"""Multipliers of updates: constants that suit networks of any width, and learned ones.

A rule whose features are normalised moves every weight equally far, whatever the width. In wide
layers those moves add up, so that updates of hidden matrices are divided by their fan in.

Reference: Thérien et al. 2024, arXiv:2406.00153 (muLO); Yang & Hu 2021, arXiv:2011.14522.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, State, Theta
from lopt.learned.matrices import MatrixAxes, View
from lopt.learned.safeguards import AbstractCombination
from lopt.learned.schedules import PerTensor, named_tensors


def scale_by_width(multipliers: PerTensor) -> optax.GradientTransformation:
    """Multiplies the updates of each tensor, of any optimizer, by a constant.

    Args:
        multipliers: those of `width_multipliers`, or declared, as
            `lopt.learned.per_tensor({"weight": 0.25, "bias": 1.0})`.

    Raises:
        ValueError: if params has a tensor without a multiplier, at `init`.

    Example:
        >>> import optax, lopt
        >>> scale = scale_by_width(lopt.learned.per_tensor({"weight": 0.25, "bias": 1.0}))
        >>> optimizer = optax.chain(optax.adam(1e-3), scale)
    """
    known = dict(multipliers.values)

    def init(params: Params) -> State:
        if missing := [name for name, _ in named_tensors(params) if name not in known]:
            raise ValueError(
                f"scale_by_width(multipliers) has none for {', '.join(missing)}, only for "
                f"{', '.join(known)}; give one for each tensor."
            )
        return optax.EmptyState()

    def update(updates: Params, state: State, params: Params | None = None) -> tuple[Params, State]:
        scaled = [known[name] * update for name, update in named_tensors(updates)]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformation(init, update)


def width_multipliers(
    params: Any, base: Any, axes: MatrixAxes | None = None, outputs: bool = True
) -> PerTensor:
    """Returns (fan in of base) / (fan in of params) for each tensor whose fan in is another.

    It is 1 for others: vectors, embeddings and the first layer.

    Args:
        params: those of a network, or their shapes.
        base: those of the same network at the width that the rule was trained or tuned at.
        axes: which axes count inputs: by default as in Flax and Haiku; `MatrixAxes("out_in")` as
            in Equinox. Names tell embeddings from matrices.
        outputs: whether it also applies to the last layer, of which only the inputs grow. It does
            not where the network divides its last activations by their width itself.

    Raises:
        ValueError: if the two have different tensors, or tensors of different rank.

    Example:
        >>> import jax.numpy as jnp
        >>> narrow = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
        >>> wide = {"w": jnp.ones((32, 32)), "b": jnp.ones(32)}
        >>> width_multipliers(wide, narrow).values
        (('b', 1.0), ('w', 0.25))
    """
    ours, theirs = named_tensors(params), named_tensors(base)
    if [(n, x.ndim) for n, x in ours] != [(n, x.ndim) for n, x in theirs]:
        raise ValueError(
            "width_multipliers(params, base) must be one network at two widths, but their tensors "
            f"are {', '.join(n for n, _ in ours)}, and {', '.join(n for n, _ in theirs)}."
        )
    structure: Any = jax.tree.structure(params)
    numbers = structure.flatten_up_to((axes or MatrixAxes())(params))

    def multiplier(wide: Any, narrow: Any, number: Any) -> float:
        grown = sum(a != b for a, b in zip(wide.shape, narrow.shape, strict=True))
        if not (outputs or grown > 1):
            return 1.0
        return View.of(narrow, number).fan_in / View.of(wide, number).fan_in

    rows = zip(ours, theirs, numbers, strict=True)
    return PerTensor(tuple((name, multiplier(x, y, number)) for (name, x), (_, y), number in rows))


TYPES = ("vector", "matrix", "kernel")


class PerTensorType(AbstractCombination):
    """Another optimizer, its updates times exp(multiplier of the tensor's type).

    The rank decides the type: vectors (and scalars), matrices, and kernels of convolutions. All
    factors start at one. They tune a rule that was distilled on perceptrons for kernels.

    Theta is `{"learned": ..., "log_multipliers": {"vector": ..., "matrix": ..., "kernel": ...}}`.

    Attributes:
        learned: the optimizer.
    """

    learned: AbstractLearnedOptimizer

    @override
    def init(self, key: Key) -> Theta:
        return self.wrap(self.learned.init(key))

    def wrap(self, theta: Theta) -> Theta:
        """Returns the initial theta around these weights of `learned`."""
        return {"learned": theta, "log_multipliers": {name: jnp.zeros(()) for name in TYPES}}

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        return self.learned.begin(theta["learned"], params, num_steps)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        updates, state = self.learned.update(theta["learned"], grads, state, params, **extra)

        def multiplied(update: Any) -> Any:
            log = theta["log_multipliers"][TYPES[min(max(update.ndim, 1), 3) - 1]]
            return update * jnp.exp(log).astype(update.dtype)

        return jax.tree.map(multiplied, updates), state
