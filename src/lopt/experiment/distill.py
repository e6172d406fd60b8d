"""From a trained run to an equation that takes its place: record, search, score, roll out.

What takes long is kept in the folder as it is finished: the table, and what every search found.
A distillation that was killed goes on from there when it is asked for again.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from typing_extensions import override

from lopt import symbolic
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.inner import InnerTraining
from lopt.core.types import Theta
from lopt.experiment import distill_report
from lopt.experiment.baselines import baselines
from lopt.experiment.data.tables import load_table, save_table
from lopt.experiment.evaluation.compare import compare
from lopt.experiment.evaluation.contestants import FEW, of_learned
from lopt.experiment.record import record_run, with_columns
from lopt.experiment.report import Report, progress, tell
from lopt.experiment.runs import storage
from lopt.experiment.runs.environment import stoppable
from lopt.experiment.runs.files import check_writable, digest, read_json, write_bytes, write_json
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import DistillSettings, RecordSettings, SanitySettings, split_lag
from lopt.learned import MomentFeatures, MuonMLP
from lopt.learned.concat import averaged_column, is_average
from lopt.learned.muon import FACTORS, FEATURES
from lopt.symbolic.expression import Expression, Variable, rename
from lopt.symbolic.record import RAW_GRADIENT
from lopt.symbolic.sanity import SUITE, run_sanity
from lopt.symbolic.split import sample
from lopt.symbolic.table import Table, named

BACKENDS: dict[str, type[symbolic.AbstractSearch]] = {
    "template": symbolic.TemplateSearch,
    "operon": symbolic.OperonSearch,
    "pysr": symbolic.PysrSearch,
}
DEFAULT = ("template", "operon")
# Seconds, measured on one core: of a search on 2,000 rows, and of all the rest.
SEARCH, REST = 30, 120
# Features besides its own that are recorded of a rule with a memory.
ALSO, DECAYS = ("warmup_0.98",), (0.5, 0.9, 0.98)
SETTINGS, TABLE = "distill.json", "table.npz"


class StoredSearch(symbolic.AbstractSearch):
    """A search whose proposals are kept in a folder, a file for each seed, and found again."""

    backend: symbolic.AbstractSearch
    folder: Path = eqx.field(static=True)

    @override
    def require(self) -> None:
        self.backend.require()

    def path(self, seed: int) -> Path:
        """Returns the file of a seed."""
        return self.folder / f"{seed}.json"

    @override
    def search(self, table: Table, seed: int) -> list[Expression]:
        path = self.path(seed)
        if not path.exists():
            found = self.backend.search(table, seed)
            write_json(path, {"found": [symbolic.to_json(one) for one in found]}, sealed=True)
        # Read back also when just written: a second start continues with the same numbers.
        try:
            found = [symbolic.from_json(data) for data in read_json(path, sealed=True)["found"]]
            named(table.columns, [str(feature) for one in found for feature in one.variables])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged or of another table ({error}); remove it, to search again."
            ) from error
        return found


def distill_run(run: Run, folder: Path, settings: DistillSettings) -> Report:
    """Distils the latest weights of a run, and writes the equation as text and as an optimizer.

    Table and what was found are kept in the folder, and found again.
    """
    if isinstance(run.learned, MuonMLP):
        return _distill_mixture(run, folder, settings)
    searches = searches_of(settings, folder)
    asked, inner, theta = _recording(run, settings)
    check_writable(folder / SETTINGS)
    weights = digest(storage.weights_file(run.folder))
    chosen = {"weights": weights, "features": asked.features, "search": tuple(searches)}
    check_settings(folder, dataclasses.asdict(settings) | chosen)
    if not (folder / TABLE).exists():
        table = record_run(run, asked)
        save_table(folder / TABLE, table)
    table = load_table(folder / TABLE)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    jobs = [f"{name}, seed {seed}" for name in searches for seed in seeds]
    left = sum(not one.path(seed).exists() for one in searches.values() for seed in seeds)
    minutes = (REST + SEARCH * left * settings.search_rows / 2000) / 60
    evaluations = run.experiment.evaluations
    tell(f"{left} searches, scores and trainings take about {minutes:.0f} minutes.")
    with (
        stoppable(f"Go on with the same command: what was found is kept in {folder}."),
        progress("distilling", len(jobs) + 4 + len(evaluations)) as at,
    ):
        found = symbolic.distill(
            table,
            list(searches.values()),
            seeds,
            rows=settings.search_rows,
            odd=odd_columns(settings.odd, asked.features),
            longest=settings.longest,
            progress=lambda done, _, what: at(done, jobs[done] if done < len(jobs) else what),
        )
        sides, expression = found.splits.mapping(), found.chosen.expression
        assert isinstance(inner.learned, Coordinatewise)
        learned, weights = replacement(inner.learned, theta, found, table)
        shown = symbolic.rounded(
            expression, sides["test"].mapping(), sides["test"].output, settings.digits
        )
        storage.save(folder / "weights.safetensors", learned, weights)
        write_bytes(folder / "equation.tex", (symbolic.to_latex(shown) + "\n").encode())
        write_json(folder / "equation.json", symbolic.to_json(expression))
        report = Report(f"Distilled from {run.name}", dataclasses.asdict(settings))
        report.data["table"] = {**table.about, "rows": len(table)}
        at(len(jobs) + 2, "black box")
        few = {name: sample(side, settings.search_rows, 0) for name, side in sides.items()}
        top = symbolic.ceiling(sides, settings.seed, repeats=0)
        distill_report.add_front(report, found, top)
        distill_report.add_equation(report, found, shown, top, table.about["output"])
        at(len(jobs) + 3, "what each feature is for")
        distill_report.add_features(report, found, few, settings.seed)
        comparisons, once, kept = [], (1,), folder / "evaluations"
        network = of_learned("learned", inner.learned, theta, kept, once)
        equation = of_learned("equation", learned, weights, kept, once)
        for i, evaluation in enumerate(evaluations):
            at(len(jobs) + 4 + i, f"training: {evaluation.name}")
            comparisons.append(compare(evaluation, [network, equation, *baselines(FEW)]))
        distill_report.add_roll_outs(report, comparisons)
    report.heading("Use")
    report.text(f'optimizer = lopt.load_optimizer("{folder}")', code=True, detail=True)
    report.text(symbolic.to_numpy_source(expression), code=True, detail=True)
    report.text(symbolic.to_torch_source(expression), code=True, detail=True)
    return report


def _distill_mixture(run: Run, folder: Path, settings: DistillSettings) -> Report:
    """Distils a rule that mixes features, see `symbolic.distill_mixture`."""
    used = {name: getattr(settings, name) for name in ("steps", "longest", "digits", "seed")}
    if settings != DistillSettings(**used):
        raise ValueError(f"Of {run.folder}, a mix of features, only --{', --'.join(used)} count.")
    weights = folder / "weights.safetensors"
    check_writable(weights)
    key, horizons = jax.random.key(settings.seed), (settings.steps, 5 * settings.steps)
    asked = run.inner.tasks, run.learned, run.theta, key
    found = symbolic.distill_mixture(*asked, horizons=horizons, longest=settings.longest)
    storage.save(weights, found.learned, found.theta)
    report = Report(f"Distilled from {run.name}", used)
    for kind, mix in found.linear.items():
        text = symbolic.mixture_to_text(mix, FEATURES, FACTORS, settings.digits)
        report.text(f"{kind}: {text} (R2 {found.r_squared[kind]:.3f})")
    report.text(f"Judge it by: lopt evaluate {weights} {run.folder}", code=True)
    return report


def searches_of(settings: DistillSettings, folder: Path) -> dict[str, StoredSearch]:
    """Returns the searches by name: those asked for, or of the default ones what is installed."""
    found = {}
    for name in settings.search or DEFAULT:
        one = StoredSearch(BACKENDS[name](), folder / "searches" / name)
        try:
            one.require()
            found[name] = one
        except ImportError:
            if settings.search:
                raise
    return found


def _recording(run: Run, settings: DistillSettings) -> tuple[RecordSettings, InnerTraining, Theta]:
    """Returns what is recorded, and the run with further features if its rule has a memory."""
    learned = run.learned
    if not isinstance(learned, Coordinatewise):
        raise ValueError(
            f"{run.folder} trained {type(learned).__name__}, which is not coordinatewise: an "
            "equation can take the place of the rule of a lopt.Coordinatewise only."
        )
    begin = learned.rule.begin
    memory = jax.tree.leaves(jax.eval_shape(lambda theta: begin(theta["rule"], (1,)), run.theta))
    extend = bool(memory) and settings.lags is None
    also = (ALSO if extend else ()) if settings.also is None else settings.also
    asked = RecordSettings(
        settings.rows,
        settings.steps,
        settings.columns or (),
        settings.lags,
        padded=True,
        also=also,
        decays=(DECAYS if extend else ()) if settings.decays is None else settings.decays,
        seed=settings.seed,
    )
    inner, theta = with_columns(run, asked)
    columns: tuple[Variable, ...] = (Variable("gradient"), Variable(RAW_GRADIENT))
    if settings.lags is None:
        assert isinstance(inner.learned, Coordinatewise)
        features = inner.learned.features
        # Time a step ago is time but for a constant, an average is one of now and of what it
        # averages, and what a parameter has moved since is the output of a step ago: an equation
        # that may see that explains the network by itself.
        old = {one for one in features.column_names() if one != "parameter" and not is_average(one)}
        columns = tuple(map(Variable, features.names()))
        for lag in range(1, 1 + settings.history * bool(memory)):
            columns += tuple(Variable(one, lag) for one in features.names() if one in old)
        columns = named(columns, settings.columns) if settings.columns else columns
        asked = dataclasses.replace(asked, features=tuple(map(str, columns)))
    named(tuple(Variable(column.name) for column in columns), settings.odd)
    return asked, inner, theta


def odd_columns(odd: Sequence[str], features: Sequence[str]) -> tuple[str, ...]:
    """Returns odd features, and those of the features, as printed, that are averages of them."""
    names = [split_lag(feature)[0] for feature in features]
    averages = [name for name in names if is_average(name) and averaged_column(name) in odd]
    return tuple(dict.fromkeys((*odd, *averages)))


def check_settings(folder: Path, asked: dict[str, Any]) -> None:
    """Writes what a folder distils, or refuses one that distils another run or otherwise."""
    # The choice is made anew, from what is kept, and so are texts.
    asked = {name: value for name, value in asked.items() if name not in ("longest", "digits")}
    asked, path = json.loads(json.dumps(asked)), folder / SETTINGS
    kept = read_json(path, sealed=True) if path.exists() else asked
    if different := sorted(k for k in {*asked, *kept} if kept.get(k) != asked.get(k)):
        raise ValueError(
            f"{folder} holds a distillation with another {', '.join(different)}; give another "
            "folder with --out."
        )
    if not path.exists():
        write_json(path, asked, sealed=True)


def replacement(
    learned: Coordinatewise, theta: Theta, found: symbolic.Distillation, table: Table
) -> tuple[Coordinatewise, Theta]:
    """Returns the optimizer with the equation in the network's place, and its weights."""
    expression = found.chosen.expression
    used = {variable.name for variable in expression.variables}
    if not used:
        longer = [one.complexity for one in found.front.candidates if one.expression.variables]
        least = min(longer, default=float("inf"))
        raise ValueError(
            f"The chosen equation is the constant {float(expression.constants[0]):g}, which is no "
            f"update rule; the shortest on the front with a feature has {least:g} nodes: try "
            f"--longest {least:g} or more, or more rows."
        )
    scale = learned.scale if table.about.get("output") == "output" else symbolic.Output()
    if RAW_GRADIENT not in used:
        return symbolic.in_place_of(learned, theta, expression, scale)
    renamed = rename(expression, {RAW_GRADIENT: "gradient"})
    distilled = symbolic.symbolic_optimizer(renamed, MomentFeatures(("gradient",)), scale)
    return distilled, distilled.init(jax.random.key(0))


def sanity(settings: SanitySettings) -> Report:
    """Distils known optimizers, and says how well they were found."""
    with progress("distilling", len(SUITE)) as at:
        found = run_sanity(seed=settings.seed, progress=lambda done, _, what: at(done, what))
    rows = [
        {
            "optimizer": row.name,
            "held-out R2": f"{row.r_squared:.5f}",
            "asked": row.required,
            "nodes": row.nodes,
            "weight x variable as one": int(distill_report.weighted(row.expression)),
            "CPU s": row.seconds,
            "equation": symbolic.to_text(row.expression, 3)[:60],
        }
        for row in found
    ]
    report = Report("Known optimizers, distilled from raw gradients")
    report.table(report.title, rows)
    return report
