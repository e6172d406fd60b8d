"""`lopt evaluate`: which optimizers, on which evaluations, against which baselines."""

from collections.abc import Sequence
from pathlib import Path

from lopt.experiment.baselines import USUAL, Contestant, baselines
from lopt.experiment.evaluation.compare import compare
from lopt.experiment.evaluation.contestants import named_optimizer, of_path, of_run
from lopt.experiment.evaluation.suites import suite
from lopt.experiment.evaluation.summary import evaluation_report
from lopt.experiment.report import Report, stages
from lopt.experiment.runs.files import check_writable, free_folder
from lopt.experiment.runs.run import SEEDS, Run, add_log
from lopt.experiment.runs.seeds import open_all
from lopt.experiment.settings import EvaluateSettings

# What a run's own evaluations have beside it, so that the demo ends soon; suites have all.
FEW = ("momentum", "Adam")


def evaluate_command(settings: EvaluateSettings) -> None:
    """Judges what is given, and writes the report into the folder of the run, if it is one."""
    alone = len(settings.contestants) == 1
    given: list[tuple[list[Contestant], Run | None]]
    if seeds := alone and ((place := Path(settings.contestants[0])) / SEEDS).exists():
        given = [(of_run(run, run.name)[:1], run) for run in open_all(place, settings.trust)]
    else:
        given = [of_path(path, settings.trust, alone) for path in settings.contestants]
    runs = [run for _, run in given if run is not None]
    if settings.suite is None and not runs:
        raise ValueError("Without a run there are no evaluations of its own; add --suite quick.")
    if settings.out is not None:
        folder = settings.out
    elif seeds or (len(runs) == 1 and not settings.optimizer):
        folder = place if seeds else runs[0].folder
    else:
        folder = free_folder(Path("evaluation"), lambda one: (one / "report.json").exists())
    check_writable(folder / "report.json")
    found = [one for some, _ in given for one in some]
    found += [named_optimizer(text, folder / "evaluations") for text in settings.optimizer]
    evaluate(found, settings, runs if seeds else runs[:1]).finish(folder, "report")


def evaluate(
    contestants: Sequence[Contestant], settings: EvaluateSettings, runs: Sequence[Run] = ()
) -> Report:
    """Compares optimizers with tuned baselines on a suite, or on a run's own evaluations.

    Several runs are those of seeds, which have their evaluations in common.
    """
    if settings.suite is not None:
        title, evaluations = settings.suite, suite(settings.suite)
        names = (*USUAL, "OptList") if settings.optlist else USUAL
    else:
        title, evaluations, names = runs[0].name, runs[0].experiment.evaluations, FEW
    if not evaluations:  # of which only meta-training can be told
        report = Report(f"Evaluation of {title}")
        add_log(report, *(run.log for run in runs))
        return report
    every = [*contestants, *baselines(settings.baselines or names, settings.optlist)]
    comparisons = []
    with stages("evaluating", len(evaluations)) as announce:
        for one in evaluations:
            announce(one.name)
            comparisons.append(compare(one, every, settings.seed))
    return evaluation_report(title, comparisons, [run.log for run in runs])


def evaluate_run(*runs: Run) -> Report:
    """Compares a run's latest weights with tuned baselines; of several seeds, with bands."""
    found = of_run(runs[0]) if len(runs) == 1 else [of_run(run, run.name)[0] for run in runs]
    return evaluate(found, EvaluateSettings(), runs)
