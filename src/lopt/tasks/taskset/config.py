"""Configurations of TaskSet (Metz et al. 2020, arXiv:2002.11887): sampled, named, kept as JSON.

A family is a frozen dataclass: its fields, what its tasks differ in, say how they are sampled, and
`build` makes the task. Nothing of it is traced, as configurations change shapes.
"""

import abc
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, dataclass_transform

import numpy as np

from lopt.core.task import AbstractTask
from lopt.tasks.data import Data

Compat: TypeAlias = Literal["clean", "taskset"]
# From the name of a data set, and how images or text of it are asked for, to the data.
Load: TypeAlias = Callable[..., Data]
T = TypeVar("T")


class Draw:
    """Random numbers in the ranges that TaskSet uses.

    Attributes:
        compat: "taskset" to keep the quirks of what was published, "clean" to mend them.
    """

    def __init__(self, generator: np.random.RandomState, compat: Compat) -> None:
        self.generator, self.compat = generator, compat

    def log_integer(self, low: int, high: int) -> int:
        """Returns exp(u) rounded, u uniform between log(low) and log(high)."""
        return round(self.log_uniform(float(low), float(high)))

    def log_uniform(self, low: float | int, high: float | int) -> float:
        """Returns exp(u), u uniform between log(low) and log(high)."""
        return math.exp(self.generator.uniform(math.log(low), math.log(high)))

    def uniform(self, low: float | int, high: float | int) -> float:
        """Returns a uniform number."""
        return float(self.generator.uniform(low, high))

    def normal(self, mean: float, deviation: float) -> float:
        """Returns a normal number."""
        return float(self.generator.normal(mean, deviation))

    def integer(self, count: int) -> int:
        """Returns an integer from 0 to count - 1."""
        return int(self.generator.randint(count))

    def choice(self, options: Sequence[T], weights: Sequence[float | int] | None = None) -> T:
        """Returns one of the options, in proportion to the weights."""
        shares = None if weights is None else np.divide(weights, sum(weights))
        return options[int(self.generator.choice(len(options), p=shares))]

    def flag(self, probability: float) -> bool:
        """Returns True with that probability."""
        return bool(self.generator.uniform() < probability)


def drawn(function: Callable[[Draw], Any]) -> Any:
    """A field that `function` samples."""
    return drawn_after(lambda draw, _: function(draw))


def drawn_after(function: Callable[[Draw, dict[str, Any]], Any]) -> Any:
    """A field that `function` samples, given those before it by name."""
    return dataclasses.field(metadata={"draw": function})


def choice(*options: Any, weights: Sequence[float | int] | None = None) -> Any:
    """A field that is one of some options."""
    return drawn(lambda draw: draw.choice(options, weights))


class Sampled:
    """A frozen dataclass whose fields, in their order, say how they are sampled."""

    @classmethod
    def draw(cls, draw: Draw) -> Any:
        """Samples all fields."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(typing.cast(Any, cls)):
            found[field.name] = field.metadata["draw"](draw, found)
        return cls(**found)


class Config(Sampled, abc.ABC):
    """What a task of a family is made from; a frozen dataclass."""

    family: ClassVar[str]
    offset: ClassVar[int]  # added to the seed in the published code: 0 for most

    @abc.abstractmethod
    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives the data of a name."""


FAMILIES: dict[str, type[Config]] = {}


@dataclass_transform(frozen_default=True)
def family(name: str, offset: int = 0) -> Callable[[type[T]], type[T]]:
    """Makes a frozen dataclass, and one of the families, under the name that TaskSet gives it."""

    def add(cls: Any) -> Any:
        cls.family, cls.offset = name, offset
        FAMILIES[name] = dataclasses.dataclass(frozen=True)(cls)
        return FAMILIES[name]

    return add


def sample(name: str, seed: int, compat: Compat = "clean") -> Config:
    """Samples a configuration of a family.

    Args:
        name: of the family, such as "mlp_family".
        seed: from 0; the same one gives the same configuration.
        compat: "taskset" keeps what the published samplers do, quirks included: NumPy's old random
            numbers in the published order, for most families from the bare seed, so that those of
            one seed have much in common. "clean" gives every family numbers of its own.

    Example:
        >>> from lopt.tasks import taskset
        >>> config = taskset.sample("mlp_family", 12)
        >>> taskset.from_json(taskset.to_json(config)) == config
        True
    """
    cls = FAMILIES[known("family", name, FAMILIES)]
    if seed < 0:
        raise ValueError(f"sample(seed={seed}) must not be negative; try 0.")
    own = seed + cls.offset if compat == "taskset" else [seed, *name.encode()]
    return cls.draw(Draw(np.random.RandomState(own), compat))


def parse(name: str) -> tuple[str, int]:
    """Returns family and seed of a task's name, `<family>_seed<N>`."""
    own, _, seed = name.rpartition("_seed")
    if not (seed.isascii() and seed.isdigit()):
        raise ValueError(f"There is no task {name!r}; try {next(iter(FAMILIES))}_seed0.")
    return known("task", own, FAMILIES), int(seed)


def to_json(config: Config) -> dict[str, Any]:
    """Returns a configuration as JSON values."""
    return {"family": config.family, **dataclasses.asdict(typing.cast(Any, config))}


def from_json(values: dict[str, Any]) -> Config:
    """Returns the configuration that `to_json` wrote; refuses wrong or missing fields by name."""
    name = known("config family", values.get("family"), FAMILIES)
    rest = {key: value for key, value in values.items() if key != "family"}
    return _read(FAMILIES[name], rest, name)


def known(what: str, name: Any, names: Sequence[str] | dict[str, Any]) -> str:
    """Returns a name that is among others; refuses it with the closest one otherwise."""
    if name in names:
        return name
    closest = difflib.get_close_matches(str(name), names, 1, 0.0)
    raise ValueError(f"There is no {what} {name!r}; try {closest[0]!r}.")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Returns a JSON value as what a field is annotated with."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        given = value if isinstance(value, dict) else {}
        for name in given:
            known(f"field of {where}", name, fields)
        if lacking := fields.keys() - given.keys():
            raise ValueError(f"{where} lacks {', '.join(sorted(lacking))}; add it to the config.")
        return typing.cast(Any, kind)(
            **{name: _read(hint, given[name], f"{where}.{name}") for name, hint in fields.items()}
        )
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _read(next(part for part in parts if part is not type(None)), value, where)
    if origin is Literal:
        return known(where, value, parts)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_read(parts[0], one, where) for one in value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise ValueError(f"{where}={value!r} must be {getattr(kind, '__name__', kind)}.")
