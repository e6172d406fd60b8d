"""Every option of the command line, once: its name, type, default, help and checks.

A dataclass is a command; its docstring is the help, and comments are that of the options. Nothing
here needs JAX, so that `lopt COMMAND --help` answers before JAX is loaded.
"""

import dataclasses
import inspect
import linecache
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

# How an option is given, where its type does not say so: the name that `tyro.conf` has for it.
Repeated = Annotated[tuple[str, ...], "UseAppendAction"]
Hidden = Annotated[int, "Suppress"]
Positional = Annotated[str | None, "Positional"]
Several = Annotated[tuple[str, ...], "Positional"]


def help_of(settings: Any) -> tuple[str, dict[str, str]]:
    """Returns what a dataclass says of itself, and of its fields: in comments at or above them."""
    try:
        path = inspect.getfile(settings)
    except TypeError:  # a recipe's file, which is not among the imported modules
        path = inspect.getfile(settings.build)
    source = "".join(linecache.getlines(path))
    body = re.split(rf"^class {settings.__name__}\b", source, flags=re.MULTILINE)[-1]
    body = re.split(r"\n    (?:@|def )|\n\n\n", body)[0]
    fields = re.findall(r"((?:^    # .*\n)*)^    (\w+): [^#\n]*(?:# (.*))?$", body, re.MULTILINE)
    above = [base for base in settings.__bases__ if dataclasses.is_dataclass(base)]
    comments = {name: text for base in above for name, text in help_of(base)[1].items()}
    comments |= {name: " ".join(re.findall("# (.*)", over)) + at for over, name, at in fields}
    return inspect.cleandoc(settings.__doc__ or ""), comments


# Backends of `lopt distill`.
SEARCHES = ("template", "operon", "pysr")
# Loggers of `lopt train`.
LOGGERS = ("tensorboard", "wandb")


# For `check`: how fields of recipes are given, and a range.
FIELD, POSITIVE = "--set {field}={value}", "(0, inf)"


def check(
    settings: Any, said: str = "--{option} {value}", **rules: int | str | Collection[str]
) -> None:
    """Refuses values of fields, alone or in tuples; seeds always. Defaults are suggested.

    A rule is the lowest number, an interval such as "(0, 1)", or all names there are; `said` is how
    a value was given.
    """
    for field, rule in {"seed": "[0, 4294967295]", **rules}.items():
        given, default = getattr(settings, field, None), getattr(type(settings), field, None)
        option = field.replace("_", "-")
        hint = default[0] if isinstance(default, tuple) and default else default
        if given == () and default:
            raise ValueError(f"--{option} must have a value; try {hint}.")
        values = given if isinstance(given, tuple) else () if given is None else (given,)
        for value in values:
            if isinstance(rule, int):
                good, must = value >= rule, f"at least {rule}"
                hint = max(hint or 10 * rule, rule)
            elif isinstance(rule, str):
                low, high = map(float, rule[1:-1].split(","))
                good = low < value < high or (rule[0] == "[" and value in (low, high))
                must = f"in {rule}"
            else:
                good, must = value in rule, f"one of {', '.join(rule)}"
            shown = said.format(option=option, field=field, value=value)
            if not good:
                raise ValueError(f"{shown} must be {must}{f'; try {hint}' * bool(hint)}.")
            if values.count(value) > 1:
                raise ValueError(f"{shown} is there twice; leave one out.")


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """Meta-train the constants of a distilled rule, and a multiplier per type of tensor.

    It is `lopt train --from RULE` with the setting tensor_types=True: it resumes likewise, with
    lopt train --resume RUN.
    """

    # the folder that lopt distill wrote, or any weights of lopt.
    rule: Annotated[Path, "Positional"]
    # the name of a task, such as digits_conv or mlp_family_seed7: see lopt tasks.
    task: str = "digits_conv"
    settings: Repeated = ()  # change a field of the recipe transfer; may be repeated.
    # the folder of the new run; runs/tune, numbered if need be, by default.
    run: Path | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Judge runs, weights and Optax optimizers against tuned baselines.

    All train from the same initial weights on the same batches. What is trained is kept: a command
    that is started again goes on, and baselines are trained once for all.
    """

    # folders of runs, files of weights, published ones too (see lopt.load_published), and names of
    # what comes with lopt, such as lopt-1.
    contestants: Several = ()
    # an Optax optimizer, or a function of its rate, as module:function; may be repeated.
    optimizer: Repeated = ()
    # quick, standard, far or validation; the run's own evaluations by default.
    suite: str | None = None
    # a baseline such as Adam or Muon, may be repeated; by default all in suites, and momentum
    # and Adam otherwise.
    baselines: Repeated = ()
    optlist: Path | None = None  # the file opt_list.json, for the baseline OptList in suites.
    seed: int = 0  # of everything random.
    # the folder of the results; the run's by default, or evaluation, numbered if need be.
    out: Path | None = None
    trust: bool = False  # run the recipe file that a run names, or has brought along.

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class TasksSettings:
    """List tasks by name, with what a step of each costs."""

    pattern: Positional = None  # what names match, such as "*conv*".
    # a family of TaskSet, such as mlp_family, whose first seeds are listed; may be repeated.
    family: Repeated = ()
    count: int = 10  # seeds of each family.
    # the most milliseconds that a step may take; tasks that have not been measured are then.
    max_step_time: float | None = None

    def __post_init__(self) -> None:
        check(self, count=1, max_step_time=POSITIVE)


@dataclasses.dataclass(frozen=True)
class ShowTaskSettings:
    """Show a task: its config, params, step time, initial loss, data and what stands for it."""

    name: Annotated[str, "Positional"]  # of the task, such as mlp_family_seed7.


@dataclasses.dataclass(frozen=True)
class RecipesSettings:
    """List the recipes that come with lopt."""


@dataclasses.dataclass(frozen=True)
class PretrainedSettings:
    """List the optimizers that come with lopt, or show the card of one."""

    name: Positional = None  # of one, such as lopt-1.


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Write a learned optimizer as one Python file that needs no lopt."""

    source: Positional = None  # the folder of a run, a file of weights, or a name such as lopt-1.
    to: str = "torch"  # torch, which then needs no JAX, or optax.
    out: Path | None = None  # the file; by default SOURCE_torch.py or SOURCE_optax.py.
    num_steps: int | None = None  # the length of the run, for rules that need it.
    # of all parameters, such as 64x32 32, for rules that are not coordinatewise.
    shapes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, to=("torch", "optax"), num_steps=1)
        self.sizes()

    def sizes(self) -> list[tuple[int, ...]]:
        """Returns shapes as numbers; `()` is that of a scalar."""
        wrong = [text for text in self.shapes if not re.fullmatch(r"\(\)|[0-9]+(x[0-9]+)*", text)]
        if wrong:
            raise ValueError(
                f"--shapes {wrong[0]!r} is no shape; try 64x32, 32, or () of a scalar."
            )
        return [tuple(map(int, re.findall("[0-9]+", text))) for text in self.shapes]


@dataclasses.dataclass(frozen=True)
class SanitySettings:
    """Distil known optimizers from 20 raw gradients."""

    seed: int = 0  # of everything random.

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """Record what a run's optimizer sees and does, as a table for symbolic regression."""

    rows: int = 50_000  # of the table.
    # of each recorded training; more are recorded until a table can take one row of ten.
    steps: int = 300
    # names of columns, with their lags as in gradient[t-2]; by default all that the rule gets.
    features: tuple[str, ...] = ()
    lags: int | None = None  # raw gradients of so many steps, instead of features.
    # what is to be explained: output, or output_0 and so on, or update; by default the rule's
    # output if it has one, and otherwise the update.
    target: str | None = None
    per_tensor: int = 10  # coordinates recorded of each tensor.
    # count gradients before the first step as zeros; rows that need them are left out otherwise.
    padded: bool = False
    at_once: Hidden = 8  # runs side by side.
    # features besides those that the rule gets, such as m_normalised or momentum_0.9.
    also: tuple[str, ...] = ()
    # of exponential averages of what the rule gets, features as well.
    decays: tuple[float, ...] = ()
    seed: int = 0  # of everything random.
    output: Path | None = None  # the file, ending in .npz or .npy; RUN/table.npz by default.

    def __post_init__(self) -> None:
        check(self, rows=1, steps=1, per_tensor=1, at_once=1, lags=1, decays="(0, 1)")
        if self.lags is not None:
            if self.lags > self.steps:
                raise ValueError(f"--lags {self.lags} must be at most --steps {self.steps}.")
            if self.features or self.also or self.decays:
                raise ValueError(
                    f"--features {self.features}, --also {self.also}, --decays {self.decays} and "
                    f"--lags {self.lags}: lags stand for raw gradients and features for "
                    "themselves; give one of the two."
                )
        for feature in self.features:
            split_lag(feature)


def split_lag(text: str) -> tuple[str, int]:
    """Returns the name and the lag of a feature as it is printed.

    Example:
        >>> split_lag("gradient[t-2]")
        ('gradient', 2)
    """
    found = re.fullmatch(r"([^[]+)(?:\[t-(\d+)\])?", text)
    if found is None:
        raise ValueError(f"{text!r} is no feature; write it as gradient, or as gradient[t-2].")
    return found[1], int(found[2] or 0)


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Distil a run's optimizer into a short equation, score it, and train with it.

    Killed and started again, it goes on with what it has recorded and found.
    """

    rows: int = 20_000  # of the recorded table.
    steps: int = 200  # of each recorded training.
    history: int = 2  # how many steps back every feature is looked at, for rules with a memory.
    # features besides those that the rule sees, such as m_normalised or momentum_0.9; for rules
    # with a memory warmup_0.98 by default, which is 1 - 0.98^t.
    also: tuple[str, ...] | None = None
    # of exponential averages of what the rule sees, features as well; for rules with a memory 0.5,
    # 0.9 and 0.98 by default.
    decays: tuple[float, ...] | None = None
    lags: int | None = None  # raw gradients of so many steps, instead of features.
    # what the equation may be made of, as m for a feature with its past, or m[t-1] for one step of
    # it; by default all that is recorded.
    columns: tuple[str, ...] | None = None
    # a backend: template, operon or pysr; may be repeated; by default template, and operon
    # where it is installed.
    search: Repeated = ()
    seeds: int = 2  # of each search.
    search_rows: int = 2000  # rows that a search sees; all of them are fitted in the end.
    # a feature that changes sign with the gradient, and its averages with it; may be repeated. If
    # there is any, u(-g) = -u(g) is imposed.
    odd: Repeated = ()
    # the most nodes of the equation that is chosen; a weight times a variable is three. It may be
    # asked for afterwards: what was found is kept.
    longest: int | None = None
    digits: int = 3  # significant ones of printed constants, more where they are needed.
    seed: int = 0  # of everything random.

    def __post_init__(self) -> None:
        check(self, rows=100, steps=1, history=0, seeds=1, search_rows=10, longest=1)
        check(self, digits="[1, 17]", decays="(0, 1)", search=SEARCHES)
        if self.history >= self.steps:
            raise ValueError(
                f"--history {self.history} looks back further than --steps {self.steps}; "
                f"try --history 2 or --steps {10 * self.history}."
            )


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Measure bias, noise and cost of every estimator, and draw slices of the meta-loss."""

    settings: Repeated = ()  # change a field of the recipe; may be repeated.
    horizon: int | None = None  # inner steps per episode; the recipe's, but at most 40, by default.
    # inner steps per window; divides the horizon, a quarter of it by default.
    truncation: int | None = None
    particles: int = 8  # pairs of episodes that variances are given for; even.
    sigma: float = 0.01  # perturbation of theta.
    directions: int = 1  # random directions of forward mode, for more than 8 weights.
    # pairs of episodes that each estimator is measured on; the truth takes twice these.
    samples: int = 64
    # an estimator to measure, or how its name begins; may be repeated; all that give a gradient by
    # default, so not RankedES and RandomSearch.
    only: Repeated = ()
    seed: int = 0  # of everything random.
    weights: Path | None = None  # a file of weights or a run's folder; initial weights by default.
    at_once: Hidden = 8  # pairs of episodes computed side by side.
    exact_below: Hidden = 8  # weights up to which forward mode takes all directions.

    def __post_init__(self) -> None:
        check(self, particles=4, directions=1, at_once=1, horizon=1, truncation=1)
        if self.particles % 2:
            raise ValueError(f"--particles {self.particles} must be even; try 8.")
        check(self, samples=2 * self.particles)


@dataclasses.dataclass(frozen=True)
class HorizonSettings:
    """Find out how long a truncation has to be, and what shorter ones would do."""

    settings: Repeated = ()  # change a field of the recipe; may be repeated.
    # inner steps that count as the truth; the recipe's, but at most 200, by default.
    horizon: int | None = None
    # inner steps, increasing, ending with the horizon; chosen by default.
    truncations: tuple[int, ...] | None = None
    episodes: int = 8  # over how many the means are.
    positions: int = 13  # of each hyperparameter, or of the scale of a rule's updates, odd.
    reach: float = 30.0  # the largest factor on each hyperparameter; the smallest is its inverse.
    # share of the gradient's norm that its bias, and of the meta-loss that its excess, may be.
    tolerance: float = 0.1
    seed: int = 0  # of everything random.
    weights: Path | None = None  # a file of weights or a run's folder; initial weights by default.

    def __post_init__(self) -> None:
        check(self, horizon=1, episodes=2, positions=3, reach="(1, inf)", tolerance=POSITIVE)
        if self.positions % 2 == 0:
            raise ValueError(f"--positions {self.positions} must be odd; try {self.positions + 1}.")


@dataclasses.dataclass(frozen=True)
class DynamicsSettings:
    """Measure the dynamics of a run's optimizer, beside SGD, momentum, Adam and Lion."""

    steps: int | None = None  # of each training; the run's horizon, but at most 500, by default.
    seeds: int = 3  # fresh tasks of the run, each with initial params and batches of its own.
    seed: int = 0  # of everything random.
    batches: int = 64  # at each moment that noise is measured at.
    moments: int = 4  # at which it is, besides the beginning.
    starts: int = 6  # along each side of the valley; even, so that none is the origin.
    rows: int = 200  # of recorded inputs, at which response curves are drawn.

    def __post_init__(self) -> None:
        check(self, steps=10, seeds=1, batches=4, moments=1, starts=2, rows=2)


@dataclasses.dataclass(frozen=True)
class SymmetrySettings:
    """See which symmetries of its networks a run's optimizer breaks, beside SGD, Adam and Lion."""

    steps: int | None = None  # of each training; the run's horizon, but at most 500, by default.
    seeds: int = 3  # fresh tasks of the run, each with initial params and batches of its own.
    seed: int = 0  # of everything random, but for the meta-training, which has the run's.
    # of the run's meta-training that are done again and watched, from its beginning; 0 for none.
    outer_steps: int = 40

    def __post_init__(self) -> None:
        check(self, steps=2, seeds=1, outer_steps=0)
