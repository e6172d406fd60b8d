"""What `lopt probe symmetry` prints, writes and draws: tables, JSON, figures, and one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.experiment.files import write_bytes, write_json
from lopt.experiment.page import Picture, Rows, Section, Text, write_page
from lopt.experiment.probe_dynamics_watch import RATES
from lopt.experiment.probe_symmetry import SymmetryProbeResult, Trained
from lopt.experiment.probe_symmetry_figures import (
    MOST_ROWS,
    draw_deviations,
    draw_losses,
    draw_meta_training,
    draw_stages,
    over_steps,
)
from lopt.experiment.probe_symmetry_watch import MEASURES, Kept, Sizes

# A symmetry counts as broken if the normalised deviation is so many roundings.
BROKEN = 1000
CURVE_POINTS = 40
_HEADINGS = (
    "optimizer",
    "rate",
    "signed",
    "absolute",
    "normalised",
    "gradients",
    "drift",
    "final loss",
)


def write_symmetry_probe(
    probe: SymmetryProbeResult, said: dict[str, Any], folder: Path, console: Console
) -> list[str]:
    """Prints the tables and a verdict, and writes symmetry.json, figures and symmetry.html.

    Args:
        probe: what was found.
        said: what was asked for, the head of the JSON.
        folder: where to.
        console: which tables are printed on.

    Returns:
        The names of the files.
    """
    numbers = {**said, **numbers_of(probe)}
    console.print(str(probe.found), highlight=False)
    for one in numbers["symmetries"]:
        console.print(_printed(_title(one), _HEADINGS, _rows(one)))
    headings, rows = _stage_rows(numbers)
    if rows:
        title = f"Over meta-training: normalised, mean of the first {probe.short} steps"
        console.print(_printed(title, headings, rows))
    console.print(numbers["verdict"], highlight=False)
    pictures = _pictures(probe)
    for name, (content, _) in pictures.items():
        write_bytes(folder / f"{name}.png", content)
    write_json(folder / "symmetry.json", numbers)
    title = f"The symmetries that {numbers['run']} breaks"
    write_page(folder / "symmetry.html", title, _page(probe, numbers, pictures))
    return ["symmetry.json", "symmetry.html", *(f"{name}.png" for name in pictures)]


def numbers_of(probe: SymmetryProbeResult) -> dict[str, Any]:
    """Returns what goes into the JSON; means and deviations are over seeds."""
    exact = probe.found.generators
    symmetries = []
    for generator in (*exact, *probe.found.nearly):
        evidence = probe.found.evidence[generator.name]
        symmetries.append(
            {
                "name": generator.name,
                "kind": generator.kind,
                "units": generator.units,
                "holds": "exactly" if generator in exact else "nearly",
                "slope": evidence.slope,
                "moved": evidence.moved,
                "optimizers": [_optimizer(one, generator) for one in probe.optimizers],
                "meta_training": _meta_training(probe, generator),
            }
        )
    held = {one["name"] for one in symmetries} | {each.name for each in probe.found.maps}
    return {
        "precision": probe.precision,
        "steps": probe.steps,
        "short_steps": probe.short,
        "outer_steps_again": probe.outer_steps,
        "rates_tried": list(RATES),
        "symmetries": symmetries,
        "discrete": [each.name for each in probe.found.maps],
        "do_not_hold": {
            name: {"slope": evidence.slope, "moved": evidence.moved}
            for name, evidence in probe.found.evidence.items()
            if name not in held
        },
        "losses": {one.name: _over_seeds(one.course.loss) for one in probe.optimizers},
        "curve_steps": _shown(probe.steps),
        "verdict": _verdict(symmetries, probe.precision),
    }


def _optimizer(one: Trained, generator: AbstractGenerator) -> dict[str, Any]:
    kept: Kept = one.course.symmetries[generator.name]
    steps = np.asarray(one.course.loss).shape[1]
    points = np.array(_shown(steps)) - 1
    drift = None if kept.drift is None else _over_seeds(np.asarray(kept.drift)[:, -1])
    return {
        "optimizer": one.name,
        "learning_rate": None if one.rate is None else one.rate.value,
        "learning_rate_at_edge_of_grid": one.rate is not None and one.rate.at_edge,
        "updates": _means(kept.updates),
        "gradients": _means(kept.grads),
        "drift": drift,
        "final_loss": _over_seeds(np.asarray(one.course.loss)[:, -1]),
        "curves": {
            which: {
                measure: _over_seeds(np.asarray(getattr(sizes, measure))[:, points])
                for measure in MEASURES
            }
            for which, sizes in (("updates", kept.updates), ("gradients", kept.grads))
        },
    }


def _means(sizes: Sizes) -> dict[str, Any]:
    """Returns each measure's mean over steps, its mean and deviation over seeds."""
    return {
        measure: _over_seeds(np.asarray(getattr(sizes, measure)).mean(axis=1))
        for measure in MEASURES
    }


def _meta_training(probe: SymmetryProbeResult, generator: AbstractGenerator) -> dict[str, Any]:
    def measured(course: Any) -> dict[str, Any]:
        return {
            measure: _over_seeds(over_steps(course, generator.name, measure, probe.short).T)
            for measure in MEASURES
        }

    return {
        "again": None if probe.replay is None else measured(probe.replay),
        "kept": [
            {"outer_step": number, **measured(course)} for number, course in probe.stages.items()
        ],
        "optimizers": [{"optimizer": one.name, **measured(one.course)} for one in probe.optimizers],
    }


def _over_seeds(values: Any) -> dict[str, Any]:
    """Returns mean and deviation over the first axis; no deviation of a single seed."""
    values = np.asarray(values, float)
    spread = values.std(axis=0, ddof=1).tolist() if len(values) > 1 else None
    return {"mean": values.mean(axis=0).tolist(), "deviation": spread}


def _shown(steps: int) -> list[int]:
    """Returns the steps whose numbers the JSON has, counted from one; the last is among them."""
    return np.unique(np.linspace(1, steps, min(CURVE_POINTS, steps)).round().astype(int)).tolist()


def _verdict(symmetries: list[dict[str, Any]], precision: float) -> str:
    """Returns a sentence for each optimizer: which of the symmetries that hold it breaks."""
    exact = [one for one in symmetries if one["holds"] == "exactly"]
    if not exact:
        return "No symmetry holds but for an epsilon: see the tables for what that hides."
    sentences = []
    for i, optimizer in enumerate(one["optimizer"] for one in exact[0]["optimizers"]):
        found = {
            one["name"]: one["optimizers"][i]["updates"]["normalised"]["mean"] for one in exact
        }
        broken = {name: size for name, size in found.items() if not size <= BROKEN * precision}
        who = "The learned optimizer" if optimizer == "learned" else optimizer
        if not broken:
            sentences.append(f"{who} keeps all {len(exact)} to rounding.")
            continue
        worst = max(broken, key=lambda name: np.nan_to_num(broken[name], nan=np.inf))
        sentences.append(
            f"{who} breaks {len(broken)} of {len(exact)} symmetries, most {worst} "
            f"(normalised {broken[worst]:.2g})."
        )
    return " ".join(sentences)


def _title(one: dict[str, Any]) -> str:
    apart = f", nearly: slope {one['slope']:.1e}" if one["holds"] == "nearly" else ""
    return f"{one['name']} ({one['units']} units{apart})"


def _rows(one: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in one["optimizers"]:
        edge = "*" if row["learning_rate_at_edge_of_grid"] else ""
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}{edge}"
        rows.append(
            [
                row["optimizer"],
                rate,
                _text(row["updates"]["signed"], short=True),
                _text(row["updates"]["absolute"], short=True),
                _text(row["updates"]["normalised"]),
                _text(row["gradients"]["normalised"], short=True),
                "-" if row["drift"] is None else _text(row["drift"], short=True),
                _text(row["final_loss"]),
            ]
        )
    return rows


def _stage_rows(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the table of kept weights: a row for each, a column for each symmetry."""
    found = numbers["symmetries"]
    rows = [
        [str(stage["outer_step"])]
        + [_text(one["meta_training"]["kept"][i]["normalised"]) for one in found]
        for i, stage in enumerate(found[0]["meta_training"]["kept"])
    ]
    return ["outer step", *(one["name"] for one in found)], rows


def _text(found: dict[str, Any], *, short: bool = False) -> str:
    mean, spread = found["mean"], found["deviation"]
    if not np.isfinite(mean):
        return "diverged"
    return f"{mean:.2g}" if spread is None or short else f"{mean:.2g} ± {spread:.1g}"


def _printed(title: str, headings: Sequence[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _pictures(probe: SymmetryProbeResult) -> dict[str, tuple[bytes, str]]:
    """Returns each PNG and what it shows, by the name of its file."""
    exact, nearly = probe.found.generators, probe.found.nearly
    caption = (
        "Updates, mean and standard deviation over seeds. Dotted: the gradients on the learned "
        "optimizer's path. What is exactly zero is not drawn."
    )
    pictures = {"losses": (draw_losses(probe.optimizers), "Mean over seeds.")}
    for name, generators in (("deviations", exact), ("nearly", nearly)):
        if generators:
            more = len(generators) - MOST_ROWS
            rest = f" {more} more are in symmetry.json." if more > 0 else ""
            pictures[name] = (draw_deviations(probe.optimizers, generators), caption + rest)
    pictures["meta_training"] = (
        draw_meta_training(probe, (*exact, *nearly)),
        f"Mean deviation of the updates in the first {probe.short} steps. Line: the weights of "
        "each outer step, as meta-training is done again; dots: kept weights; dashed: the "
        "references.",
    )
    pictures["stages"] = (
        draw_stages(probe, (*exact, *nearly)),
        "The learned optimizer with the weights it began with, and those of kept checkpoints.",
    )
    return pictures


def _page(
    probe: SymmetryProbeResult,
    numbers: dict[str, Any],
    pictures: dict[str, tuple[bytes, str]],
) -> list[Section]:
    def tables(holds: str) -> list[Text | Rows | Picture]:
        parts: list[Text | Rows | Picture] = []
        for one in numbers["symmetries"]:
            if one["holds"] == holds:
                parts += [Text(_title(one)), Rows(_HEADINGS, _rows(one))]
        return parts

    sections = [
        Section(
            "What was found",
            [
                Text(numbers["verdict"]),
                Text(
                    "Along the tangents of a symmetry the loss cannot change, and gradients have "
                    "no component. What updates have along them is the optimizer's own doing."
                ),
                Text(str(probe.found), code=True),
            ],
        ),
        Section(
            "Meta-testing",
            [
                Text(
                    f"{numbers['seeds']} fresh tasks of the run, {probe.steps} steps each, the "
                    "same params and batches for all optimizers. Rates are the best of "
                    f"{len(RATES)} for just these runs (mean training loss; * at the grid's edge). "
                    "Tables have means over steps, and drift and loss at the end. "
                    "Signed sums are those published: units cancel in them. Absolute sums do not "
                    "cancel; the normalised measure does not grow with the learning rate: it is "
                    "the length of the cosines between the update and the tangents. Drift is how "
                    "far what gradient flow conserves has moved, as a share of it."
                ),
                Picture(*pictures["losses"]),
            ],
        ),
    ]
    if "deviations" in pictures:
        sections.append(
            Section("Symmetries that hold", [Picture(*pictures["deviations"]), *tables("exactly")])
        )
    if "nearly" in pictures:
        explained = Text(
            "An epsilon, as in batch norm, breaks these by the slope that is given, so that even "
            "gradients have a little of them: only what is larger is the optimizer's."
        )
        parts = [explained, Picture(*pictures["nearly"]), *tables("nearly")]
        sections.append(Section("Symmetries that hold but for an epsilon", parts))
    parts = [Picture(*pictures["meta_training"]), Rows(*_stage_rows(numbers))]
    sections.append(Section("Meta-training", [*parts, Picture(*pictures["stages"])]))
    return sections
