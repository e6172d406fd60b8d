"""A perceptron beside a nominal step and weight decay, the sizes of which it may control.

Reference: Harrison et al. 2022, arXiv:2209.11208, `MLPNomLOpt` in the authors' library.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.learned import AbstractFeatures, AbstractRule, Columns, Tensor
from lopt.core.types import Key, State, Theta
from lopt.learned.rules import MLP, DirectionMagnitude


class Normalised(AbstractFeatures):
    """Other features' columns, each over its root mean square, and then some as they are.

    A rule on them is to be without the normalisation of `lopt.Coordinatewise`.

    Attributes:
        features: the other features.
        plain: names of columns that are repeated as they are, as `plain_NAME`.
        axes: the number of last axes that means are over; None for all.
        epsilon: added to mean squares.
    """

    features: AbstractFeatures
    plain: tuple[str, ...] = eqx.field(static=True, default=())
    axes: int | None = eqx.field(static=True, default=None)
    epsilon: float = eqx.field(static=True, default=1e-5)

    def __check_init__(self) -> None:
        if unknown := set(self.plain) - set(self.features.column_names()):
            raise ValueError(
                f"Normalised(plain) has {', '.join(sorted(unknown))}, but the columns are "
                f"{', '.join(self.features.column_names())}."
            )

    @override
    def init(self, key: Key) -> Theta:
        return self.features.init(key)

    @override
    def begin(self, param: Tensor) -> State:
        return self.features.begin(param)

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: State, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Any, State]:
        views, new = self.features.update(theta, grad, state, param, step)
        first = 1 if self.axes is None else 1 + max(0, param.ndim - self.axes)
        over = tuple(range(first, param.ndim + 1))
        # What broadcasts along an axis has there the mean that it would have in full.
        squares = [jnp.square(stack) for stack in self.features.columns(views)]
        means = [jnp.mean(square, over, keepdims=True) for square in squares]
        return (views, [jax.lax.rsqrt(self.epsilon + mean) for mean in means]), new

    @override
    def columns(self, views: Any) -> tuple[Columns, ...]:
        own, factors = views
        stacks = self.features.columns(own)
        rows = dict(zip(self.features.column_names(), (r for s in stacks for r in s), strict=True))
        scaled = (stack * factor for stack, factor in zip(stacks, factors, strict=True))
        return *scaled, *(rows[name][None] for name in self.plain)

    @override
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        return self.features.shared(step, dtype)

    @override
    def names(self) -> tuple[str, ...]:
        own = self.features.column_names()
        plain = (f"plain_{name}" for name in self.plain)
        return (*own, *plain, *self.features.names()[len(own) :])


class NominalRule(AbstractRule):
    """The step of a perceptron, a nominal step and weight decay.

    With its outputs d, m, n and r, the plain parameter p and the mean e of the plain columns behind
    it, the update is -0.001 d exp(0.001 m) - nominal exp(0.001 n) e - decay exp(0.001 r) p.

    Attributes:
        network: the perceptron, with four outputs; it reads what is not plain.
        nominal, weight_decay: sizes of the other terms.
        controls_nominal, controls_decay: whether n and r are outputs, and not 1 and 0.
    """

    network: MLP
    nominal: float = eqx.field(static=True, default=0.0)
    weight_decay: float = eqx.field(static=True, default=0.0)
    controls_nominal: bool = eqx.field(static=True, default=False)
    controls_decay: bool = eqx.field(static=True, default=False)

    @override
    def init(self, key: Key) -> Theta:
        return self.network.init(key)

    @override
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        own = self.network.inputs - len(shared)
        outputs, _ = self.network.apply(theta, columns[:own], shared, ())
        n = outputs[2] if self.controls_nominal else jnp.ones_like(outputs[2])
        r = outputs[3] if self.controls_decay else jnp.zeros_like(outputs[3])
        nominal = self.nominal * jnp.exp(0.001 * n) * jnp.mean(columns[own + 1 :], axis=0)
        decay = self.weight_decay * jnp.exp(0.001 * r) * columns[own]
        return (DirectionMagnitude()(outputs) - nominal - decay)[None], memory
