"""Features of other features: exponential averages, features side by side, and a rule for some.

A recording then has features that the rule does not read, so that an equation can use a momentum
where the network uses its memory: the gates of an LSTM average its inputs, an equation has no
gates, and a few averages of the same inputs say more than any number of lags.
"""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures, AbstractRule, Columns, Tensor
from lopt.core.types import Key, State, Theta
from lopt.learned.features import check_decays
from lopt.learned.moments import NUMBER

_AVERAGE = "average_"


class Averaged(AbstractFeatures):
    """Other features' columns, then exponential averages of some of them, then what is shared.

    With the decay d and the column x, a <- d a + (1 - d) x from a = 0. Theta is that of the other
    features.

    Attributes:
        features: the other features.
        averages: names such as average_0.9_m_normalised: the decay, then the column.

    Raises:
        ValueError: if a name is not that of an average of a column, or is there twice.
    """

    features: AbstractFeatures
    averages: tuple[str, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        own = self.features.column_names()
        for name in self.averages:
            decay, column = _parts(name)
            if column not in own:
                raise ValueError(
                    f"Averaged(averages) has {name!r}, but there is no column {column!r}; there "
                    f"are {', '.join(own)}."
                )
            check_decays("Averaged(averages)", (decay,))
        if len(set(self.averages)) < len(self.averages) or set(self.averages) & set(own):
            raise ValueError(f"Averaged(averages={self.averages}) must be different new names.")

    @override
    def init(self, key: Key) -> Theta:
        return self.features.init(key)

    @override
    def begin(self, param: Tensor) -> dict[str, State]:
        zeros = jnp.zeros_like(param)[None]
        return {
            "averages": dict.fromkeys(sorted(self.averages), zeros),
            "features": self.features.begin(param),
        }

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: Any, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Any, dict[str, State]]:
        views, inner = self.features.update(theta, grad, state["features"], param, step)
        rows = [row for stack in self.features.columns(views) for row in stack]
        columns = dict(zip(self.features.column_names(), rows, strict=True))
        averages: dict[str, Columns] = {}
        for name, old in state["averages"].items():
            decay, column = _parts(name)
            averages[name] = old + (1 - decay) * (columns[column][None] - old)
        return (views, averages), {"averages": averages, "features": inner}

    @override
    def columns(self, views: Any) -> tuple[Columns, ...]:
        own, averages = views
        return (*self.features.columns(own), *(averages[name] for name in self.averages))

    @override
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        return self.features.shared(step, dtype)

    @override
    def names(self) -> tuple[str, ...]:
        own = self.features.column_names()
        return (*own, *self.averages, *self.features.names()[len(own) :])

    @override
    def select(self, names: tuple[str, ...]) -> AbstractFeatures:
        averages = tuple(name for name in self.averages if name in names)
        needed = {*names, *(_parts(name)[1] for name in averages)}
        features = self.features.select(tuple(n for n in self.features.names() if n in needed))
        return Averaged(features, averages) if averages else features


def averages_of(features: AbstractFeatures, decays: tuple[float, ...]) -> tuple[str, ...]:
    """Returns the names of all averages of columns that the features do not have yet.

    Averages and the parameter are not averaged: the parameter is a sum of past outputs, which would
    explain a rule by itself.

    Example:
        >>> from lopt.learned import MomentFeatures
        >>> averages_of(MomentFeatures(("gradient", "parameter", "time")), (0.5, 0.9))
        ('average_0.5_gradient', 'average_0.9_gradient')
    """
    there = features.column_names()
    columns = [name for name in there if not (is_average(name) or name == "parameter")]
    names = [f"{_AVERAGE}{float(decay)}_{name}" for decay in decays for name in columns]
    return tuple(name for name in names if name not in there)


def is_average(name: str) -> bool:
    """Returns whether a feature of this name is an average of another."""
    return name.startswith(_AVERAGE)


def averaged_column(name: str) -> str:
    """Returns the name of what an average is of, or refuses the name of something else."""
    return _parts(name)[1]


def _parts(name: str) -> tuple[float, str]:
    found = re.fullmatch(f"{_AVERAGE}({NUMBER})_(.+)", name)
    if not found:
        raise ValueError(f"{name!r} is no average of a column; write it as average_0.9_gradient.")
    return float(found[1]), found[2]


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
    if more and (fresh := tuple(name for name in more.names() if name not in there)):
        features, weights = Concat((features, more.select(fresh))), (weights, ())
    if features is learned.features:
        return learned, theta
    names = features.names()
    rule = SelectFeatures(learned.rule, names, own, len(names) - len(features.column_names()))
    seen = eqx.tree_at(lambda c: (c.features, c.rule), learned, (features, rule))
    return seen, {"features": weights, "rule": theta["rule"]}


def _has_weights(features: AbstractFeatures) -> bool:
    return bool(jax.tree.leaves(jax.eval_shape(features.init, jax.random.key(0))))
