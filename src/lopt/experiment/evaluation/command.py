"""`lopt evaluate`: which optimizers, on which evaluations, against which baselines."""

from collections.abc import Sequence
from pathlib import Path

from lopt.experiment.baselines import BASELINES, Contestant, baselines
from lopt.experiment.evaluation.compare import compare
from lopt.experiment.evaluation.contestants import named_optimizer, of_path, of_run
from lopt.experiment.evaluation.evaluation import Evaluation
from lopt.experiment.evaluation.suites import suite
from lopt.experiment.evaluation.summary import evaluation_report
from lopt.experiment.report import Report, stages
from lopt.experiment.runs.environment import prepare_jax, stoppable
from lopt.experiment.runs.files import check_writable, free_folder
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import EvaluateSettings

# What a run's own evaluations have beside it; suites have all baselines.
FEW = ("SGD", "momentum", "Adam")


def evaluate_command(settings: EvaluateSettings) -> None:
    """Judges what is given, and writes the report into the folder of the run, if it is one."""
    prepare_jax()
    found: list[Contestant] = []
    runs: list[Run] = []
    alone = len(settings.contestants) == 1
    for path in settings.contestants:
        some, run = of_path(path, settings.trust, alone)
        found, runs = [*found, *some], [*runs, *([run] if run else [])]
    single = runs[0] if len(runs) == 1 and not settings.optimizer else None
    folder = settings.out or (single.folder if single else Path("evaluation"))
    if settings.out is None and not single:
        folder = free_folder(folder, lambda one: (one / "report.json").exists())
    check_writable(folder / "report.json")
    kept = folder / "evaluations"
    found += [named_optimizer(text, kept) for text in settings.optimizer]
    if settings.suite is None and not runs:
        raise ValueError("Without a run there are no evaluations of its own; add --suite quick.")
    report = evaluate(found, settings, runs[0] if runs else None)
    report.finish(folder, "report")


def evaluate(
    contestants: Sequence[Contestant], settings: EvaluateSettings, run: Run | None = None
) -> Report:
    """Compares optimizers with tuned baselines on a suite, or on a run's own evaluations."""
    if settings.suite is not None:
        evaluations: tuple[Evaluation, ...] = suite(settings.suite)
        names = (*BASELINES, *(("OptList",) if settings.optlist else ()))
    else:
        assert run is not None
        evaluations, names = run.experiment.evaluations, FEW
    names = settings.baselines or names
    every = [*contestants, *baselines(names, settings.optlist)]
    comparisons = []
    again = "Go on with the same command: what was trained is kept."
    with stoppable(again), stages("evaluating", len(evaluations)) as announce:
        for one in evaluations:
            announce(one.name)
            comparisons.append(compare(one, every, settings.seed))
    title = run.name if run is not None and settings.suite is None else settings.suite or ""
    return evaluation_report(title, comparisons, run.log if run is not None else None)


def evaluate_run(run: Run, settings: EvaluateSettings | None = None) -> Report:
    """Compares a run's latest weights with tuned baselines."""
    return evaluate(of_run(run), settings or EvaluateSettings(), run)
