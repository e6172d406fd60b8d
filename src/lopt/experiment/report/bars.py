"""One progress bar for all long work; without a terminal, a plain line every so often."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS = 30.0
At = Callable[[int, str], None]


@contextlib.contextmanager
def progress(what: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[At]:
    """Shows how far a job is, on standard error.

    Args:
        what: is being done.
        total: how many steps there are.
        done: how many were done before.
        show: whether to show anything.

    Yields:
        A function of how many steps are done, and a text of what is done next.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
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
def stages(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Shows stages of a job; each call of what it yields ends one and names the next."""
    counts = itertools.count()
    with progress(what, total, show=show) as at:
        yield lambda text: at(next(counts), text)
