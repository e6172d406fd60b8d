"""What commands share: options from settings, reports that are shown and saved, lines of text."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from lopt.experiment.report import Report


def options(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the fields of settings options of a command, which is given the settings."""
    fields = dataclasses.fields(settings)
    types = get_type_hints(settings, include_extras=True)
    _, _, texts = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")
    texts = re.sub(r"\n {8}", " ", texts)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(command, include_extras=True)
        kept = [p for n, p in inspect.signature(command).parameters.items() if n != "settings"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        more = [
            inspect.Parameter(f.name, keyword, default=f.default, annotation=types[f.name])
            for f in fields
        ]

        # Errors of the settings come from the command, so that they are shown in a line as others.
        def run(*arguments: Any, **options: Any) -> None:
            given = {one.name: options.pop(one.name) for one in fields if one.name in options}
            command(*arguments, settings=settings(**given), **options)

        changed: Any = run
        # A type checker's wrapper would lead back to the function inside of it.
        vars(changed).pop("__wrapped__", None)
        changed.__name__ = command.__name__
        changed.__signature__ = inspect.Signature([*kept, *more])
        changed.__annotations__ = {
            n: own[n] for n in own if n not in ("settings", "return")
        } | types
        changed.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n{texts}"
        return run

    return decorate


def say(text: str) -> None:
    """Prints a line, however long, as it is."""
    Console().print(Text(text), soft_wrap=True)


def finish(report: "Report", folder: Path, name: str) -> None:
    """Shows and saves a report, and says which files it wrote."""
    report.show()
    say(f"Wrote {', '.join(report.save(folder, name))} in {folder}.")
