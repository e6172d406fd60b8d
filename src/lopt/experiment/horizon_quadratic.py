"""The report of short-horizon bias on the noisy quadratic: a table, JSON and a figure."""

import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lopt.analysis import Row, Run, Study, acceptance_rows, paper_study
from lopt.experiment.files import write_bytes, write_json
from lopt.experiment.quadratic_figure import draw_quadratic

# How many pieces of work `paper_study` and `acceptance_rows` announce.
_PIECES = 32


def quadratic_report(out_folder: Path, console: Console) -> dict[str, Any]:
    """Studies the paper's problem, prints its table, writes the files, and returns the numbers.

    Args:
        out_folder: where `quadratic.json` and `quadratic.png` go.
        console: where the table is printed.
    """
    began = time.perf_counter()
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        piece = bar.add_task("", total=_PIECES)

        def announce(name: str) -> None:
            bar.update(piece, advance=1, description=name)

        found = paper_study(announce)
        rows = acceptance_rows(found, announce)
    report = {
        "seconds": time.perf_counter() - began,
        "all_within": all(row.within for row in rows),
        "rows": [vars(row) | {"within": row.within} for row in rows],
        "runs": _runs(found),
        "look_ahead": {h: run.final_loss for h, run in found.look_ahead.items()},
        "look_ahead_rate": {h: run.final_loss for h, run in found.look_ahead_rate.items()},
        "fits": {
            h: {"learning_rate": f.learning_rate, "decay": f.decay, "final_loss": f.run.final_loss}
            for h, f in found.fits.items()
        },
    }
    # Wider than some terminals: a number that is cut off is worse than a line that wraps.
    Console(file=console.file, width=max(console.width, 100)).print(_table(rows))
    missed = [row.name for row in rows if not row.within]
    verdict = f"not within: {', '.join(missed)}" if missed else "all within their tolerance"
    console.print(f"{len(rows)} numbers in {report['seconds']:.0f} seconds, {verdict}.")
    write_json(out_folder / "quadratic.json", report)
    write_bytes(out_folder / "quadratic.png", draw_quadratic(found))
    return report


def _runs(found: Study) -> dict[str, Any]:
    names = ("greedy", "greedy_rate", "fixed", "fixed_rate", "adam", "optimal", "optimal_rate")
    return {name: _numbers(getattr(found, name)) for name in names}


def _numbers(run: Run) -> dict[str, Any]:
    return {
        "final_loss": run.final_loss,
        "growth": run.growth,
        "losses": run.losses.tolist(),
        "learning_rates": run.schedule.learning_rates.tolist(),
        "momenta": run.schedule.momenta.tolist(),
        "bands_at_the_end": run.bands[-1].tolist(),
    }


def _table(rows: list[Row]) -> Table:
    table = Table(
        title="The noisy quadratic: 1000 directions, 250 steps",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "quantity", "computed", "reference", "within"):
        side = "right" if heading == "computed" else "left"
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        within = "yes" if row.within else "[red]no[/red]"
        table.add_row(row.name, row.quantity, f"{row.value:.8g}", row.reference, within)
    return table
