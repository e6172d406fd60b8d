"""The options of the studies of short horizons, once; see `settings`."""

import dataclasses
import math

from lopt.experiment.settings import POSITIVE, check

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


@dataclasses.dataclass(frozen=True)
class QuadraticSettings:
    """Solve the noisy quadratic: greedy, fixed and optimised schedules, against the published."""


@dataclasses.dataclass(frozen=True)
class SurfaceSettings:
    """Map the loss after each horizon over learning rate and decay, on a real network.

    Killed, it goes on where it was.
    """

    dataset: str = "digits"  # digits, mnist, fashion_mnist or cifar10.
    horizons: tuple[int, ...] = (10, 100, 1000)  # inner steps, increasing.
    points: int = 400  # pairs of learning rate and power of the decay; a square number for a grid.
    sample: str = "grid"  # grid or random.
    # of the decay, in inner steps; a quarter of the longest horizon by default.
    time_constant: float | None = None
    batches: int = 20  # training batches that each loss is averaged over.
    seed: int = 0  # of everything random.

    def __post_init__(self) -> None:
        check(self, dataset=NETWORKS, horizons=1, points=4, batches=1)
        check(self, sample=("grid", "random"), time_constant=POSITIVE)
        if list(self.horizons) != sorted(self.horizons):
            raise ValueError(f"--horizons {self.horizons} must increase; try 10 100 1000.")
        square = math.isqrt(self.points) ** 2
        if self.sample == "grid" and square != self.points:
            raise ValueError(f"--points {self.points} must be a square for a grid; try {square}.")

    @property
    def decay_time(self) -> float:
        """The time constant of the decay."""
        return self.time_constant or max(self.horizons) / 4


@dataclasses.dataclass(frozen=True)
class DescentSettings:
    """Descend on learning rate and decay by the gradient of the loss after each horizon.

    Every outer step begins again from the same weights. Killed, it goes on where it was.
    """

    dataset: str = "digits"  # digits, mnist, fashion_mnist or cifar10.
    horizons: tuple[int, ...] = (10, 100)  # inner steps, one descent for each.
    learning_rate: tuple[float, ...] = (0.01,)  # where descents begin.
    # of the decay, where descents begin; all pairs are tried.
    power: tuple[float, ...] = (0.1, 10.0)
    # of the decay, in inner steps; that of the folder's surface, or a quarter of the longest
    # horizon, by default.
    time_constant: float | None = None
    num_meta_steps: int = 200  # outer steps of each descent.
    meta_learning_rate: float = 0.05  # of the outer Adam, per unit of the logarithms.
    particles: int = 1  # runs per outer step, on minibatches of their own.
    seed: int = 0  # of everything random.

    def __post_init__(self) -> None:
        check(self, dataset=NETWORKS, horizons=1, num_meta_steps=1, particles=1)
        check(self, learning_rate="[0.0001, 10]", power="[0.0001, 1000]")
        check(self, time_constant=POSITIVE, meta_learning_rate=POSITIVE)


@dataclasses.dataclass(frozen=True)
class BestSettings:
    """Train to the end with what each horizon chose, from several initialisations."""

    dataset: str = "digits"  # digits, mnist, fashion_mnist or cifar10.
    steps: int | None = None  # inner steps; the longest horizon of the surface by default.
    seeds: int = 3  # initialisations.

    def __post_init__(self) -> None:
        check(self, dataset=NETWORKS, steps=1, seeds=1)


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """Tune the learning rate while training, by looking ahead, against a tuned schedule."""

    dataset: str = "digits"  # digits, mnist, fashion_mnist or cifar10.
    steps: int = 5000  # of training.
    num_meta_steps: int = 10  # outer steps between two stretches of training.
    steps_per_update: int = 100  # inner steps of each stretch of training.
    look_ahead: int = 5  # inner steps.
    learning_rate: tuple[float, ...] = (0.001, 0.01, 0.1)  # where runs begin.
    seeds: int = 3  # initialisations of each.

    def __post_init__(self) -> None:
        check(self, dataset=NETWORKS, learning_rate="[0.0001, 1]", steps=1, seeds=1)
        check(self, num_meta_steps=1, steps_per_update=1, look_ahead=1)
        if self.steps % self.steps_per_update:
            near = max(1, self.steps // self.steps_per_update) * self.steps_per_update
            raise ValueError(
                f"--steps-per-update {self.steps_per_update} must divide --steps {self.steps}; "
                f"try --steps {near}."
            )
        if self.long_outer_steps < 1:
            raise ValueError(
                f"--steps {self.steps} is too small a budget for a meta-descent over "
                f"{self.long_horizon} of them; try more of them, or of --learning-rate."
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
