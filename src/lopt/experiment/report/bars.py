"""One progress bar for all long work; without a terminal, a plain line every so often."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from time import monotonic

from rich import progress as rich
from rich.console import Console
from rich.text import Text

SECONDS = 30.0
At = Callable[[int, str], None]


@contextlib.contextmanager
def progress(what: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[At]:
    """Shows on standard error how many steps are done.

    Yields a function of how many are, and of a text on what is done next.
    """
    console = Console(stderr=True)
    bar = rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        *(rich.BarColumn(), rich.MofNCompleteColumn()),
        rich.TextColumn("{task.fields[text]}", markup=False),
        *(rich.TimeElapsedColumn(), rich.TimeRemainingColumn()),
        console=console,
        disable=not (show and console.is_terminal),
    )
    task = bar.add_task(what, total=total, completed=done, text="compiling")
    last = monotonic()

    def at(done: int, text: str) -> None:
        nonlocal last
        bar.update(task, completed=done, text=text)
        if show and not console.is_terminal and monotonic() - last > SECONDS:
            last = monotonic()
            console.print(Text(f"{what} {done}/{total} {text}"), soft_wrap=True)

    with bar:
        yield at


@contextlib.contextmanager
def stages(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Shows stages of a job; each call of what it yields ends one and names the next."""
    counts = itertools.count()
    with progress(what, total) as at:
        yield lambda text: at(next(counts), text)
