"""`lopt evaluate`: what it can judge, which are runs, files of weights and any Optax optimizer."""

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import equinox as eqx
import optax

from lopt.core.checks import check_length
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.baselines import USUAL, Contestant, baselines, outward
from lopt.experiment.evaluation.compare import compare
from lopt.experiment.evaluation.suites import suite
from lopt.experiment.evaluation.summary import evaluation_report
from lopt.experiment.evaluation.trials import fingerprint
from lopt.experiment.report import Report, stages
from lopt.experiment.runs import files, storage
from lopt.experiment.runs.published import load_published
from lopt.experiment.runs.registry import run_file
from lopt.experiment.runs.run import SEEDS, Run, add_log
from lopt.experiment.runs.seeds import open_all
from lopt.experiment.settings import EvaluateSettings

# What a run's own evaluations have beside it, so that the demo ends soon; suites have all.
FEW = ("momentum", "Adam")


class _Multiplied(eqx.Module):
    """A learned optimizer with its weights, whose updates are multiplied."""

    learned: AbstractLearnedOptimizer
    theta: Theta

    def __call__(self, values: Any, num_steps: int) -> optax.GradientTransformation:
        check_length(f"The evaluation, of {num_steps} steps,", num_steps, self.learned.max_steps)
        own = self.learned.optimizer(self.theta, num_steps)
        return optax.chain(own, optax.scale(values[0]))


def of_learned(
    name: str,
    learned: AbstractLearnedOptimizer,
    theta: Theta,
    folder: Path | None = None,
    budgets: tuple[int, ...] = (1, 11),
) -> Contestant:
    """Returns a learned optimizer: as it is, and with the best multiplier of its updates."""
    grid, identity = outward(1.0, count=budgets[-1]), fingerprint((learned, theta))
    factory = _Multiplied(learned, theta)
    return Contestant(name, factory, grid, budgets, identity=identity, folder=folder)


def of_run(run: Run, name: str = "learned") -> list[Contestant]:
    """Returns a run's optimizer and, if it was trained on, what it was before."""
    thetas = {name: run.theta, f"{name}, before": run.experiment.initial}
    folder = run.folder / "evaluations"
    return [of_learned(n, run.learned, t, folder) for n, t in thetas.items() if t is not None]


def of_path(path: str, trust: bool, alone: bool) -> tuple[list[Contestant], Run | None]:
    """Returns the optimizers of a run's folder or of weights, own or published; and the run."""
    if Path(path).is_dir():
        run = Run(path, trust=trust)
        return of_run(run, "learned" if alone else run.name), run
    if not Path(path).exists():  # a name of what comes with lopt, or nothing
        return [of_learned(path, *storage.load(path))], None
    load = storage.load if Path(path).suffix == ".safetensors" else load_published
    return [of_learned("learned" if alone else Path(path).stem, *load(path))], None


def of_optimizer(
    name: str, made: Any, identity: str | None = None, folder: Path | None = None
) -> Contestant:
    """Returns an Optax optimizer: one, or a function of its learning rate or of nothing.

    Of a learning rate half decades are tried around its default, or those of Adam if it has none;
    otherwise multipliers of updates.
    """
    ready = isinstance(made, optax.GradientTransformation)
    takes = [] if ready else _needed(made)
    if len(takes) > 1:
        raise ValueError(
            f"The optimizer {name} takes {', '.join(one.name for one in takes)}; give an Optax "
            "optimizer, or a function of its learning rate or of nothing."
        )

    def factory(values: Any, num_steps: int) -> optax.GradientTransformation:
        if takes:
            return made(**{takes[0].name: values[0]})
        return optax.chain(made if ready else made(), optax.scale(values[0]))

    own = takes[0].default if takes else 1.0
    grid = outward(own if isinstance(own, float) else 1e-3)
    return Contestant(name, factory, grid, identity=identity, folder=folder)


def _needed(made: Any) -> list[inspect.Parameter]:
    """Returns what a function has to be given; its rate counts in any case."""
    if not callable(made):
        raise ValueError(f"{made!r} is neither an Optax optimizer nor a function that returns one.")
    found = inspect.signature(made).parameters.values()
    named = [one for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    required = [one for one in named if one.default is one.empty]
    return required or [one for one in named if one.name == "learning_rate"]


def named_optimizer(text: str, folder: Path | None) -> Contestant:
    """Returns the optimizer that "module:function" names; the module may be a file's path."""
    module, _, function = text.rpartition(":")
    sys.path.insert(0, "")
    try:
        is_file = module.endswith(".py")
        found = run_file(Path(module), "optimizers") if is_file else import_module(module or text)
        made: Callable[..., Any] = getattr(found, function)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(
            f"--optimizer {text} cannot be imported ({files.one_line(error)}); write it as "
            "module:function, such as optax:adam."
        ) from error
    finally:
        sys.path.remove("")
    # The file that was given, and the one where a function that it imports is written.
    code = getattr(inspect.unwrap(made), "__code__", None)
    sources = [Path(f"{found.__file__}"), Path(f"{getattr(code, 'co_filename', None)}")]
    digests = [files.digest(source) for source in sources if source.is_file()]
    return of_optimizer(function, made, " ".join([text, *digests]), folder)


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
        folder = files.free_folder(Path("evaluation"), lambda one: (one / "report.json").exists())
    files.check_writable(folder / "report.json")
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
