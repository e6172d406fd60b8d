"""What `lopt probe dynamics` prints, writes and draws: tables, JSON, figures, and one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from lopt.analysis.dynamics import Alignment, LearningRate, UpdateDistribution
from lopt.experiment import dynamics_figures as figures
from lopt.experiment.files import write_bytes, write_json
from lopt.experiment.page import Picture, Rows, Section, Text, write_page
from lopt.experiment.probe_dynamics import DynamicsProbe
from lopt.experiment.probe_dynamics_figures import draw_courses, draw_features, draw_noise
from lopt.experiment.probe_dynamics_numbers import numbers_of
from lopt.experiment.probe_dynamics_tables import Grid, tables_of
from lopt.experiment.probe_dynamics_watch import HISTOGRAM, REFERENCES


def write_dynamics_probe(
    probe: DynamicsProbe, said: dict[str, Any], folder: Path, console: Console
) -> list[str]:
    """Prints the tables, writes dynamics.json, the figures and dynamics.html; returns their names.

    Args:
        probe: what was found out.
        said: what was asked for, the head of the JSON.
        folder: where to.
        console: which tables are printed on.
    """
    numbers = {**said, **numbers_of(probe)}
    tables = tables_of(numbers)
    for title, headings, rows in tables.values():
        if rows:
            console.print(_printed(title, headings, rows))
    for part, reason in probe.left_out.items():
        console.print(f"Left out: {part}. {reason}", highlight=False)
    pictures = _pictures(probe)
    for name, (content, _) in pictures.items():
        write_bytes(folder / f"{name}.png", content)
    write_json(folder / "dynamics.json", numbers)
    title = f"The inner life of {numbers['run']}"
    write_page(folder / "dynamics.html", title, _page(probe, numbers, tables, pictures))
    return ["dynamics.json", "dynamics.html", *(f"{name}.png" for name in pictures)]


def _printed(title: str, headings: Sequence[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _pictures(probe: DynamicsProbe) -> dict[str, tuple[bytes, str]]:
    """Returns each PNG and what it shows, by the name of its file."""
    aligned = probe.learned.seen.alignment
    alignments = {name: _mean_over_seeds(aligned[name]) for name in REFERENCES}
    rate: LearningRate = _mean_over_seeds(probe.learned.seen.rate)
    pictures = {
        "courses": (
            draw_courses(probe.optimizers),
            "Mean over seeds, and what lies between the least and the largest of them.",
        )
    }
    for one in probe.optimizers:
        pictures[f"updates_{one.name}"] = (
            figures.draw_histograms(_over_seeds(one.seen.updates), HISTOGRAM, probe.tensors),
            f"{one.name}: the distribution of |update| in each tensor, of all seeds together. "
            f"Shares of less than {HISTOGRAM.lowest:g}, zeros included, are not drawn.",
        )
    pictures["alignment"] = (
        figures.draw_alignment(alignments, rate, probe.tensors),
        "The learned optimizer on its own path: what the references would have done there. Means "
        "over seeds.",
    )
    pictures["noise"] = (draw_noise(probe.optimizers), "Each on its own path, states frozen.")
    portraits = {one.name: one.portrait for one in probe.optimizers if one.portrait is not None}
    pictures["valley"] = (
        figures.draw_portraits(portraits),
        "Paths from a grid of starts (arrows: first updates, dots: ends). Every point of the "
        "diagonal is a minimum.",
    )
    answers = {one.name: one.answers for one in probe.optimizers if one.answers is not None}
    pictures["signals"] = (
        figures.draw_signals(probe.signals, answers),
        "Updates of one coordinate, whose gradient is scripted.",
    )
    if any(one.curves is not None for one in probe.features):
        pictures["responses"] = (
            draw_features(probe.features),
            "The update as each feature alone is varied, at recorded inputs, and in bold the mean: "
            "the partial dependence.",
        )
    return pictures


def _mean_over_seeds(found: Alignment | LearningRate) -> Any:
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)


def _over_seeds(found: UpdateDistribution) -> UpdateDistribution:
    """Returns counts of all seeds together, the largest update of any, and mean norms."""
    return UpdateDistribution(
        jnp.sum(found.counts, axis=0),
        jnp.max(found.largest, axis=0),
        jnp.mean(found.update_norm, axis=0),
        jnp.mean(found.param_norm, axis=0),
    )


def _page(
    probe: DynamicsProbe,
    numbers: dict[str, Any],
    tables: dict[str, Grid],
    pictures: dict[str, tuple[bytes, str]],
) -> list[Section]:
    def table(name: str) -> Rows:
        _, headings, rows = tables[name]
        return Rows(headings, rows)

    def picture(name: str) -> Picture:
        return Picture(*pictures[name])

    sections = [
        Section(
            "Training",
            [
                Text(
                    f"{numbers['seeds']} fresh tasks of the run, {numbers['steps']} steps each; "
                    "all optimizers begin at the same params and see the same batches. The rates "
                    "of references are the best of "
                    f"{len(numbers['rates_tried'])} for just these runs (mean training loss)."
                ),
                picture("courses"),
                table("courses"),
            ],
        ),
        Section(
            "How large updates are",
            [picture(f"updates_{one.name}") for one in probe.optimizers],
        ),
        Section("Whom it resembles", [picture("alignment"), table("alignment")]),
        Section(
            "Noise",
            [
                Text(
                    f"How gradients of {numbers['batches']} batches at one checkpoint vary, and "
                    "the updates made of them. The tail index is that of published studies, over "
                    "all coordinates together: unequal coordinates lower it, as heavy tails do."
                ),
                picture("noise"),
                table("noise"),
            ],
        ),
        Section(
            "In the valley",
            [
                Text(
                    "f(x, y) = (x - y)^2 / 2. A coordinatewise rule that is odd in gradients and "
                    "ignores params keeps x + y; drift is 1 - |x + y| at the end / at the start. "
                    "References have the best rates for the valley."
                ),
                picture("valley"),
                table("valley"),
            ],
        ),
        Section(
            "What it answers to signals",
            [
                Text(
                    "The other coordinates of the tensor have random gradients, as large as in "
                    "training, so that rules that normalise over tensors have something to go by."
                ),
                picture("signals"),
            ],
        ),
    ]
    if "responses" in pictures:
        explained = Text(
            "Swing is the spread of a feature over recorded inputs times the root mean square "
            "derivative of the update in it."
        )
        parts: list[Text | Rows | Picture] = [explained, picture("responses"), table("features")]
        sections.append(Section("What the rule does with each feature", parts))
    if probe.left_out:
        lines = [Text(f"{part}: {reason}") for part, reason in probe.left_out.items()]
        sections.append(Section("Left out", lines))
    return sections
