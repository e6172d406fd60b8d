"""Features and exponential averages of them, which stand in for the memory of a network.

The gates of an LSTM average its inputs. An equation has no gates, but it can read averages of the
same inputs: a few of them say more than any number of lags.
"""

import re
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.learned import AbstractFeatures, Columns, Tensor
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
        self,
        theta: Theta,
        grad: Tensor,
        state: dict[str, Any],
        param: Tensor,
        step: Int[Array, ""],
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
    """Returns the name of what an average is of.

    Raises:
        ValueError: if the name is not that of an average.
    """
    return _parts(name)[1]


def _parts(name: str) -> tuple[float, str]:
    found = re.fullmatch(f"{_AVERAGE}({NUMBER})_(.+)", name)
    if not found:
        raise ValueError(f"{name!r} is no average of a column; write it as average_0.9_gradient.")
    return float(found[1]), found[2]
