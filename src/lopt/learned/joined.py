"""Features side by side, and a rule that reads some of many.

Together they let an optimizer be watched through features that its rule does not see: an equation
may then say in a momentum of its own what the network keeps in its memory.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures, AbstractRule, Columns, Tensors
from lopt.core.types import Key, State, Theta


class Joined(AbstractFeatures):
    """The columns of several features, one after the other, then what each of them shares.

    Attributes:
        parts: the features.

    Theta and accumulators are tuples of theirs.
    """

    parts: tuple[AbstractFeatures, ...]

    def __check_init__(self) -> None:
        names = self.names()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Joined(parts) has {', '.join(twice)} twice; leave one of each out.")

    def init(self, key: Key) -> Theta:
        """Returns the weights of all parts."""
        return tuple(part.init(key) for part in self.parts)

    def begin(self, params: Tensors) -> State:
        """Returns the accumulators of all parts."""
        return tuple(part.begin(params) for part in self.parts)

    def update(
        self, theta: Theta, grads: Tensors, state: State, params: Tensors, step: Int[Array, ""]
    ) -> tuple[Any, State]:
        """Takes in the gradients in all parts."""
        results = [
            part.update(weights, grads, old, params, step)
            for part, weights, old in zip(self.parts, theta, state, strict=True)
        ]
        return tuple(view for view, _ in results), tuple(new for _, new in results)

    def columns(self, views: Any) -> tuple[Columns, ...]:
        """Returns the columns of all parts."""
        found = (part.columns(view) for part, view in zip(self.parts, views, strict=True))
        return tuple(stack for stacks in found for stack in stacks)

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        """Returns what the parts share."""
        return jnp.concatenate([part.shared(step, dtype) for part in self.parts])

    def names(self) -> tuple[str, ...]:
        """Returns the names of all columns, then of all that is shared."""
        pairs = [_names(part) for part in self.parts]
        own = [name for names, _ in pairs for name in names]
        return (*own, *(name for _, names in pairs for name in names))

    def select(self, names: tuple[str, ...]) -> AbstractFeatures:
        """Returns the parts that are needed, each with what is needed of it.

        Of parts with weights all are kept if one is needed, so that their weights still fit.
        """
        wanted = [(part, tuple(n for n in names if n in part.names())) for part in self.parts]
        weighty = any(some and _has_weights(part) for part, some in wanted)
        kept = tuple(
            part.select(some) if some else part
            for part, some in wanted
            if some or (weighty and _has_weights(part))
        )
        return kept[0] if len(kept) == 1 else Joined(kept)


class Reading(AbstractRule):
    """A rule that reads some of the features that it is given.

    Attributes:
        rule: it.
        inputs: the names of all that it is given.
        own: the names of those that it reads.
        shared: how many of `inputs`, the last ones, all coordinates share.
    """

    rule: AbstractRule
    inputs: tuple[str, ...] = eqx.field(static=True)
    own: tuple[str, ...] = eqx.field(static=True)
    shared: int = eqx.field(static=True)

    def reads(self) -> tuple[str, ...]:
        """Returns the names of all that it is given."""
        return self.inputs

    def fuses(self) -> bool:
        """Returns what the rule says."""
        return self.rule.fuses()

    def init(self, key: Key) -> Theta:
        """Returns the weights of the rule."""
        return self.rule.init(key)

    def begin(self, theta: Theta, shape: tuple[int, ...]) -> State:
        """Returns the memory of the rule."""
        return self.rule.begin(theta, shape)

    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        """Applies the rule to what it reads."""
        count = len(self.inputs) - self.shared
        places = [self.inputs.index(name) for name in self.own]
        read = jnp.asarray([place for place in places if place < count], jnp.int32)
        common = jnp.asarray([place - count for place in places if place >= count], jnp.int32)
        return self.rule.apply(theta, columns[read], shared[common], memory)


def seen_through(
    learned: Coordinatewise, theta: Theta, more: AbstractFeatures
) -> tuple[Coordinatewise, Theta]:
    """Returns the same optimizer with further features, which its rule does not read.

    Args:
        learned: any coordinatewise optimizer.
        theta: its weights.
        more: features without weights; those of a name that is there already are left out.

    Example:
        >>> import jax, lopt
        >>> network = lopt.dm()
        >>> more = lopt.learned.MomentFeatures(("gradient", "momentum_0.9"))
        >>> learned, _ = seen_through(network, network.init(jax.random.key(0)), more)
        >>> learned.features.names()
        ('log_magnitude', 'clipped_gradient', 'gradient', 'momentum_0.9')
    """
    own = learned.features.names()
    fresh = tuple(name for name in more.names() if name not in own)
    if not fresh:
        return learned, theta
    joined = Joined((learned.features, more.select(fresh)))
    shared = sum(len(_names(part)[1]) for part in joined.parts)
    rule = Reading(learned.rule, joined.names(), own, shared)
    weights = {"features": (theta["features"], ()), "rule": theta["rule"]}
    return eqx.tree_at(lambda c: (c.features, c.rule), learned, (joined, rule)), weights


def _has_weights(features: AbstractFeatures) -> bool:
    return bool(jax.tree.leaves(jax.eval_shape(features.init, jax.random.key(0))))


def _names(features: AbstractFeatures) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of columns and of what is shared."""
    names = features.names()
    count = len(names) - len(features.shared(jnp.zeros((), jnp.int32), jnp.float32))
    return names[:count], names[count:]
