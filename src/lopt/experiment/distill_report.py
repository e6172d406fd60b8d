"""The report of a distillation: front, fit, response curves and roll-outs, beside the equation."""

from pathlib import Path
from typing import Any

import numpy as np

from lopt.experiment.distill import ENOUGH, DistilledRun, loss_ratios
from lopt.experiment.evaluation.compare import Comparison, curves_of
from lopt.experiment.report import (
    Cell,
    Equation,
    Report,
    Table,
    finish,
    measured,
    number,
    panels,
    progress,
)
from lopt.experiment.runs.files import write_bytes, write_json
from lopt.symbolic.export import to_latex, to_numpy_source, to_text, to_torch_source
from lopt.symbolic.expression import Expression
from lopt.symbolic.response import partial_dependence
from lopt.symbolic.sanity import SUITE, run_sanity
from lopt.symbolic.search import predict
from lopt.symbolic.select import output_variance
from lopt.symbolic.serial import to_json
from lopt.symbolic.simplify import rounded

SPLITS = ("train", "validation", "test")
_POINTS, _BINS, _MOST = 2000, 24, 6


def sanity_table(seed: int) -> Table:
    """Distils known optimizers from raw gradients; returns what was found."""
    with progress("distilling", len(SUITE)) as at:
        rows = run_sanity(seed=seed, progress=lambda done, of, what: at(done, what))
    return Table(
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
    )


def write_equation(run: DistilledRun, out: Path, digits: int) -> None:
    """Writes equation.tex, with so many digits, and equation.json."""
    write_bytes(out / "equation.tex", (to_latex(_rounded(run, digits)) + "\n").encode())
    write_json(out / "equation.json", to_json(run.found.chosen.expression))


def _rounded(run: DistilledRun, digits: int) -> Expression:
    test = run.found.splits.test
    return rounded(run.found.chosen.expression, test.mapping(), test.output, digits)


def distillation_report(run: DistilledRun, out: Path, digits: int = 3) -> Report:
    """Returns the report of what was found.

    Args:
        run: what was found.
        out: the folder that its weights are in.
        digits: significant ones of printed constants, more where they are needed.
    """
    chosen, test = run.found.chosen, run.found.splits.test
    shown = _rounded(run, digits)
    numbers = _numbers(run, shown)
    report = Report(f"Distilled from {numbers['run']}", data=numbers)
    report.heading("The front")
    front: list[dict[str, Cell]] = [
        {"nodes": one["nodes"], **one["r2"], "equation": one["equation"]}
        for one in numbers["front"]
    ]
    places = [i for i, one in enumerate(numbers["front"]) if one["chosen"]]
    report.table("Front: R2 against length", front, places)
    report.figure(
        "front",
        lambda figure: _draw_front(figure.add_subplot(), run),
        (5.6, 3.8),
        "Share of variance that is left, against length; the chosen equation is marked.",
    )
    report.heading("The equation")
    output = numbers["output"]
    report.add(Equation(f"{output} = {numbers['equation']}", numbers["latex"]))
    report.text(_in_words(numbers))
    report.heading("The fit")
    report.figure(
        "fit",
        lambda figure: _draw_fit(figure.add_subplot(), run),
        (4.2, 4.0),
        "Equation against network on the test side.",
    )
    variables = shown.variables[:_MOST] or test.columns[:1]
    columns = min(3, len(variables))
    report.figure(
        "responses",
        lambda figure: _draw_responses(figure, run, variables),
        (3.4 * columns, 2.8 * -(-len(variables) // columns)),
        "Mean response to each feature over the recorded others: the equation, and the mean of "
        "the network's recorded outputs.",
    )
    fields = numbers["temporal_perception_field"]
    lost: list[dict[str, Cell]] = [
        {
            "feature": name,
            "R2 lost at its mean": loss["replaced"],
            "R2 lost after a new fit": loss["refitted"],
            "field, steps": fields.get(name),
        }
        for name, loss in numbers["r2_lost_without"].items()
    ]
    report.table("What each feature is for", lost, detail=True)
    if run.comparisons:
        report.heading("In the network's place")
        report.add(curves_of("roll_outs", run.comparisons))
    for comparison in run.comparisons:
        about = comparison.evaluation
        title = f"{about.name} ({about.horizon} steps, {about.num_seeds} seeds)"
        report.table(title, _roll_out(comparison))
    report.heading("Use")
    report.text(f'optimizer = lopt.load_optimizer("{out}")', code=True, detail=True)
    report.text(to_numpy_source(chosen.expression), code=True, detail=True)
    report.text(to_torch_source(chosen.expression), code=True, detail=True)
    return report


def _numbers(run: DistilledRun, shown: Expression) -> dict[str, Any]:
    found, chosen = run.found, run.found.chosen
    variances = {n: output_variance(t) for n, t in found.splits.mapping().items()}
    return {
        **{key: run.table.about.get(key) for key in ("run", "runs", "output", "steps")},
        "rows": len(run.table),
        "unseen_runs": list(found.splits.unseen_runs),
        "equation": to_text(shown),
        "latex": to_latex(shown),
        "nodes": chosen.expression.complexity,
        "r2": dict(found.r_squared),
        "r2_of_ceiling": dict(run.ceiling.scores),
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
            for loss in run.ablation
        },
        "temporal_perception_field": {one.feature: one.field for one in run.perception},
        "lags_that_take_part": {one.feature: one.participation for one in run.perception},
        "mapping_complexity": {
            "r2": ENOUGH,
            "nodes_of_an_equation": run.complexity[0],
            "weights_of_a_network": run.complexity[1],
        },
        "roll_out": [
            {**comparison.summary(), "loss_over_network": dict(loss_ratios(comparison))}
            for comparison in run.comparisons
        ],
    }


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


def _roll_out(comparison: Comparison) -> list[dict[str, Cell]]:
    ratios = loss_ratios(comparison)
    return [
        {
            "optimizer": {"learned": "network"}.get(runs.name, runs.name)
            + ("" if runs.learning_rate is None else f" ({number(runs.learning_rate, 2)})"),
            "final loss": measured(runs.final_loss),
            "x network": ratios.get(runs.name, 1.0),
        }
        for runs in comparison.runs
    ]


def _draw_front(axes: Any, run: DistilledRun) -> None:
    candidates = run.found.front.candidates
    nodes = [one.complexity for one in candidates]
    for name, side in run.found.splits.mapping().items():
        left = [one.losses[name] / output_variance(side) for one in candidates]
        axes.plot(nodes, left, marker="o", ms=3, lw=1.2, label=name)
    top = 1 - run.ceiling.scores["test"]
    axes.axhline(top, color="#7f7f7f", ls="--", lw=1, label="black box, test")
    axes.axvline(run.found.chosen.complexity, color="#d62728", ls=":", lw=1.2, label="chosen")
    finish(axes, log=True, xlabel="nodes", ylabel="1 - R2", title="Loss against length")


def _draw_fit(axes: Any, run: DistilledRun) -> None:
    test = run.found.splits.test
    few = test.take(np.linspace(0, len(test) - 1, min(_POINTS, len(test))).round().astype(int))
    predicted = predict(run.found.chosen.expression, few)
    axes.scatter(few.output, predicted, s=4, alpha=0.3, lw=0)
    ends = [float(few.output.min()), float(few.output.max())]
    axes.plot(ends, ends, color="#7f7f7f", lw=1)
    finish(axes, xlabel="network", ylabel="equation", title="Outputs on the test side")


def _draw_responses(figure: Any, run: DistilledRun, variables: Any) -> None:
    """Draws the equation's mean output along variables, and the recorded means in bins."""
    expression, test = run.found.chosen.expression, run.found.splits.test
    for axes, variable in zip(panels(figure, len(variables)), variables, strict=True):
        curve = partial_dependence(expression, test, variable)
        axes.plot(curve.grid, curve.output[0], color="#d62728", lw=1.8, label="equation")
        values = test.mapping()[variable]
        edges = np.unique(np.quantile(values, np.linspace(0.01, 0.99, _BINS + 1)))
        place = np.digitize(values, edges)
        inside = [np.flatnonzero(place == b) for b in range(1, len(edges))]
        means = [(values[own].mean(), test.output[own].mean()) for own in inside if len(own)]
        if len(means) > 1:
            style = {"ms": 3, "color": "#1f77b4", "label": "network, binned"}
            axes.plot(*zip(*means, strict=True), "o", **style)
        finish(axes, xlabel=str(variable), legend=variable is variables[0])
