"""The commands `lopt record` and `lopt distill`. JAX is imported by them, not by their help."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lopt.experiment.cache import check_seed, prepare_jax


def record(
    run: tyro.conf.Positional[Path],
    *,
    rows: int = 50_000,
    steps: int = 300,
    features: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    decays: tuple[float, ...] = (),
    lags: int | None = None,
    target: str | None = None,
    per_tensor: int = 10,
    padded: bool = False,
    keep_dead: bool = False,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Record what a run's optimizer sees and does, as a table for symbolic regression.

    Args:
        run: the folder of a run.
        rows: of the table.
        steps: of each recorded training; more are recorded until a table can take one row of ten.
        features: names of columns, with their lags as in gradient[t-2]; by default all that the
            rule gets.
        also: features besides those, such as m_normalised or momentum_0.9.
        decays: of exponential averages of what the rule gets, features as well.
        lags: raw gradients of so many steps, instead of features.
        target: what is to be explained: output, or output_0 and so on, or update; by default the
            rule's output if it has one, and otherwise the update.
        per_tensor: coordinates recorded of each tensor.
        padded: count gradients before the first step as zeros; rows that need them are left out
            otherwise.
        keep_dead: keep coordinates that have no gradient for 20 steps.
        seed: of everything random.
        output: the file, ending in .npz, .parquet or .npy; RUN/table.npz by default.
    """
    from lopt.experiment.files import check_writable
    from lopt.experiment.tables import check_path, save_table

    path = run / "table.npz" if output is None else output
    check_seed(seed)
    check_path(path)
    check_writable(path)
    if path.exists():
        raise FileExistsError(f"{path} already exists; give another file with --output.")
    prepare_jax()
    from lopt.experiment.record_run import RecordSettings, record_run

    began = time.perf_counter()
    settings = RecordSettings(
        rows=rows,
        steps=steps,
        features=features,
        lags=lags,
        output=target,
        per_tensor=per_tensor,
        padded=padded,
        keep_dead=keep_dead,
        also=also,
        decays=decays,
    )
    table = record_run(run, settings, seed)
    save_table(path, table)
    about, console = table.about, Console()
    console.print(
        f"Wrote {path}: {len(table)} rows, {len(table.columns)} columns, output "
        f"{about['output']}, from {about['runs']} runs of {steps} steps on "
        f"{len(set(table.task.tolist()))} tasks, in {time.perf_counter() - began:.0f} s.",
        highlight=False,
    )
    if about["diverged_runs"]:
        console.print(
            f"{about['diverged_runs']} runs became not finite and were left out.", highlight=False
        )


def distill(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    rows: int = 20_000,
    steps: int = 200,
    history: int = 2,
    also: tuple[str, ...] | None = None,
    decays: tuple[float, ...] | None = None,
    lags: int | None = None,
    search: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: int = 3,
    search_rows: int = 2000,
    odd: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    longest: int | None = None,
    digits: int = 3,
    seed: int = 0,
    out: Path | None = None,
    sanity: bool = False,
) -> None:
    """Distil a run's optimizer into a short equation, score it, and train with it.

    Killed and started again, it goes on with what it has recorded and found.

    Args:
        run: the folder of a run.
        rows: of the recorded table.
        steps: of each recorded training.
        history: how many steps back every feature is looked at, for rules with a memory.
        also: features besides those that the rule sees, such as m_normalised or momentum_0.9; for
            rules with a memory warmup_0.98 by default, which is 1 - 0.98^t.
        decays: of exponential averages of what the rule sees, features as well; for rules with a
            memory 0.5, 0.9 and 0.98 by default.
        lags: raw gradients of so many steps, instead of features.
        search: a backend: template, operon, gplearn or pysr; may be repeated; template and operon
            by default.
        seeds: of each search.
        search_rows: rows that a search sees; all of them are fitted in the end.
        odd: a feature that changes sign with the gradient, and its averages with it; may be
            repeated. If there is any, u(-g) = -u(g) is imposed.
        longest: the most nodes of the equation that is chosen. It may be asked for afterwards: what
            was found is kept.
        digits: significant ones of printed constants, more where they are needed.
        seed: of everything random.
        out: the folder of the results; RUN/distilled by default.
        sanity: distil known optimizers from 20 raw gradients instead of a run.
    """
    if (run is None) != sanity:
        raise ValueError("lopt distill takes a run, or --sanity: one of the two.")
    if not 1 <= digits <= 17:
        raise ValueError(f"--digits {digits} must be from 1 to 17; try 3.")
    check_seed(seed)
    prepare_jax()
    console = Console()
    if run is None:
        _sanity(console, seed)
        return
    from lopt.experiment.distill_report import FILES, write_distillation
    from lopt.experiment.distill_run import distill_run
    from lopt.experiment.distill_settings import DistillSettings

    searches = search or ("template", "operon")
    settings = DistillSettings(
        rows,
        steps,
        history,
        also,
        decays,
        lags,
        searches,
        seeds,
        search_rows,
        tuple(odd),
        longest,
        seed,
    )
    folder = run / "distilled" if out is None else out
    with _stages(console) as say:
        report = distill_run(run, folder, settings, say)
    write_distillation(report, folder, console, digits)
    console.print(f"Wrote {', '.join(FILES)}, weights.safetensors in {folder}.", highlight=False)


def _sanity(console: Console, seed: int) -> None:
    from lopt.symbolic.export import to_text
    from lopt.symbolic.sanity import run_sanity

    table = Table(title="Known optimizers, distilled from raw gradients", title_justify="left")
    for heading in ("optimizer", "held-out R2", "asked", "nodes", "CPU s", "equation"):
        table.add_column(
            heading, justify="left" if heading in ("optimizer", "equation") else "right"
        )
    with _stages(console) as say:
        rows = run_sanity(seed=seed, progress=say)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.r_squared:.5f}",
            f"{row.required:g}",
            f"{row.nodes:g}",
            f"{row.seconds:.1f}",
            to_text(row.expression, 3)[:60],
        )
    console.print(table)


@contextlib.contextmanager
def _stages(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Draws a progress bar of stages, with what is being done."""
    bar = Progress(
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        console=console,
    )
    task = bar.add_task("", total=None, what="recording")

    def say(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, what=what)

    with bar:
        yield say
