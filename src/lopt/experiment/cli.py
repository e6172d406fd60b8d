"""The command line: a table from commands to their settings and functions.

Options, help and checks are those of the settings; JAX is imported with the functions.
"""

import dataclasses
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from lopt.experiment import settings as s
from lopt.experiment.runs import settings as r
from lopt.experiment.studies import settings as h


@dataclasses.dataclass(frozen=True)
class Command:
    """A command."""

    settings: Any
    function: str  # "module:function" of `lopt.experiment`.
    subject: str = ""  # what it is given first: "run", the folder of one, or "name".
    folder: str = ""  # where its report goes, without --out; {} stands for the subject.
    report: str = ""  # the name of the report's files.
    keeps: bool = False  # whether the function gets the folder, and goes on with what is there.
    fresh: bool = False  # whether the folder must not hold such a report.


def _probe(settings: Any, function: str, subject: str, report: str) -> Command:
    return Command(settings, f"probes.{function}", subject, f"{{}}/{report}", report, fresh=True)


def _study(settings: Any, report: str) -> Command:
    function = f"studies.short_horizon:{report}"
    return Command(settings, function, "", "horizon/{dataset}", report, keeps=True)


SUBJECTS = {
    "run": "the folder of a run.",
    "name": "a recipe, by name or as a Python file, a run, or a task such as Rosenbrock.",
}
COMMANDS = {
    "train": Command(r.TrainSettings, "runs.command:train_command"),
    "tune": Command(s.TuneSettings, "runs.command:tune_command"),
    "pretrained": Command(s.PretrainedSettings, "runs.registry:list_pretrained"),
    "export": Command(s.ExportSettings, "pretrained:export_command"),
    "recipes": Command(s.RecipesSettings, "runs.registry:list_recipes"),
    "tasks show": Command(s.ShowTaskSettings, "data.catalogue:show_task"),
    "tasks": Command(s.TasksSettings, "data.catalogue:list_tasks"),
    "evaluate": Command(s.EvaluateSettings, "evaluation.contestants:evaluate_command"),
    "sweep": Command(r.SweepSettings, "runs.sweep:sweep", "", "sweep/{recipe}", "report", True),
    "compare": Command(
        r.CompareSettings, "runs.sweep:compare_designs", "", "compare/{recipe}", "report", True
    ),
    "record": Command(s.RecordSettings, "record:record", "run"),
    "distill": Command(
        s.DistillSettings, "distill:distill_run", "run", "{}/distilled", "report", True
    ),
    "sanity": Command(s.SanitySettings, "distill:sanity"),
    "horizon quadratic": Command(
        *(h.QuadraticSettings, "studies.noisy_quadratic:quadratic"),
        *("", "horizon/quadratic", "quadratic"),
    ),
    "horizon surface": _study(h.SurfaceSettings, "surface"),
    "horizon smd": _study(h.DescentSettings, "smd"),
    "horizon best": _study(h.BestSettings, "best"),
    "horizon online": _study(h.OnlineSettings, "online"),
    "probe estimators": _probe(
        s.ProbeSettings, "estimators:probe_estimators", "name", "estimators"
    ),
    "probe horizon": _probe(s.HorizonSettings, "truncation:probe_truncation", "name", "horizon"),
    "probe dynamics": _probe(s.DynamicsSettings, "dynamics:probe_dynamics", "run", "dynamics"),
    "probe symmetry": _probe(s.SymmetrySettings, "symmetry:probe_symmetry", "run", "symmetry"),
}
# Options whose names are other than their fields, and what stands for their values.
NAMES = {"settings": "set", "start": "from"}
METAVARS = {
    "settings": "FIELD=VALUE",
    "truncations": "STEPS ...",
    "horizons": "STEPS ...",
    "ray": "ADDRESS",
}

ABOUT = """Learned optimizers: meta-train, evaluate, use.

LOPT_DATA_DIR: a folder with mnist/, fashion_mnist/, cifar10/ in the official file formats.
LOPT_CACHE_DIR: where downloads and compiled programs are kept.
LOPT_TRACEBACK=1: errors with their full traceback."""


def main() -> None:
    """Runs the command line; what a user can mend is said in one line, with exit status 2."""

    def interrupt(number: int, frame: object) -> None:
        """Ends a command as Ctrl-C does."""
        raise KeyboardInterrupt(number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), interrupt)
    try:
        _dispatch(sys.argv[1:])
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except Exception as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        from lopt.experiment.report.statistics import plain

        expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
        kind = "" if expected else f"{type(error).__name__}: "
        line = f"lopt: {kind}{' '.join(plain(error).split())}"
        print(f"\x1b[31m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr)
        sys.exit(2 if expected else 1)


def _dispatch(words: Sequence[str]) -> None:
    if words and words[0] == "--version":
        print(f"lopt {version('lopt')}")
        return
    name = next((n for n in (" ".join(words[:2]), *words[:1]) if n in COMMANDS), None)
    if name is None:
        _overview(words)
    elif name == "train" and {"-h", "--help"} & {*words[2:]} and not words[1].startswith("-"):
        from lopt.experiment.runs.registry import describe_recipe

        describe_recipe(words[1]).show()
    else:
        _run(name, COMMANDS[name], words[len(name.split()) :])


def _overview(words: Sequence[str]) -> None:
    """Prints a line for each command, or for those of a group such as `lopt probe`."""
    group = words[0] if words else ""
    shown = [name for name in COMMANDS if name.split()[0] == group] or list(COMMANDS)
    known = not words or group.startswith("-") or len(shown) < len(COMMANDS)
    if not known or (len(words) > 1 and not words[1].startswith("-")):
        raise ValueError(f"there is no command {' '.join(words[:2])!r}; see lopt --help.")
    program = f"lopt {group}" if len(shown) < len(COMMANDS) else "lopt"
    print(f"usage: {program} COMMAND ...\n\n{ABOUT}\n")
    for name in shown:
        about = inspect.getdoc(COMMANDS[name].settings) or ""
        print(f"  {name:18} {about.splitlines()[0]}")
    print("\nlopt COMMAND --help lists options.")


def _run(name: str, command: Command, words: Sequence[str]) -> None:
    import tyro

    about, options = inspect.getdoc(command.settings), options_of(command)
    given = dict(vars(tyro.cli(options, prog=f"lopt {name}", description=about, args=list(words))))
    subject, out = given.pop("subject", None), given.pop("out", None) if command.report else None
    trust = given.pop("trust", False) if command.subject else False
    settings = command.settings(**given)
    folder = _folder(command, subject, settings, out)
    from lopt.experiment.runs.environment import prepare_jax, stoppable

    prepare_jax()
    with stoppable("Start the command again; what it has written so far is used."):
        if command.subject == "run" or trust:
            from lopt.experiment.runs.run import Run

            run = Run(subject, trust=trust)
            if trust:
                run.trust_recipe()
            subject = run if command.subject == "run" else subject
        arguments = [subject] * bool(command.subject) + [folder] * command.keeps + [settings]
        module, _, function = command.function.partition(":")
        report = getattr(importlib.import_module(f"lopt.experiment.{module}"), function)(*arguments)
        if folder is not None:
            report.finish(folder, command.report)
        elif report is not None:
            report.show()


def options_of(command: Command) -> Any:
    """Returns a dataclass of what a command takes, as Tyro reads it."""
    import tyro

    meanings = s.help_of(command.settings)[1]
    types = get_type_hints(command.settings, include_extras=True)
    conf: Any = tyro.conf
    fields = []

    def add(name: str, kind: Any, meaning: str, default: Any = dataclasses.MISSING) -> None:
        for mark in getattr(kind, "__metadata__", ()):
            kind = getattr(conf, mark)[get_args(kind)[0]]
        shown = conf.arg(name=NAMES.get(name), metavar=METAVARS.get(name), help=meaning)
        fields.append((name, Annotated[kind, shown], dataclasses.field(default=default)))

    if command.subject:
        kind = Path if command.subject == "run" else str
        add("subject", Annotated[kind, "Positional"], SUBJECTS[command.subject])
    for field in dataclasses.fields(command.settings):
        add(field.name, types[field.name], meanings.get(field.name, ""), field.default)
    if command.report:
        place = "probes/NAME" if command.subject == "name" else command.subject.upper()
        where = command.folder.format(place, dataset="DATASET", recipe="RECIPE")
        add("out", Path | None, f"the folder of the results; {where} by default.", None)
    if command.subject:
        add("trust", bool, "run the recipe file that a run names, or has brought along.", False)
    return dataclasses.make_dataclass("Options", fields, kw_only=True)


def _folder(command: Command, subject: Any, settings: Any, out: Path | None) -> Path | None:
    """Returns where the report goes, which must be writable; None for none."""
    from lopt.experiment.runs.files import check_writable, free_folder

    if not command.report:
        return None
    # What is no run has its folders elsewhere.
    is_run = command.subject == "run" or (Path(f"{subject}") / "run.json").exists()
    place = subject if is_run else Path("probes") / Path(f"{subject}").stem
    named = vars(settings) | {"recipe": Path(getattr(settings, "recipe", "")).stem}
    folder = out or Path(command.folder.format(place, **named))
    if command.fresh and out is not None:
        if (out / "run.json").exists():
            raise FileExistsError(f"{out} holds a run; give another folder with --out.")
        if (out / f"{command.report}.json").exists():
            raise FileExistsError(f"{out} already holds such a report; give another with --out.")
    if command.fresh:
        folder = free_folder(folder, lambda one: (one / f"{command.report}.json").exists())
    check_writable(folder / "report.json")
    return folder


if __name__ == "__main__":
    main()
