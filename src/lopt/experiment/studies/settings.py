"""The options of the studies of short horizons, once; see `settings`."""

import dataclasses
import math
from typing import Any

from lopt.experiment.settings import check, check_one_of, check_positive

# Of each data set: the network's name in `named_tasks`, pixels on each side, the batch size, and
# the learning rate of the warm start.
NETWORKS = {
    "digits": ("mlp", 8, 128, 0.1),
    "mnist": ("mlp100x100", 28, 100, 0.1),
    "fashion_mnist": ("mlp100x100", 28, 100, 0.1),
    "cifar10": ("conv5x5", 32, 100, 5e-3),
}
# Fixed offline; where it begins online.
MOMENTUM = 0.9
# What a step of forward mode with two directions costs at most, in plain steps.
FORWARD = 1 + 2 * 2


def _check_study(settings: Any, **least: int) -> None:
    """Refuses what is wrong in the settings of any study; integers are of at least so much."""
    check(settings, **least)
    check_one_of("dataset", (settings.dataset,), tuple(NETWORKS))
    horizons = getattr(settings, "horizons", (1,))
    if not horizons or list(horizons) != sorted(set(horizons)) or horizons[0] < 1:
        raise ValueError(
            f"--horizons {' '.join(map(str, horizons)) or '(none)'} must be positive numbers of "
            "inner steps in increasing order; try 10 100 1000."
        )
    check_positive("time-constant", getattr(settings, "time_constant", None), max(horizons) / 4)


def _check_range(option: str, values: tuple[float, ...], low: float, high: float) -> None:
    if not values or len(set(values)) < len(values) or not all(low <= v <= high for v in values):
        raise ValueError(
            f"--{option} {' '.join(map(str, values)) or '(none)'} must be different numbers "
            f"between {low:g} and {high:g}."
        )


@dataclasses.dataclass(frozen=True)
class QuadraticSettings:
    """Solve the noisy quadratic: greedy, fixed and optimised schedules, against the published."""


@dataclasses.dataclass(frozen=True)
class SurfaceSettings:
    """Map the loss after each horizon over learning rate and decay, on a real network.

    Killed, it goes on where it was.

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
    horizons: tuple[int, ...] = (10, 100, 1000)
    points: int = 400
    sample: str = "grid"
    time_constant: float | None = None
    batches: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _check_study(self, batches=1)
        check_one_of("sample", (self.sample,), ("grid", "random"))
        side = math.isqrt(max(0, self.points))
        if self.points < 4 or (self.sample == "grid" and side**2 != self.points):
            raise ValueError(
                f"--points {self.points} must be at least 4, and a square for a grid; "
                f"try {max(2, side) ** 2}."
            )

    @property
    def decay_time(self) -> float:
        """The time constant of the decay."""
        return max(self.horizons) / 4 if self.time_constant is None else self.time_constant


@dataclasses.dataclass(frozen=True)
class DescentSettings:
    """Descend on learning rate and decay by the gradient of the loss after each horizon.

    Every outer step begins again from the same weights. Killed, it goes on where it was.

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
    horizons: tuple[int, ...] = (10, 100)
    learning_rate: tuple[float, ...] = (0.01,)
    power: tuple[float, ...] = (0.1, 10.0)
    time_constant: float | None = None
    num_meta_steps: int = 200
    meta_learning_rate: float = 0.05
    particles: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_study(self, num_meta_steps=1, particles=1)
        _check_range("learning-rate", self.learning_rate, 1e-4, 10.0)
        _check_range("power", self.power, 1e-4, 1e3)
        check_positive("meta-learning-rate", self.meta_learning_rate, 0.05)


@dataclasses.dataclass(frozen=True)
class BestSettings:
    """Train to the end with what each horizon chose, from several initialisations.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        steps: inner steps; the longest horizon of the surface by default.
        seeds: initialisations.
    """

    dataset: str = "digits"
    steps: int | None = None
    seeds: int = 3

    def __post_init__(self) -> None:
        _check_study(self, steps=1, seeds=1)


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """Tune the learning rate while training, by looking ahead, against a tuned schedule.

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
        _check_study(self, steps=1, num_meta_steps=1, steps_per_update=1, look_ahead=1, seeds=1)
        if self.steps % self.steps_per_update:
            near = max(1, self.steps // self.steps_per_update) * self.steps_per_update
            raise ValueError(
                f"--steps-per-update {self.steps_per_update} must divide --steps {self.steps}; "
                f"try --steps {near}."
            )
        _check_range("learning-rate", self.learning_rate, 1e-4, 10 * (1 - MOMENTUM))
        if self.long_outer_steps < 1:
            raise ValueError(
                f"--steps {self.steps} with {len(self.learning_rate)} initial learning rates is "
                f"too small a budget for a meta-descent over {self.long_horizon} of them; try more."
            )

    @property
    def budget(self) -> int:
        """Plain inner steps that all initial rates cost together, for one seed."""
        updates = self.steps // self.steps_per_update
        ahead = updates * self.num_meta_steps * self.look_ahead * (FORWARD + 1)
        return len(self.learning_rate) * (self.steps + ahead)

    @property
    def long_horizon(self) -> int:
        """The horizon of the meta-descent on the same budget: a fifth of the run."""
        return max(1, self.steps // 5)

    @property
    def long_outer_steps(self) -> int:
        """How many steps of meta-descent over the long horizon the budget pays for."""
        return (self.budget - self.steps) // (self.long_horizon * FORWARD)
