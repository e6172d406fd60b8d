"""What all probes share on the host: where results go, and a bar of named stages."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lopt.experiment.files import check_writable


def folder_of(name: str, out: Path | None, files: tuple[str, ...]) -> Path:
    """Returns where results go: a folder given, or one that holds none yet."""
    if out is not None:
        if out.is_file():
            raise FileExistsError(f"{out} is a file; give a folder with --out.")
        if (out / "run.json").exists():
            raise FileExistsError(
                f"{out} holds a run, whose figures a probe would replace; give another folder "
                "with --out."
            )
        if any((out / file).exists() for file in files):
            raise FileExistsError(f"{out} already holds a probe; give another folder with --out.")
        check_writable(out / files[0])
        return out
    base = Path("probes") / Path(name).stem
    folder, number = base, 2
    while any((folder / file).exists() for file in files):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    check_writable(folder / files[0])
    return folder


@contextlib.contextmanager
def stages_of(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Draws a progress bar; each call of what it yields ends a stage and names the next."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        disable=not show,
        transient=True,
    )
    task = bar.add_task("tracing", total=total)
    with bar:
        yield lambda text: bar.update(task, advance=1, description=text)
