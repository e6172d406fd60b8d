"""The report of a distillation: terminal, equation in LaTeX and JSON, numbers, figures, a page."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as TextTable

from lopt.experiment.distill_figures import draw_fit, draw_front, draw_responses, draw_roll_outs
from lopt.experiment.distill_run import ENOUGH, Report, loss_ratios
from lopt.experiment.files import write_bytes, write_json
from lopt.experiment.page import Picture, Rows, Section, Text, write_page
from lopt.symbolic.export import to_latex, to_numpy_source, to_text, to_torch_source
from lopt.symbolic.expression import Expression
from lopt.symbolic.select import output_variance
from lopt.symbolic.serial import to_json
from lopt.symbolic.simplify import rounded

FILES = ("equation.tex", "equation.json", "report.json", "front.png", "index.html")
SPLITS = ("train", "validation", "test")


def write_distillation(report: Report, out: Path, console: Console, digits: int = 3) -> None:
    """Prints what was found and writes all files of the report."""
    expression = report.found.chosen.expression
    test = report.found.splits.test
    shown = rounded(expression, test.mapping(), test.output, digits)
    numbers = summary(report, shown)
    console.print(_front_table(numbers))
    console.print(f"{numbers['output']} = {to_text(shown)}", highlight=False, markup=False)
    console.print(_in_words(numbers), highlight=False)
    for comparison in numbers["roll_out"]:
        console.print(_roll_out_table(comparison))
    write_bytes(out / "equation.tex", (to_latex(shown) + "\n").encode())
    write_json(out / "equation.json", to_json(expression))
    write_json(out / "report.json", numbers)
    front = draw_front(report)
    write_bytes(out / "front.png", front)
    write_page(
        out / "index.html", f"Distilled from {numbers['run']}", _page(report, numbers, front, out)
    )


def summary(report: Report, shown: Expression) -> dict[str, Any]:
    """Returns the numbers of the report, as JSON."""
    found, chosen = report.found, report.found.chosen
    variances = {n: output_variance(t) for n, t in found.splits.mapping().items()}
    return {
        **{key: report.table.about.get(key) for key in ("run", "runs", "output", "steps")},
        "rows": len(report.table),
        "unseen_runs": list(found.splits.unseen_runs),
        "equation": to_text(shown),
        "latex": to_latex(shown),
        "nodes": chosen.expression.complexity,
        "r2": dict(found.r_squared),
        "r2_of_ceiling": dict(report.ceiling.scores),
        "front": [
            {
                "nodes": one.complexity,
                "equation": to_text(one.expression, 3),
                "expression": to_json(one.expression),
                "r2": {name: 1 - one.losses[name] / variances[name] for name in SPLITS},
                "chosen": one is chosen,
            }
            for one in found.front.candidates
        ],
        "r2_lost_without": {
            loss.feature: {"replaced": loss.replaced, "refitted": loss.refitted}
            for loss in report.ablation
        },
        "temporal_perception_field": {one.feature: one.field for one in report.perception},
        "lags_that_take_part": {one.feature: one.participation for one in report.perception},
        "mapping_complexity": {
            "r2": ENOUGH,
            "nodes_of_an_equation": report.complexity[0],
            "weights_of_a_network": report.complexity[1],
        },
        "roll_out": [
            {**comparison.summary(), "loss_over_network": dict(loss_ratios(comparison))}
            for comparison in report.comparisons
        ],
    }


def _front_table(numbers: dict[str, Any]) -> TextTable:
    table = TextTable(title="Front: R2 against length", title_justify="left")
    for heading in ("nodes", "train", "validation", "test", "equation"):
        table.add_column(heading, justify="left" if heading == "equation" else "right")
    for one in numbers["front"]:
        cells = [f"{one['nodes']:g}", *(f"{one['r2'][name]:.4f}" for name in SPLITS)]
        style = "bold" if one["chosen"] else None
        table.add_row(*cells, one["equation"][:80], style=style)
    return table


def _in_words(numbers: dict[str, Any]) -> str:
    scores, top = numbers["r2"], numbers["r2_of_ceiling"]
    where = "unseen runs" if "test" in numbers["unseen_runs"] else "unseen coordinates"
    fields = ", ".join(
        f"{name} {field:.1f}" for name, field in numbers["temporal_perception_field"].items()
    )
    return (
        f"{numbers['nodes']} nodes; R2 {scores['train']:.4f} on train, "
        f"{scores['validation']:.4f} on validation, {scores['test']:.4f} on {where} "
        f"(black box: {top['test']:.4f}). Temporal perception field in steps: {fields}."
    )


def _roll_out_table(comparison: dict[str, Any]) -> TextTable:
    title = f"{comparison['name']} ({comparison['horizon']} steps, {comparison['seeds']} seeds)"
    table = TextTable(title=title, title_justify="left")
    for heading in ("optimizer", "final loss", "x network"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for cells in _roll_out_rows(comparison):
        table.add_row(*cells)
    return table


def _roll_out_rows(comparison: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in comparison["rows"]:
        loss, ratio = row["final_loss"], comparison["loss_over_network"].get(row["optimizer"], 1.0)
        name = {"learned": "network"}.get(row["optimizer"], row["optimizer"])
        rate = "" if row["learning_rate"] is None else f" ({row['learning_rate']:.2g})"
        mean, error = loss["mean"], loss["standard_error"]
        rows.append([name + rate, f"{mean:.4f} ± {error:.4f}", f"{ratio:.2f}"])
    return rows


def _page(report: Report, numbers: dict[str, Any], front: bytes, out: Path) -> list[Section]:
    expression = report.found.chosen.expression
    lost = numbers["r2_lost_without"]
    sections = [
        Section(
            "The equation",
            [
                Text(f"{numbers['output']} = {numbers['equation']}", code=True),
                Text(_in_words(numbers)),
                Text(numbers["latex"], code=True),
            ],
        ),
        Section(
            "The front",
            [
                Picture(front, "Mean squared error against length; the chosen equation is marked."),
                Rows(
                    ("nodes", *SPLITS, "equation"),
                    [
                        (
                            f"{one['nodes']:g}",
                            *(f"{one['r2'][name]:.4f}" for name in SPLITS),
                            one["equation"],
                        )
                        for one in numbers["front"]
                    ],
                ),
            ],
        ),
        Section(
            "The fit",
            [
                Picture(draw_fit(report), "Equation against network on the test side."),
                Picture(
                    draw_responses(report),
                    "Mean response to each feature over the recorded others: the equation, and the "
                    "mean of the network's recorded outputs.",
                ),
                Rows(
                    ("feature", "R2 lost at its mean", "R2 lost after a new fit", "field, steps"),
                    [
                        (
                            name,
                            f"{loss['replaced']:.4f}",
                            "-" if loss["refitted"] is None else f"{loss['refitted']:.4f}",
                            f"{numbers['temporal_perception_field'].get(name, np.nan):.2f}",
                        )
                        for name, loss in lost.items()
                    ],
                ),
            ],
        ),
    ]
    if report.comparisons:
        sections.append(
            Section(
                "In the network's place",
                [
                    Picture(draw_roll_outs(report), "Training losses, mean and standard error."),
                    *(
                        Rows((comparison["name"], "final loss", "x network"), rows)
                        for comparison in numbers["roll_out"]
                        for rows in [_roll_out_rows(comparison)]
                    ),
                ],
            )
        )
    sections.append(
        Section(
            "Use",
            [
                Text(f'optimizer = lopt.load_optimizer("{out}")', code=True),
                Text(to_numpy_source(expression), code=True),
                Text(to_torch_source(expression), code=True),
            ],
        )
    )
    return sections
