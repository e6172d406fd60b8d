"""Safeguards: any optimizers, learned or Optax's, combined so that none can do much harm.

Every part is a learned optimizer, an Optax optimizer such as `optax.adam(1e-3)`, or a function that
makes one: `functools.partial(optax.adam, learning_rate=1e-3)`. What is Optax's has no weights here;
`lopt.save` takes functions, whose arguments it can read.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.checks import check_positive
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.tensors import as_tensor
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta
from lopt.learned.hyperparameters import Learnable


def as_learned(part: Any) -> AbstractLearnedOptimizer:
    """Returns a learned optimizer as it is, and one of Optax as a learned one without weights."""
    if isinstance(part, AbstractLearnedOptimizer):
        return part
    return Learnable((lambda: part) if isinstance(part, optax.GradientTransformation) else part, ())


class AbstractCombination(AbstractLearnedOptimizer):
    """Optimizers as one: those in its fields, in their order. Theta is a tuple of theirs."""

    def optimizers(self) -> tuple[AbstractLearnedOptimizer, ...]:
        """Returns what is combined."""

        def is_part(node: Any) -> bool:
            return node is not self and isinstance(node, AbstractLearnedOptimizer)

        return tuple(filter(is_part, jax.tree.leaves(self, is_leaf=is_part)))

    @property
    @override
    def max_steps(self) -> int | None:
        lengths = [part.max_steps for part in self.optimizers()]
        return min((length for length in lengths if length is not None), default=None)

    @property
    @override
    def needs_num_steps(self) -> bool:
        return any(part.needs_num_steps for part in self.optimizers())

    @override
    def init(self, key: Key) -> Theta:
        parts = self.optimizers()
        keys = jax.random.split(key, len(parts))
        return tuple(part.init(key) for part, key in zip(parts, keys, strict=True))

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        return self.begin_each(theta, params, num_steps)

    def begin_each(self, theta: Theta, params: Params, num_steps: NumSteps) -> tuple[State, ...]:
        """Returns the state of each optimizer."""
        pairs = zip(self.optimizers(), theta, strict=True)
        return tuple(part.begin(own, params, num_steps) for part, own in pairs)

    def update_each(
        self, theta: Theta, grads: Params, states: State, params: Params | None, **extra: Any
    ) -> tuple[list[Params], tuple[State, ...]]:
        """Returns the updates of each optimizer for the same gradients, and its next state."""
        rows = zip(self.optimizers(), theta, states, strict=True)
        done = [part.update(own, grads, old, params, **extra) for part, own, old in rows]
        return [updates for updates, _ in done], tuple(new for _, new in done)


class Chain(AbstractCombination):
    """An `optax.chain` with learned parts: each is given the updates of the one before.

    Example:
        Gradients are clipped at a learned bound, no update has a root mean square above 0.01.
        >>> import optax, lopt
        >>> clip = lopt.learnable(optax.clip, max_delta=(1.0, "log"))
        >>> learned = lopt.learned.Chain((clip, lopt.small_mlp(), optax.clip_by_block_rms(0.01)))
    """

    parts: tuple[AbstractLearnedOptimizer, ...] = eqx.field(
        converter=lambda parts: tuple(map(as_learned, parts))
    )

    def __check_init__(self) -> None:
        if not self.parts:
            raise ValueError("Chain(parts=()) must have parts; try (optax.clip(1.0), learned).")

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        states = []
        for part, own, old in zip(self.parts, theta, state, strict=True):
            grads, new = part.update(own, grads, old, params, **extra)
            states.append(new)
        return grads, tuple(states)


class Nominal(AbstractCombination):
    """The sum of a learned optimizer's updates and another's, the nominal term.

    Attributes:
        learned: the optimizer.
        nominal: the other, such as `lopt.LearnableAdam()`, whose rate is learned.

    Reference: Harrison et al. 2022, arXiv:2209.11208.
    """

    learned: AbstractLearnedOptimizer = eqx.field(converter=as_learned)
    nominal: AbstractLearnedOptimizer = eqx.field(converter=as_learned)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        updates, new = self.update_each(theta, grads, state, params, **extra)
        return jax.tree.map(jnp.add, *updates), new


class Odd(AbstractCombination):
    """The odd part of an optimizer: (u(g, p) - u(-g, -p)) / 2, with two states of it.

    Reflected gradients and params then have reflected updates, over whole runs: no bias moves a
    weight without a gradient. Steps take twice the time.
    """

    learned: AbstractLearnedOptimizer = eqx.field(converter=as_learned)

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        return tuple(self.begin_each(theta, each, num_steps) for each in (params, _minus(params)))

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        (up,), one = self.update_each(theta, grads, state[0], params, **extra)
        (down,), other = self.update_each(theta, _minus(grads), state[1], _minus(params), **extra)
        return jax.tree.map(lambda a, b: (a - b) / 2, up, down), (one, other)


class FallBackState(eqx.Module):
    """The states of both optimizers, and how many steps were not the learned optimizer's."""

    parts: State
    count: Int[Array, ""]


class FallBack(AbstractCombination):
    """A learned optimizer whose steps are replaced by Adam's where they are not finite, or explode.

    Where the gradient is not finite, or its squares overflow, there is no step, and both optimizers
    are told that it was zero: their memory stays finite. The state counts all replaced steps.

    Attributes:
        learned: the optimizer.
        fall_back: the other, Adam at 1e-3 by default; its state is kept up to date.
        limit: a step is replaced if its norm, over all tensors, is above this multiple of the
            other's.
    """

    learned: AbstractLearnedOptimizer = eqx.field(converter=as_learned)
    fall_back: AbstractLearnedOptimizer = eqx.field(
        converter=as_learned, default=functools.partial(optax.adam, learning_rate=1e-3)
    )
    limit: float = eqx.field(static=True, default=100.0)

    def __check_init__(self) -> None:
        check_positive("FallBack", "limit", self.limit, 100.0)

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> FallBackState:
        states = self.begin_each(theta, params, num_steps)
        return FallBackState(states, jnp.zeros((), jnp.int32))

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, FallBackState]:
        sound = jnp.isfinite(_squares(grads))
        grads = jax.tree.map(lambda grad: jnp.where(sound, grad, 0), grads)
        (ours, others), new = self.update_each(theta, grads, state.parts, params, **extra)
        size = _squares(ours)
        fine = sound & jnp.isfinite(size) & (size <= self.limit**2 * _squares(others))
        updates = jax.tree.map(
            lambda own, other: jnp.where(fine, own, jnp.where(sound, other, 0)), ours, others
        )
        return updates, FallBackState(new, state.count + (~fine).astype(jnp.int32))


def _minus(tree: Params | None) -> Params | None:
    return jax.tree.map(jnp.negative, tree)


def _squares(tree: Params) -> Scalar:
    """Returns the sum of all squares, taken in at least single precision."""
    sums = [jnp.sum(as_tensor(leaf) ** 2).astype(float) for leaf in jax.tree.leaves(tree)]
    return jnp.asarray(sum(sums), float)
