"""From a trained run to an equation that takes its place: record, search, score, roll out.

What takes long is kept in the folder as it is finished: the table, and the front of every search.
A distillation that was killed goes on from there when it is asked for again.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures
from lopt.core.types import Theta
from lopt.experiment.data.tables import load_table, save_table
from lopt.experiment.distill_settings import (
    BACKENDS,
    SETTINGS,
    check_settings,
    extra_features,
    odd_columns,
    record_settings,
)
from lopt.experiment.evaluation.compare import Comparison, compare
from lopt.experiment.record import record_run
from lopt.experiment.report import progress
from lopt.experiment.runs import storage
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.files import check_writable, read_json, write_json
from lopt.experiment.runs.train import reopen
from lopt.experiment.settings import DistillSettings, RecordSettings
from lopt.experiment.trainings import stream
from lopt.learned import MomentFeatures, with_features
from lopt.symbolic import Output, in_place_of, symbolic_optimizer
from lopt.symbolic.distill import Distillation, distill
from lopt.symbolic.expression import Expression, rename
from lopt.symbolic.metrics import (
    Perception,
    equation_complexity,
    network_complexity,
    perception_of_expression,
)
from lopt.symbolic.record import RAW_GRADIENT
from lopt.symbolic.score import Ceiling, Loss, ablate, ceiling
from lopt.symbolic.search import AbstractSearch
from lopt.symbolic.serial import from_json, to_json
from lopt.symbolic.split import sample
from lopt.symbolic.table import Table

# The R2 that mapping complexity asks for.
ENOUGH = 0.9
TABLE = "table.npz"


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
class DistilledRun:
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
    *,
    show_progress: bool = True,
) -> DistilledRun:
    """Distils the latest weights of a run.

    Args:
        run: the folder of the run.
        out: where the table and settings are kept, and found again.
        settings: how.
        show_progress: whether to draw progress bars.

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
    also, decays = extra_features(learned, theta, settings)
    more = MomentFeatures(also) if also else None
    learned, theta = with_features(learned, theta, more, decays)
    searches = [Kept(BACKENDS[name](), out / "searches" / name) for name in settings.searches]
    for search in searches:
        search.require()
    asked = record_settings(learned, theta, settings, also, decays)
    check_writable(out / SETTINGS)
    check_settings(out, run, settings, asked.features)
    table = recorded(run, out, asked, show_progress)
    total = len(searches) * settings.seeds + 5
    with progress("distilling", total, show=show_progress) as at:
        found = distill(
            table,
            searches,
            range(settings.seed, settings.seed + settings.seeds),
            rows=settings.search_rows,
            odd=odd_columns(settings.odd, asked.features),
            longest=settings.longest,
            progress=lambda done, of, what: at(done, what),
        )
        sides = found.splits.mapping()
        expression = found.chosen.expression
        _check_rule(found)
        at(total - 3, "black-box ceiling")
        top = ceiling(sides, settings.seed)
        at(total - 2, "what each feature is for")
        ablation = ablate(expression, found.splits.train, found.splits.test)
        perception = perception_of_expression(expression, found.splits.test)
        few = {
            name: sample(side, settings.search_rows, settings.seed) for name, side in sides.items()
        }
        complexity = (
            equation_complexity(found.front, found.splits.validation, ENOUGH, "validation"),
            network_complexity(few, ENOUGH, seed=settings.seed),
        )
        distilled, weights = replacement(learned, theta, expression, table)
        storage.save(out / "weights.safetensors", distilled, weights)
        at(total - 1, "training with the equation")
        comparisons = roll_out(experiment, learned, theta, distilled, weights)
        at(total, "done")
    return DistilledRun(
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


def _check_rule(found: Distillation) -> None:
    """Refuses a constant as an update rule."""
    expression = found.chosen.expression
    if expression.variables:
        return
    least = min(
        (one.complexity for one in found.front.candidates if one.expression.variables),
        default=math.inf,
    )
    raise ValueError(
        f"The chosen equation is the constant {float(expression.constants[0]):g}, which is no "
        f"update rule; the shortest on the front with a feature has {least:g} nodes: try "
        f"--longest {least:g} or more, or more rows."
    )


def recorded(run: Path, out: Path, settings: RecordSettings, show_progress: bool) -> Table:
    """Returns the table of the run, recorded now or before."""
    path = out / TABLE
    if not path.exists():
        save_table(path, record_run(run, settings, show_progress=show_progress))
    return load_table(path)


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
    key = stream("roll-out", experiment.seed)
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
