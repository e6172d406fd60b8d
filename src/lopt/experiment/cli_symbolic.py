"""The commands `lopt record` and `lopt distill`. JAX is imported by them, not by their help."""

import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

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
    from lopt.experiment.distill_report import distillation_report
    from lopt.experiment.distill_run import distill_run
    from lopt.experiment.distill_settings import DistillSettings
    from lopt.experiment.files import write_bytes, write_json
    from lopt.symbolic.serial import to_json

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
    found = distill_run(run, folder, settings)
    report = distillation_report(found, folder, digits)
    report.show(console)
    write_bytes(folder / "equation.tex", (report.data["latex"] + "\n").encode())
    write_json(folder / "equation.json", to_json(found.found.chosen.expression))
    names = ["equation.tex", "equation.json", *report.save(folder), "weights.safetensors"]
    console.print(f"Wrote {', '.join(names)} in {folder}.", highlight=False, markup=False)


def _sanity(console: Console, seed: int) -> None:
    from lopt.experiment.report import Table, progress
    from lopt.symbolic.export import to_text
    from lopt.symbolic.sanity import run_sanity

    with progress("distilling", 7) as at:
        rows = run_sanity(seed=seed, progress=lambda done, of, what: at(done, what))
    Table(
        "Known optimizers, distilled from raw gradients",
        [
            {
                "optimizer": row.name,
                "held-out R2": f"{row.r_squared:.5f}",
                "asked": row.required,
                "nodes": row.nodes,
                "CPU s": row.seconds,
                "equation": to_text(row.expression, 3)[:60],
            }
            for row in rows
        ],
    ).print(console)
