"""Features side by side, and a rule that reads some of them.

A recording then has features that the rule does not read, so that an equation can use a momentum
where the network uses its memory.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures, AbstractRule, Columns, Tensor
from lopt.core.types import Key, State, Theta
from lopt.learned.averages import Averaged, averages_of


class Concat(AbstractFeatures):
    """The columns of several features, one after the other, then what each of them shares.

    Attributes:
        parts: the features.

    Theta and accumulators are tuples of theirs.
    """

    parts: tuple[AbstractFeatures, ...]

    def __check_init__(self) -> None:
        names = self.names()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Concat(parts) has {', '.join(twice)} twice; leave one of each out.")

    @override
    def init(self, key: Key) -> Theta:
        return tuple(part.init(key) for part in self.parts)

    @override
    def begin(self, param: Tensor) -> State:
        return tuple(part.begin(param) for part in self.parts)

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: State, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Any, State]:
        results = [
            part.update(weights, grad, old, param, step)
            for part, weights, old in zip(self.parts, theta, state, strict=True)
        ]
        return tuple(view for view, _ in results), tuple(new for _, new in results)

    @override
    def columns(self, views: Any) -> tuple[Columns, ...]:
        found = (part.columns(view) for part, view in zip(self.parts, views, strict=True))
        return tuple(stack for stacks in found for stack in stacks)

    @override
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        return jnp.concatenate([part.shared(step, dtype) for part in self.parts])

    @override
    def names(self) -> tuple[str, ...]:
        columns = [part.column_names() for part in self.parts]
        shared = [part.names()[len(own) :] for part, own in zip(self.parts, columns, strict=True)]
        return tuple(name for names in (*columns, *shared) for name in names)

    @override
    def select(self, names: tuple[str, ...]) -> AbstractFeatures:
        # If a part with weights is needed, all parts with weights stay: their theta still fits.
        wanted = [(part, tuple(n for n in names if n in part.names())) for part in self.parts]
        weighty = any(some and _has_weights(part) for part, some in wanted)
        kept = tuple(
            part.select(some) if some else part
            for part, some in wanted
            if some or (weighty and _has_weights(part))
        )
        return kept[0] if len(kept) == 1 else Concat(kept)


class SelectFeatures(AbstractRule):
    """A rule that reads some of its features.

    Attributes:
        rule: the rule.
        inputs: the names of all features.
        own: the names of those that the rule reads.
        shared: how many of `inputs`, the last ones, all coordinates share.
    """

    rule: AbstractRule
    inputs: tuple[str, ...] = eqx.field(static=True)
    own: tuple[str, ...] = eqx.field(static=True)
    shared: int = eqx.field(static=True)

    @property
    @override
    def required_features(self) -> tuple[str, ...]:
        return self.inputs

    @property
    @override
    def is_elementwise(self) -> bool:
        return self.rule.is_elementwise

    @override
    def init(self, key: Key) -> Theta:
        return self.rule.init(key)

    @override
    def begin(self, theta: Theta, shape: tuple[int, ...]) -> State:
        return self.rule.begin(theta, shape)

    @override
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        count = len(self.inputs) - self.shared
        places = [self.inputs.index(name) for name in self.own]
        read = jnp.asarray([place for place in places if place < count], jnp.int32)
        common = jnp.asarray([place - count for place in places if place >= count], jnp.int32)
        return self.rule.apply(theta, columns[read], shared[common], memory)


def with_features(
    learned: Coordinatewise,
    theta: Theta,
    more: AbstractFeatures | None = None,
    decays: tuple[float, ...] = (),
) -> tuple[Coordinatewise, Theta]:
    """Returns the same optimizer with further features, which its rule does not read.

    Args:
        learned: any coordinatewise optimizer.
        theta: its weights.
        more: features without weights; names that are there already are left out.
        decays: of exponential averages of every column that its rule reads, before normalisation;
            the parameter and averages are not averaged, see `Averaged`.

    Raises:
        ValueError: if a decay is not below 1, or is there twice.

    Example:
        >>> import jax, lopt
        >>> network, key = lopt.rnnprop("gt"), jax.random.key(0)
        >>> more = lopt.learned.MomentFeatures(("gradient", "time"))
        >>> learned, _ = with_features(network, network.init(key), more, decays=(0.9,))
        >>> learned.features.names()
        ('g_normalised', 'average_0.9_g_normalised', 'gradient', 'time')
    """
    own = learned.features.names()
    features, weights = learned.features, theta["features"]
    if averages := averages_of(features, decays):
        features = Averaged(features, averages)
    there = features.names()
    if fresh := tuple(name for name in more.names() if name not in there) if more else ():
        assert more is not None
        features, weights = Concat((features, more.select(fresh))), (weights, ())
    if features is learned.features:
        return learned, theta
    names = features.names()
    rule = SelectFeatures(learned.rule, names, own, len(names) - len(features.column_names()))
    seen = eqx.tree_at(lambda c: (c.features, c.rule), learned, (features, rule))
    return seen, {"features": weights, "rule": theta["rule"]}


def _has_weights(features: AbstractFeatures) -> bool:
    return bool(jax.tree.leaves(jax.eval_shape(features.init, jax.random.key(0))))
