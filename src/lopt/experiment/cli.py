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
from lopt.experiment.studies import settings as h


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        settings: what it is asked for; the docstring is its help.
        function: where it is, as "module:function" of `lopt.experiment`.
        subject: what it is given first: "run", the folder of one, or "name".
        folder: where its report goes, without --out; {} stands for the subject.
        report: the name of the report's files.
        keeps: whether the folder is given to the function, which goes on with what is there.
        fresh: whether the folder must not hold such a report.
    """

    settings: Any
    function: str
    subject: str = ""
    folder: str = ""
    report: str = ""
    keeps: bool = False
    fresh: bool = False


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
    "train": Command(s.TrainSettings, "runs.command:train_command"),
    "tune": Command(s.TuneSettings, "runs.command:tune_command"),
    "recipes": Command(s.RecipesSettings, "runs.registry:list_recipes"),
    "evaluate": Command(s.EvaluateSettings, "evaluation.compare:evaluate", "run", "{}", "report"),
    "record": Command(s.RecordSettings, "record:record", "run"),
    "distill": Command(
        s.DistillSettings, "distill:distill_run", "run", "{}/distilled", "report", True
    ),
    "sanity": Command(s.SanitySettings, "studies.sanity:sanity"),
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
METAVARS = {"settings": "FIELD=VALUE", "truncations": "STEPS ...", "horizons": "STEPS ..."}

ABOUT = """Learned optimizers: meta-train, evaluate, use.

LOPT_DATA_DIR: a folder with mnist/, fashion_mnist/, cifar10/ in the official file formats.
LOPT_CACHE_DIR: where downloads and compiled programs are kept.
LOPT_TRACEBACK=1: errors with their full traceback."""


def main() -> None:
    """Runs the command line; what a user can mend is said in one line, with exit status 2."""
    words = sys.argv[1:]
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), _interrupt)
    try:
        _dispatch(words)
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


def _interrupt(number: int, frame: object) -> None:
    """Ends a command as Ctrl-C does."""
    raise KeyboardInterrupt(number)


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
    print(
        f"usage: lopt {group if len(shown) < len(COMMANDS) else ''} COMMAND ...".replace("  ", " ")
    )
    print(f"\n{ABOUT}\n")
    for name in shown:
        print(f"  {name:18} {s.help_of(COMMANDS[name].settings)[0].partition(chr(10))[0]}")
    print("\nlopt COMMAND --help lists options.")


def _run(name: str, command: Command, words: Sequence[str]) -> None:
    given = _options(name, command, words)
    subject, out = given.pop("subject", None), given.pop("out", None)
    trust = given.pop("trust", False) if command.subject == "run" else False
    settings = command.settings(**given)
    folder = _folder(command, subject, settings, out)
    from lopt.experiment.runs.environment import prepare_jax

    prepare_jax()
    module, _, function = command.function.partition(":")
    arguments = [settings]
    if command.keeps:
        arguments.insert(0, folder)
    if command.subject == "run":
        from lopt.experiment.runs.run import Run

        arguments.insert(0, Run(subject, trust=trust))
    elif command.subject:
        arguments.insert(0, subject)
    report = getattr(importlib.import_module(f"lopt.experiment.{module}"), function)(*arguments)
    if report is None:
        return
    if folder is None:
        report.show()
    else:
        report.finish(folder, command.report)


def _options(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Returns what is given on the command line, by field."""
    import tyro

    about, meanings = s.help_of(command.settings)
    types = get_type_hints(command.settings, include_extras=True)
    parameters = []
    marked: Any = tyro.conf
    known = {
        "repeated": marked.UseAppendAction,
        "positional": marked.Positional,
        "hidden": marked.Suppress,
    }

    def add(name: str, kind: Any, default: Any, meaning: str, marks: Sequence[str] = ()) -> None:
        shown = tyro.conf.arg(name=NAMES.get(name), metavar=METAVARS.get(name), help=meaning)
        kind = Annotated[kind, shown]
        for mark in marks:
            kind = known[mark][kind]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=kind))

    empty = inspect.Parameter.empty
    if command.subject:
        kind = Path if command.subject == "run" else str
        add("subject", kind, empty, SUBJECTS[command.subject], ["positional"])
    for field in dataclasses.fields(command.settings):
        kind, marks = types[field.name], getattr(types[field.name], "__metadata__", ())
        kind = get_args(kind)[0] if marks else kind
        default = empty if field.default is dataclasses.MISSING else field.default
        add(field.name, kind, default, meanings[field.name], marks)
    if command.report:
        where = command.folder.format(command.subject.upper(), dataset="DATASET") or "the run's"
        add("out", Path | None, None, f"the folder of the results; {where} by default.")
    if command.subject == "run":
        add("trust", bool, False, "run the recipe file that the run names, or has brought along.")

    def collect(**given: Any) -> dict[str, Any]:
        return given

    changed: Any = collect
    # A type checker's wrapper would lead back to the function inside of it.
    vars(changed).pop("__wrapped__", None)
    changed.__signature__ = inspect.Signature(parameters)
    changed.__annotations__ = {one.name: one.annotation for one in parameters}
    return tyro.cli(changed, prog=f"lopt {name}", description=about, args=list(words))


def _folder(command: Command, subject: Any, settings: Any, out: Path | None) -> Path | None:
    """Returns where the report goes; None for none.

    Raises:
        FileExistsError: if a given folder holds a run, or such a report already.
        OSError: if it cannot be written.
    """
    from lopt.experiment.runs.files import check_writable

    if not command.report:
        return None
    # What is no run has its folders elsewhere.
    place = (
        subject
        if command.subject == "run" or (Path(f"{subject}") / "run.json").exists()
        else (Path("probes") / Path(f"{subject}").stem)
    )
    folder = base = out or Path(command.folder.format(place, **vars(settings)))
    if command.fresh and out is not None:
        if (out / "run.json").exists():
            raise FileExistsError(
                f"{out} holds a run, whose figures would be replaced; give another folder with "
                "--out."
            )
        if (out / f"{command.report}.json").exists():
            raise FileExistsError(f"{out} already holds such a report; give another with --out.")
    elif command.fresh:
        number = 2
        while (folder / f"{command.report}.json").exists():
            folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    check_writable(folder / "report.json")
    return folder


if __name__ == "__main__":
    main()
