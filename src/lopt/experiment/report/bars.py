"""One progress bar for all long work, also in a notebook; elsewhere a line every so often."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from rich import progress as rich
from rich.console import Console
from rich.text import Text

# Between two lines, and between two pictures of the bar in a notebook.
SECONDS, NOTEBOOK_SECONDS = 30.0, 0.5
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
    shown: Any = None
    if show and console.is_jupyter:
        from IPython.display import display

        shown = display(bar, display_id=True)
    last = monotonic()

    def at(done: int, text: str) -> None:
        nonlocal last
        bar.update(task, completed=done, text=text)
        due = monotonic() - last > (NOTEBOOK_SECONDS if shown else SECONDS)
        if show and not console.is_terminal and (due or (shown and done >= total)):
            last = monotonic()
            if shown:
                shown.update(bar)
            else:
                console.print(Text(f"{what} {done}/{total} {text}"), soft_wrap=True)

    with bar:
        yield at


@contextlib.contextmanager
def stages(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Shows stages of a job; each call of what it yields ends one and names the next."""
    counts = itertools.count()
    with progress(what, total) as at:
        yield lambda text: at(next(counts), text)
