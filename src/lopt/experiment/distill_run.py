"""From a trained run to an equation that takes its place: record, search, score, roll out.

What takes long is kept in the folder as it is finished: the table, and the front of every search.
A distillation that was killed goes on from there when it is asked for again.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from lopt.core.checks import check_integer
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures
from lopt.core.types import Theta
from lopt.experiment import storage
from lopt.experiment.evaluate import Comparison, compare
from lopt.experiment.experiment import Experiment
from lopt.experiment.files import digest, read_json, write_json
from lopt.experiment.record_run import RecordSettings, record_run
from lopt.experiment.tables import load_table, save_table
from lopt.experiment.train import reopen
from lopt.learned import MomentFeatures, seen_through
from lopt.symbolic import Output, in_place_of, symbolic_optimizer
from lopt.symbolic.distill import Distillation, distill
from lopt.symbolic.expression import Expression, Variable, rename
from lopt.symbolic.gplearn_search import GplearnSearch
from lopt.symbolic.metrics import (
    Perception,
    equation_complexity,
    network_complexity,
    perception_of_expression,
)
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.pysr_search import PysrSearch
from lopt.symbolic.record import RAW_GRADIENT
from lopt.symbolic.score import Ceiling, Loss, ablate, ceiling
from lopt.symbolic.search import AbstractSearch
from lopt.symbolic.serial import from_json, to_json
from lopt.symbolic.split import sample
from lopt.symbolic.table import Table
from lopt.symbolic.template import TemplateSearch

SEARCHES: dict[str, type[AbstractSearch]] = {
    "template": TemplateSearch,
    "operon": OperonSearch,
    "gplearn": GplearnSearch,
    "pysr": PysrSearch,
}
MEMORIES = (
    "gradient",
    "g_normalised",
    "momentum_0.5_normalised",
    "momentum_0.9_normalised",
    "momentum_0.98_normalised",
    "time",
)
# The R2 that mapping complexity asks for.
ENOUGH = 0.9
TABLE, SETTINGS = "table.npz", "distill.json"
Say = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """How a run is distilled.

    Attributes:
        rows, steps: of the recorded table, see `RecordSettings`.
        history: how many steps back each feature is looked at, for rules with a memory; others
            see the present alone.
        also: features of `lopt.learned.MomentFeatures` besides those that the rule sees; `None`
            takes `MEMORIES` for rules with a memory, which average in it, and none for others.
        lags: raw gradients of so many steps in place of features.
        searches: names of backends.
        seeds: of each.
        search_rows: rows that a search sees.
        odd: names of features that change sign with the gradient; if any, u(-g) = -u(g).
        longest: the most nodes of the equation that is chosen; any number by default.
        seed: of everything random.
    """

    rows: int = 20_000
    steps: int = 200
    history: int = 2
    also: tuple[str, ...] | None = None
    lags: int | None = None
    searches: tuple[str, ...] = ("template", "operon")
    seeds: int = 3
    search_rows: int = 2000
    odd: tuple[str, ...] = ()
    longest: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, hint in (
            ("rows", 100, 20_000),
            ("steps", 1, 200),
            ("history", 0, 2),
            ("seeds", 1, 3),
            ("search_rows", 10, 2000),
        ):
            check_integer("DistillSettings", name, getattr(self, name), least, hint=hint)
        if self.longest is not None:
            check_integer("DistillSettings", "longest", self.longest, 1, hint=50)
        for name in self.searches:
            if name not in SEARCHES:
                raise ValueError(
                    f"DistillSettings(searches) has {name!r}; known are {', '.join(SEARCHES)}."
                )


class Kept(AbstractSearch):
    """A search whose proposals are kept in a folder, a file for each seed, and found again.

    Attributes:
        one: the search.
        folder: where.
    """

    one: AbstractSearch
    folder: Path = eqx.field(static=True)

    def require(self) -> None:
        """Refuses to begin without the library; see `AbstractSearch.require`."""
        self.one.require()

    def search(self, table: Table, seed: int) -> list[Expression]:
        """Returns what was found before, or searches.

        Raises:
            ValueError: if the file is damaged, or of another table.
        """
        path = self.folder / f"{seed}.json"
        if not path.exists():
            found = self.one.search(table, seed)
            write_json(path, [to_json(expression) for expression in found])
        # Read back also when just written: a second start continues with the same numbers.
        try:
            found = [from_json(data) for data in read_json(path)]
            used = {feature for one in found for feature in one.variables}
            if strange := used - set(table.columns):
                names = ", ".join(sorted(map(str, strange)))
                raise ValueError(f"it has features that the table lacks: {names}")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or of another table ({error}); remove it, to search again."
            ) from error
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What a distillation found, and how well it stands in for the network.

    Attributes:
        experiment: of the run.
        table: recorded.
        found: front, choice and splits.
        ceiling: what a black box explains of the same rows.
        ablation: what the equation loses without each feature.
        perception: how far back it looks.
        complexity: nodes of the shortest equation, and weights of the smallest network, that
            explain `ENOUGH` of the variance; infinite if none does.
        learned, theta: the optimizer with the equation in the network's place.
        comparisons: both of them trained on the run's evaluations, beside tuned baselines.
    """

    experiment: Experiment
    table: Table
    found: Distillation
    ceiling: Ceiling
    ablation: tuple[Loss, ...]
    perception: tuple[Perception, ...]
    complexity: tuple[float, float]
    learned: Coordinatewise
    theta: Theta
    comparisons: tuple[Comparison, ...]


def distill_run(
    run: Path,
    out: Path,
    settings: DistillSettings,
    say: Say = lambda done, total, what: None,
    *,
    show_progress: bool = True,
) -> Report:
    """Distils the latest weights of a run.

    Args:
        run: the folder of the run.
        out: where the table and settings are kept, and found again.
        settings: how.
        say: called with the numbers of finished and of all stages, and what comes next.
        show_progress: whether to draw the progress bar of the recording.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if it cannot be distilled, or `out` holds a distillation with other settings.
        ImportError: if a backend's library is not installed.
    """
    experiment = reopen(run)
    learned, theta = storage.load(run, experiment.learned)
    if not isinstance(learned, Coordinatewise):
        raise ValueError(
            f"{run} trained {type(learned).__name__}, which is not coordinatewise: an equation "
            "can take the place of the rule of a lopt.Coordinatewise only."
        )
    also = extra_features(learned, theta, settings)
    if also:
        learned, theta = seen_through(learned, theta, MomentFeatures(also))
    searches = [Kept(SEARCHES[name](), out / "searches" / name) for name in settings.searches]
    for search in searches:
        search.require()
    asked = record_settings(learned, theta, settings, also)
    check_settings(out, run, settings, asked.features)
    table = recorded(run, out, asked, settings.seed, show_progress)
    total = len(searches) * settings.seeds + 5

    def stage(done: int, of: int, what: str) -> None:
        say(done, total, what)

    found = distill(
        table,
        searches,
        range(settings.seed, settings.seed + settings.seeds),
        rows=settings.search_rows,
        odd=settings.odd,
        longest=settings.longest,
        progress=stage,
    )
    sides = found.splits.mapping()
    expression = found.chosen.expression
    if not expression.variables:
        least = min(
            (one.complexity for one in found.front.candidates if one.expression.variables),
            default=math.inf,
        )
        raise ValueError(
            f"The chosen equation is the constant {float(expression.constants[0]):g}, which is no "
            f"update rule; the shortest on the front with a feature has {least:g} nodes: try "
            f"--longest {least:g} or more, or more rows."
        )
    say(total - 3, total, "black-box ceiling")
    top = ceiling(sides, settings.seed)
    say(total - 2, total, "what each feature is for")
    ablation = ablate(expression, found.splits.train, found.splits.test)
    perception = perception_of_expression(expression, found.splits.test)
    few = {name: sample(side, settings.search_rows, settings.seed) for name, side in sides.items()}
    complexity = (
        equation_complexity(found.front, found.splits.validation, ENOUGH, "validation"),
        network_complexity(few, ENOUGH, seed=settings.seed),
    )
    distilled, weights = replacement(learned, theta, expression, table)
    storage.save(out / "weights.safetensors", distilled, weights)
    say(total - 1, total, "training with the equation")
    comparisons = roll_out(experiment, learned, theta, distilled, weights)
    say(total, total, "done")
    return Report(
        experiment=experiment,
        table=table,
        found=found,
        ceiling=top,
        ablation=ablation,
        perception=perception,
        complexity=complexity,
        learned=distilled,
        theta=weights,
        comparisons=comparisons,
    )


def record_settings(
    learned: Coordinatewise, theta: Theta, settings: DistillSettings, also: tuple[str, ...]
) -> RecordSettings:
    """Returns what is recorded.

    Raises:
        ValueError: if there are fewer steps than are looked back, or `odd` names no feature.
    """
    features: tuple[str, ...] = ()
    names = {"gradient", RAW_GRADIENT}
    if settings.lags is None:
        columns = columns_of(learned, theta, settings.history)
        features, names = tuple(map(str, columns)), {column.name for column in columns}
    if settings.history >= settings.steps:
        raise ValueError(
            f"DistillSettings(history={settings.history}, steps={settings.steps}) looks back "
            f"further than a training goes; try --history 2 or --steps {10 * settings.history}."
        )
    if unknown := sorted(set(settings.odd) - names):
        raise ValueError(
            f"DistillSettings(odd) names {', '.join(unknown)}; there are "
            f"{', '.join(sorted(names))}."
        )
    return RecordSettings(
        settings.rows, settings.steps, features, settings.lags, padded=True, also=also
    )


def check_settings(
    out: Path, run: Path, settings: DistillSettings, features: tuple[str, ...]
) -> None:
    """Writes what a folder distils, or refuses a folder that distils something else.

    Raises:
        ValueError: if the folder holds a distillation of another run or with other settings.
    """
    asked = {
        "weights": digest(storage.weights_file(run)),
        "features": features,
        **dataclasses.asdict(settings),
    }
    # The choice is made anew, from what is kept.
    del asked["longest"]
    asked = json.loads(json.dumps(asked))
    if (out / SETTINGS).exists():
        kept = read_json(out / SETTINGS)
        if kept != asked:
            kept = kept if isinstance(kept, dict) else {}
            different = sorted(k for k in {*asked, *kept} if kept.get(k) != asked.get(k))
            raise ValueError(
                f"{out} holds a distillation with another {', '.join(different)}; give another "
                "folder with --out."
            )
    else:
        write_json(out / SETTINGS, asked)


def recorded(
    run: Path, out: Path, settings: RecordSettings, seed: int, show_progress: bool
) -> Table:
    """Returns the table of the run, recorded now or before."""
    path = out / TABLE
    if not path.exists():
        save_table(path, record_run(run, settings, seed, show_progress=show_progress))
    return load_table(path)


def remembers(learned: Coordinatewise, theta: Theta) -> bool:
    """Returns whether the rule has a memory."""
    memory = jax.eval_shape(lambda theta: learned.rule.begin(theta["rule"], (1,)), theta)
    return bool(jax.tree.leaves(memory))


def extra_features(
    learned: Coordinatewise, theta: Theta, settings: DistillSettings
) -> tuple[str, ...]:
    """Returns the features to record besides the rule's own.

    Raises:
        ValueError: if there is no such feature.
    """
    if settings.lags is not None:
        return ()
    chosen = settings.also
    if chosen is None:
        chosen = MEMORIES if remembers(learned, theta) else ()
    named = MomentFeatures(chosen).names() if chosen else ()
    return tuple(name for name in named if name not in learned.features.names())


def columns_of(learned: Coordinatewise, theta: Theta, history: int) -> list[Variable]:
    """Returns what an equation may be made of: all features, and their past if the rule has one."""
    lags = 1 + history if remembers(learned, theta) else 1
    names = learned.features.names()
    # Time a step ago is time but for a constant, and what a parameter has moved since is the output
    # of a step ago: an equation that may see that explains the network by itself.
    return [
        Variable(name, lag)
        for lag in range(lags)
        for name in names
        if not (lag and (name.startswith("time") or name == "parameter"))
    ]


def replacement(
    learned: Coordinatewise, theta: Theta, expression: Expression, table: Table
) -> tuple[Coordinatewise, Theta]:
    """Returns the optimizer with the equation in the network's place, and its weights.

    Raises:
        ValueError: if the equation mixes raw gradients with other features.
    """
    scale = learned.scale if table.about.get("output") == "output" else Output()
    raw = {one for one in expression.variables if one.name == RAW_GRADIENT}
    if not raw:
        return in_place_of(learned, theta, expression, scale)
    if raw != set(expression.variables):
        raise ValueError("An equation of raw gradients and features together cannot be used.")
    features: AbstractFeatures = MomentFeatures(("gradient",))
    distilled = symbolic_optimizer(rename(expression, {RAW_GRADIENT: "gradient"}), features, scale)
    return distilled, distilled.init(jax.random.key(0))


def roll_out(
    experiment: Experiment,
    learned: Coordinatewise,
    theta: Theta,
    distilled: Coordinatewise,
    weights: Theta,
) -> tuple[Comparison, ...]:
    """Trains the run's evaluations with network, equation and tuned baselines, side by side."""
    # Neither the keys of the run's own evaluation nor those of recording.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(experiment.seed), 2**32 - 1), 0xD157)
    return tuple(
        compare(
            evaluation,
            learned,
            theta,
            jax.random.fold_in(key, i),
            {"equation": (distilled, weights)},
        )
        for i, evaluation in enumerate(experiment.evaluations)
    )


def loss_ratios(comparison: Comparison) -> Mapping[str, float]:
    """Returns mean final losses of a roll-out, as multiples of the network's."""
    network = float(np.mean(comparison.of("learned").final_loss))
    return {
        runs.name: float(np.mean(runs.final_loss)) / network
        for runs in comparison.runs
        if runs.name != "learned"
    }
