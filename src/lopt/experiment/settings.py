"""Every option of the command line, once: its name, type, default, help and checks.

Nothing here needs JAX, so that `lopt VERB --help` answers before JAX is loaded.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
Fields = Annotated[Repeated, tyro.conf.arg(name="set", metavar="FIELD=VALUE")]

# Backends of `lopt distill`.
SEARCHES = ("template", "operon", "gplearn", "pysr")


def check(settings: Any, **least: int) -> None:
    """Refuses fields that are not integers of at least so much, and wrong seeds."""
    for name, fewest in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if type(value) is not int or value < fewest:
            raise ValueError(
                f"{type(settings).__name__}({name}={value!r}) must be an integer of at least "
                f"{fewest}; try {getattr(type(settings), name) or 10 * max(1, fewest)}."
            )
    if not 0 <= getattr(settings, "seed", 0) < 2**32:
        raise ValueError(f"--seed {settings.seed} must be between 0 and {2**32 - 1}.")


def check_one_of(option: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuses names that are not known."""
    for value in values:
        if value not in known:
            raise ValueError(f"--{option} {value} must be one of {', '.join(known)}.")


def check_positive(option: str, value: float | None, hint: float) -> None:
    """Refuses what is not positive and finite."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"--{option} {value} must be positive and finite; try {hint:g}.")


def check_decays(owner: str, decays: tuple[float, ...]) -> None:
    """Refuses decays outside of (0, 1), and repeated ones."""
    for decay in decays:
        if not 0 < decay < 1:
            raise ValueError(f"{owner}: the decay {decay} must be above 0 and below 1; try 0.9.")
        if decays.count(decay) > 1:
            raise ValueError(f"{owner}: the decay {decay} is there twice; leave one out.")


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """What is recorded.

    Attributes:
        rows: of the table.
        steps: of each recorded training; more are recorded until a table can take one row of ten.
        features: names of columns, with their lags as in gradient[t-2]; by default all that the
            rule gets.
        lags: raw gradients of so many steps, instead of features.
        target: what is to be explained: output, or output_0 and so on, or update; by default the
            rule's output if it has one, and otherwise the update.
        per_tensor: coordinates recorded of each tensor.
        padded: count gradients before the first step as zeros; rows that need them are left out
            otherwise.
        keep_dead: keep coordinates that have no gradient for 20 steps.
        at_once: runs side by side.
        also: features besides those that the rule gets, such as m_normalised or momentum_0.9.
        decays: of exponential averages of what the rule gets, features as well.
        seed: of everything random.
    """

    rows: int = 50_000
    steps: int = 300
    features: tuple[str, ...] = ()
    lags: int | None = None
    target: str | None = None
    per_tensor: int = 10
    padded: bool = False
    keep_dead: bool = False
    at_once: tyro.conf.Suppress[int] = 8
    also: tuple[str, ...] = ()
    decays: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, rows=1, steps=1, per_tensor=1, at_once=1, lags=1)
        if self.lags is not None:
            if self.lags > self.steps:
                raise ValueError(
                    f"RecordSettings(lags={self.lags}) must be at most steps={self.steps}; try 20."
                )
            if self.features or self.also or self.decays:
                raise ValueError(
                    f"RecordSettings(features={self.features}, also={self.also}, "
                    f"decays={self.decays}, lags={self.lags}): lags stand for raw gradients and "
                    "features for themselves; give one of the two."
                )
        check_decays("RecordSettings(decays)", self.decays)
        for feature in self.features:
            split_lag(feature)


def split_lag(text: str) -> tuple[str, int]:
    """Returns the name and the lag of a feature as it is printed.

    Raises:
        ValueError: if what stands in its brackets is not t minus a number of steps.

    Example:
        >>> split_lag("gradient[t-2]")
        ('gradient', 2)
    """
    name, bracket, rest = text.partition("[")
    lag = rest.removeprefix("t-").removesuffix("]")
    if not name or (bracket and (f"t-{lag}]" != rest or not lag.isdecimal())):
        raise ValueError(f"{text!r} is no feature; write it as gradient, or as gradient[t-2].")
    return name, int(lag) if bracket else 0


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """How a run is distilled.

    Attributes:
        rows: of the recorded table.
        steps: of each recorded training.
        history: how many steps back every feature is looked at, for rules with a memory.
        also: features besides those that the rule sees, such as m_normalised or momentum_0.9; for
            rules with a memory warmup_0.98 by default, which is 1 - 0.98^t.
        decays: of exponential averages of what the rule sees, features as well; for rules with a
            memory 0.5, 0.9 and 0.98 by default.
        lags: raw gradients of so many steps, instead of features.
        columns: what the equation may be made of, as m for a feature with its past, or m[t-1] for
            one step of it; by default all that is recorded.
        search: a backend: template, operon, gplearn or pysr; may be repeated; by default template,
            and operon where it is installed.
        seeds: of each search.
        search_rows: rows that a search sees; all of them are fitted in the end.
        odd: a feature that changes sign with the gradient, and its averages with it; may be
            repeated. If there is any, u(-g) = -u(g) is imposed.
        longest: the most nodes of the equation that is chosen; a weight times a variable is three.
            It may be asked for afterwards: what was found is kept.
        digits: significant ones of printed constants, more where they are needed.
        seed: of everything random.
    """

    rows: int = 20_000
    steps: int = 200
    history: int = 2
    also: tuple[str, ...] | None = None
    decays: tuple[float, ...] | None = None
    lags: int | None = None
    columns: tuple[str, ...] | None = None
    search: Repeated = ()
    seeds: int = 3
    search_rows: int = 2000
    odd: Repeated = ()
    longest: int | None = None
    digits: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, rows=100, steps=1, history=0, seeds=1, search_rows=10, longest=1, digits=1)
        if self.digits > 17:
            raise ValueError(f"--digits {self.digits} must be from 1 to 17; try 3.")
        check_decays("DistillSettings(decays)", self.decays or ())
        check_one_of("search", self.search, SEARCHES)
        if self.history >= self.steps:
            raise ValueError(
                f"DistillSettings(history={self.history}, steps={self.steps}) looks back further "
                f"than a training goes; try --history 2 or --steps {10 * self.history}."
            )


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """What estimators are measured with.

    Attributes:
        settings: change a field of the recipe; may be repeated.
        horizon: inner steps per episode; the recipe's, but at most 40, by default.
        truncation: inner steps per window; divides the horizon, a quarter of it by default.
        particles: pairs of episodes that variances are given for; even.
        sigma: perturbation of theta.
        directions: random directions of forward mode, for more than 8 weights.
        samples: pairs of episodes that each estimator is measured on; the truth takes twice these.
        only: an estimator to measure, or how its name begins; may be repeated; all that give a
            gradient by default, so not RankedES and RandomSearch.
        seed: of everything random.
        weights: a file of weights or a run's folder; initial weights by default.
        at_once: pairs of episodes computed side by side.
        exact_below: weights up to which forward mode takes all directions.
    """

    settings: Fields = ()
    horizon: int | None = None
    truncation: int | None = None
    particles: int = 8
    sigma: float = 0.01
    directions: int = 1
    samples: int = 64
    only: Repeated = ()
    seed: int = 0
    weights: Path | None = None
    at_once: tyro.conf.Suppress[int] = 8
    exact_below: tyro.conf.Suppress[int] = 8

    def __post_init__(self) -> None:
        check(self, directions=1, at_once=1, horizon=1, truncation=1)
        if self.particles < 4 or self.particles % 2:
            raise ValueError(f"particles={self.particles} must be even, and at least 4; try 8.")
        if self.samples < 2 * self.particles:
            raise ValueError(
                f"samples={self.samples} must be at least twice particles={self.particles}."
            )


@dataclasses.dataclass(frozen=True)
class HorizonSettings:
    """How short truncations are measured.

    Attributes:
        settings: change a field of the recipe; may be repeated.
        horizon: inner steps that count as the truth; the recipe's, but at most 200, by default.
        truncations: inner steps, increasing, ending with the horizon; chosen by default.
        episodes: over how many the means are.
        positions: of each hyperparameter, or of the scale of a rule's updates, odd.
        reach: the largest factor on each hyperparameter; the smallest is its inverse.
        tolerance: share of the gradient's norm that its bias, and of the meta-loss that its excess,
            may be.
        seed: of everything random.
        weights: a file of weights or a run's folder; initial weights by default.
    """

    settings: Fields = ()
    horizon: int | None = None
    truncations: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="STEPS ...")] = None
    episodes: int = 8
    positions: int = 13
    reach: float = 30.0
    tolerance: float = 0.1
    seed: int = 0
    weights: Path | None = None

    def __post_init__(self) -> None:
        check(self, horizon=1)
        check_positive("tolerance", self.tolerance, 0.1)


@dataclasses.dataclass(frozen=True)
class DynamicsSettings:
    """What is measured of the dynamics of optimizers.

    Attributes:
        steps: of each training; the run's horizon, but at most 500, by default.
        seeds: fresh tasks of the run, each with initial params and batches of its own.
        seed: of everything random.
        batches: at each moment that noise is measured at.
        moments: at which it is, besides the beginning.
        starts: along each side of the valley; even, so that none is the origin.
        rows: of recorded inputs, at which response curves are drawn.
    """

    steps: int | None = None
    seeds: int = 3
    seed: int = 0
    batches: int = 64
    moments: int = 4
    starts: int = 6
    rows: int = 200

    def __post_init__(self) -> None:
        check(self, steps=10, seeds=1, batches=4, moments=1, starts=2, rows=2)


@dataclasses.dataclass(frozen=True)
class SymmetrySettings:
    """What is measured of broken symmetries.

    Attributes:
        steps: of each training; the run's horizon, but at most 500, by default.
        seeds: fresh tasks of the run, each with initial params and batches of its own.
        seed: of everything random, but for the meta-training, which has the run's.
        outer_steps: of the run's meta-training that are done again and watched, from its beginning;
            0 for none.
    """

    steps: int | None = None
    seeds: int = 3
    seed: int = 0
    outer_steps: int = 40

    def __post_init__(self) -> None:
        check(self, steps=2, seeds=1, outer_steps=0)
