"""The options of the studies of short horizons, once; see `settings`."""

import dataclasses
import math
from typing import Annotated

import tyro

from lopt.experiment.settings import check, check_one_of, check_positive

Horizons = Annotated[tuple[int, ...], tyro.conf.arg(metavar="STEPS ...")]
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")


def _check_horizons(horizons: tuple[int, ...]) -> None:
    if not horizons or list(horizons) != sorted(set(horizons)) or horizons[0] < 1:
        raise ValueError(
            f"--horizons {' '.join(map(str, horizons)) or '(none)'} must be positive numbers of "
            "inner steps in increasing order; try 10 100 1000."
        )


def _check_rates(option: str, values: tuple[float, ...], low: float, high: float) -> None:
    if not values or len(set(values)) < len(values) or not all(low <= v <= high for v in values):
        raise ValueError(
            f"--{option} {' '.join(map(str, values)) or '(none)'} must be different numbers "
            f"between {low:g} and {high:g}."
        )


@dataclasses.dataclass(frozen=True)
class SurfaceSettings:
    """What a surface is of; two of the same settings are the same surface.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        horizons: inner steps, increasing.
        points: pairs of learning rate and power of the decay; a square number for a grid.
        sample: grid or random.
        time_constant: of the decay, in inner steps; a quarter of the longest horizon by default.
        batches: training batches that each loss is averaged over.
        seed: of everything random.
    """

    dataset: str = "digits"
    horizons: Horizons = (10, 100, 1000)
    points: int = 400
    sample: str = "grid"
    time_constant: float | None = None
    batches: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("dataset", (self.dataset,), DATASETS)
        _check_horizons(self.horizons)
        check_one_of("sample", (self.sample,), ("grid", "random"))
        side = math.isqrt(max(0, self.points))
        if self.points < 4 or (self.sample == "grid" and side**2 != self.points):
            raise ValueError(
                f"--points {self.points} must be at least 4, and a square for a grid; "
                f"try {max(2, side) ** 2}."
            )
        check_positive("time-constant", self.time_constant, max(self.horizons) / 4)
        check(self, batches=1)

    @property
    def decay_time(self) -> float:
        """The time constant of the decay."""
        return max(self.horizons) / 4 if self.time_constant is None else self.time_constant

    @property
    def field_horizons(self) -> tuple[int, ...]:
        """The horizons that have a field."""
        return self.horizons[:-1] or self.horizons


@dataclasses.dataclass(frozen=True)
class DescentSettings:
    """Which meta-descents are run.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        horizons: inner steps, one descent for each.
        learning_rate: where descents begin.
        power: of the decay, where descents begin; all pairs are tried.
        time_constant: of the decay, in inner steps; that of the folder's surface, or a quarter of
            the longest horizon, by default.
        num_meta_steps: outer steps of each descent.
        meta_learning_rate: of the outer Adam, per unit of the logarithms.
        particles: runs per outer step, on minibatches of their own.
        seed: of everything random.
    """

    dataset: str = "digits"
    horizons: Horizons = (10, 100)
    learning_rate: tuple[float, ...] = (0.01,)
    power: tuple[float, ...] = (0.1, 10.0)
    time_constant: float | None = None
    num_meta_steps: int = 200
    meta_learning_rate: float = 0.05
    particles: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("dataset", (self.dataset,), DATASETS)
        _check_horizons(self.horizons)
        _check_rates("learning-rate", self.learning_rate, 1e-4, 10.0)
        _check_rates("power", self.power, 1e-4, 1e3)
        check(self, num_meta_steps=1, particles=1)
        check_positive("meta-learning-rate", self.meta_learning_rate, 0.05)
        check_positive("time-constant", self.time_constant, max(self.horizons) / 4)


# Momentum of the online runs, whose effective rates are learned, between 1e-4 and 10.
MOMENTUM = 0.9
# What a step of forward mode with k directions costs at most, in plain steps: 1 + 2 k.
HYPERPARAMETERS = 2
# The escape looks ahead over this share of the whole run.
LONG = 5


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """What is tuned while training.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        steps: of training.
        num_meta_steps: outer steps between two stretches of training.
        steps_per_update: inner steps of each stretch of training.
        look_ahead: inner steps.
        learning_rate: where runs begin.
        seeds: initialisations of each.
    """

    dataset: str = "digits"
    steps: int = 5000
    num_meta_steps: int = 10
    steps_per_update: int = 100
    look_ahead: int = 5
    learning_rate: tuple[float, ...] = (0.001, 0.01, 0.1)
    seeds: int = 3

    def __post_init__(self) -> None:
        check_one_of("dataset", (self.dataset,), DATASETS)
        check(self, steps=1, num_meta_steps=1, steps_per_update=1, look_ahead=1, seeds=1)
        if self.steps % self.steps_per_update:
            near = max(1, self.steps // self.steps_per_update) * self.steps_per_update
            raise ValueError(
                f"--steps-per-update {self.steps_per_update} must divide --steps {self.steps}; "
                f"try --steps {near}."
            )
        _check_rates("learning-rate", self.learning_rate, 1e-4, 10 * (1 - MOMENTUM))
        if self.long_outer_steps < 1:
            raise ValueError(
                f"--steps {self.steps} with {len(self.learning_rate)} initial learning rates is "
                f"too small a budget for a meta-descent over {self.long_horizon} of them; try more."
            )

    @property
    def budget(self) -> int:
        """Plain inner steps that all initial rates cost together, for one seed."""
        ahead = self.look_ahead * (1 + 2 * HYPERPARAMETERS) + self.look_ahead
        updates = self.steps // self.steps_per_update
        one = self.steps + updates * self.num_meta_steps * ahead
        return len(self.learning_rate) * one

    @property
    def long_horizon(self) -> int:
        """The horizon of the escape, inner steps."""
        return max(1, self.steps // LONG)

    @property
    def long_outer_steps(self) -> int:
        """How many steps of meta-descent over the long horizon the budget pays for."""
        one = self.long_horizon * (1 + 2 * HYPERPARAMETERS)
        return (self.budget - self.steps) // one
