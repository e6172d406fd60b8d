"""Updates that suit networks of any width: the maximal update parametrisation of learned rules.

A rule whose features are normalised moves every weight equally far, whatever the width. In wide
layers those moves add up, so that updates of hidden matrices are divided by their fan in.

Reference: Thérien et al. 2024, arXiv:2406.00153 (muLO); Yang & Hu 2021, arXiv:2011.14522.
"""

from typing import Any

import jax
from typing_extensions import override

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta
from lopt.learned.tensors import PerTensor, named_tensors


class WidthScaled(AbstractLearnedOptimizer):
    """Another optimizer, its updates times a constant for each tensor. Theta is that of the other.

    Attributes:
        learned: the other optimizer.
        multipliers: one for each tensor, such as `lopt.learned.width_multipliers` returns, or
            `lopt.learned.per_tensor({"weight": 0.25, "bias": 1.0})`.
    """

    learned: AbstractLearnedOptimizer
    multipliers: PerTensor

    @property
    @override
    def max_steps(self) -> int | None:
        return self.learned.max_steps

    @property
    @override
    def needs_num_steps(self) -> bool:
        return self.learned.needs_num_steps

    @override
    def init(self, key: Key) -> Theta:
        return self.learned.init(key)

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        known = dict(self.multipliers.values)
        if missing := [name for name, _ in named_tensors(params) if name not in known]:
            raise ValueError(
                f"WidthScaled(multipliers) has none for {', '.join(missing)}, only for "
                f"{', '.join(known)}; give one for each tensor."
            )
        return self.learned.begin(theta, params, num_steps)

    @override
    def update(
        self,
        theta: Theta,
        grads: Params,
        state: State,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, State]:
        updates, state = self.learned.update(theta, grads, state, params, value=value, **extra)
        known: dict[str, Any] = dict(self.multipliers.values)
        factors = jax.tree.unflatten(
            jax.tree.structure(updates), [known[name] for name, _ in named_tensors(updates)]
        )
        return jax.tree.map(lambda update, factor: factor * update, updates, factors), state


def width_multipliers(
    params: Params, base: Params, inputs_axis: int = -2, outputs: bool = True
) -> PerTensor:
    """Returns by what to multiply the updates of a network that is wider than another one.

    It is (fan in of base) / (fan in of params) for matrices whose fan in grows, and 1 for others:
    biases, embeddings and the first layer.

    Args:
        params: those of the network, or their shapes.
        base: those of the same network at the width that the rule was trained or tuned at.
        inputs_axis: the axis that counts inputs: -2 as in Flax and Haiku, -1 as in Equinox.
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

    def multiplier(wide: tuple[int, ...], narrow: tuple[int, ...]) -> float:
        grown = sum(a != b for a, b in zip(wide, narrow, strict=True))
        if len(wide) < 2 or wide[inputs_axis] == narrow[inputs_axis]:
            return 1.0
        return narrow[inputs_axis] / wide[inputs_axis] if outputs or grown > 1 else 1.0

    pairs = zip(ours, theirs, strict=True)
    return PerTensor(tuple((name, multiplier(x.shape, y.shape)) for (name, x), (_, y) in pairs))
