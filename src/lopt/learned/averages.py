"""Features and exponential averages of them: what a network with memory may keep of what it saw.

The gates of an LSTM average what comes in. An equation has no gates, but it may be given averages
of the same inputs, and then says in a few terms what no number of lags says in many.
"""

import re
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.learned import AbstractFeatures, Columns, Tensor
from lopt.core.types import Key, State, Theta

_AVERAGE = "average_"


class Averaged(AbstractFeatures):
    """Other features' columns, then exponential averages of some of them, then what is shared.

    With the decay d and the column x, a <- d a + (1 - d) x from a = 0, as a network's memory begins
    at zero. Theta is that of the other features.

    Attributes:
        features: the other features.
        averages: names such as average_0.9_m_normalised: the decay, then the column.

    Raises:
        ValueError: if a name is no average of a column, or is there twice.
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

    def update(
        self,
        theta: Theta,
        grad: Tensor,
        state: dict[str, Any],
        param: Tensor,
        step: Int[Array, ""],
    ) -> tuple[Any, dict[str, State]]:
        """Takes in the gradient, and then the columns."""
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

    def select(self, names: tuple[str, ...]) -> AbstractFeatures:
        """Returns the averages of these names, and of the other features what they need."""
        averages = tuple(name for name in self.averages if name in names)
        needed = {*names, *(_parts(name)[1] for name in averages)}
        features = self.features.select(tuple(n for n in self.features.names() if n in needed))
        return Averaged(features, averages) if averages else features


def averages_of(features: AbstractFeatures, decays: tuple[float, ...]) -> tuple[str, ...]:
    """Returns the names of averages of the columns of some features, those that are new.

    Neither of averages, nor of the parameter: what that has moved is a sum of past outputs, which
    would explain a rule by itself.

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
        ValueError: if it is no name of an average.
    """
    return _parts(name)[1]


def check_decays(owner: str, decays: tuple[float, ...]) -> None:
    """Refuses what are no decays of averages, or the same decay twice.

    Raises:
        ValueError: naming it.
    """
    for decay in decays:
        if not 0 < decay < 1:
            raise ValueError(f"{owner}: the decay {decay} must be above 0 and below 1; try 0.9.")
        if decays.count(decay) > 1:
            raise ValueError(f"{owner}: the decay {decay} is there twice; leave one of them out.")


def _parts(name: str) -> tuple[float, str]:
    found = re.fullmatch(_AVERAGE + r"([0-9.]+(?:e-?[0-9]+)?)_(.+)", str(name))
    try:
        if found:
            return float(found[1]), found[2]
    except ValueError:
        pass
    raise ValueError(f"{name!r} is no average of a column; write it as average_0.9_gradient.")
