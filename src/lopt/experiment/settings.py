"""Every option of the command line, once: its name, type, default, help and checks.

A dataclass is a command; its docstring is the help. Nothing here needs JAX, so that
`lopt COMMAND --help` answers before JAX is loaded.
"""

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Annotated, Any

# How an option is given, where its type does not say so.
Repeated = Annotated[tuple[str, ...], "repeated"]
Hidden = Annotated[int, "hidden"]
Positional = Annotated[str | None, "positional"]


def help_of(settings: Any) -> tuple[str, dict[str, str]]:
    """Returns what a dataclass says of itself, and of each of its fields."""
    text, _, fields = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")
    fields = re.sub(r"\n {8}", " ", fields)
    return text.strip(), dict(re.findall(r"^ {4}(\w+): (.*)$", fields, re.MULTILINE))


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
class TrainSettings:
    """Meta-train an optimizer, then evaluate it.

    Attributes:
        recipe: the name of a recipe, such as digits, or a Python file that defines one.
        settings: change a field of the recipe; may be repeated. With --resume, outer_steps alone.
        start: train on what a run trained, on --task; instead of a recipe (it is then transfer).
        task: with --from, data set and network, such as digits_conv or fashion_mnist_mlp.
        run: the folder of the new run; runs/RECIPE, numbered if need be, by default.
        resume: the folder of a run to continue, instead of a recipe.
        trust: run the recipe file that a run to continue names, or has brought along.
    """

    recipe: Positional = None
    settings: Repeated = ()
    start: Path | None = None
    task: str | None = None
    run: Path | None = None
    resume: Path | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        if sum(option is not None for option in (self.recipe, self.resume, self.start)) != 1:
            raise ValueError(
                "lopt train takes a recipe, or --from RUN --task NAME, or --resume RUN: one of "
                "them."
            )
        if self.resume is not None and self.run is not None:
            raise ValueError("lopt train --resume RUN takes no --run: it goes on in its folder.")
        if (self.task is None) != (self.start is None):
            raise ValueError("--from RUN and --task NAME go together; try --task digits_conv.")


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """Meta-train the constants of a distilled rule, and a multiplier per type of tensor.

    It is `lopt train --from RULE` with the setting tensor_types=True: it resumes likewise, with
    lopt train --resume RUN.

    Attributes:
        rule: the folder that lopt distill wrote, or any weights of lopt.
        task: data set and network, such as digits_conv, digits_resnet or cifar10_resnet50.
        settings: change a field of the recipe transfer; may be repeated.
        run: the folder of the new run; runs/tune, numbered if need be, by default.
    """

    rule: Annotated[Path, "positional"]
    task: str = "digits_conv"
    settings: Repeated = ()
    run: Path | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Evaluate a run's latest weights against tuned SGD, momentum and Adam."""


@dataclasses.dataclass(frozen=True)
class RecipesSettings:
    """List the recipes that come with lopt."""


@dataclasses.dataclass(frozen=True)
class SanitySettings:
    """Distil known optimizers from 20 raw gradients.

    Attributes:
        seed: of everything random.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """Record what a run's optimizer sees and does, as a table for symbolic regression.

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
        output: the file, ending in .npz or .npy; RUN/table.npz by default.
    """

    rows: int = 50_000
    steps: int = 300
    features: tuple[str, ...] = ()
    lags: int | None = None
    target: str | None = None
    per_tensor: int = 10
    padded: bool = False
    keep_dead: bool = False
    at_once: Hidden = 8
    also: tuple[str, ...] = ()
    decays: tuple[float, ...] = ()
    seed: int = 0
    output: Path | None = None

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
    """Distil a run's optimizer into a short equation, score it, and train with it.

    Killed and started again, it goes on with what it has recorded and found.

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
    seeds: int = 2
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
    """Measure bias, noise and cost of every estimator, and draw slices of the meta-loss.

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

    settings: Repeated = ()
    horizon: int | None = None
    truncation: int | None = None
    particles: int = 8
    sigma: float = 0.01
    directions: int = 1
    samples: int = 64
    only: Repeated = ()
    seed: int = 0
    weights: Path | None = None
    at_once: Hidden = 8
    exact_below: Hidden = 8

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
    """Find out how long a truncation has to be, and what shorter ones would do.

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

    settings: Repeated = ()
    horizon: int | None = None
    truncations: tuple[int, ...] | None = None
    episodes: int = 8
    positions: int = 13
    reach: float = 30.0
    tolerance: float = 0.1
    seed: int = 0
    weights: Path | None = None

    def __post_init__(self) -> None:
        check(self, horizon=1, episodes=2, positions=3)
        if self.positions % 2 == 0:
            raise ValueError(f"--positions {self.positions} must be odd; try {self.positions + 1}.")
        if not 1 < self.reach < math.inf:
            raise ValueError(f"--reach {self.reach} must be above one and finite; try 30.")
        check_positive("tolerance", self.tolerance, 0.1)


@dataclasses.dataclass(frozen=True)
class DynamicsSettings:
    """Measure the dynamics of a run's optimizer, beside SGD, momentum, Adam and Lion.

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
    """See which symmetries of its networks a run's optimizer breaks, beside SGD, Adam and Lion.

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
