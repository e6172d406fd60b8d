"""What the report of a distillation shows: front, equation, fit, features, trainings with it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lopt import symbolic
from lopt.experiment.evaluation.compare import Comparison, curves_of
from lopt.experiment.report import Cell, Equation, Report, finish, panels
from lopt.symbolic.metrics import equation_complexity, network_complexity
from lopt.symbolic.score import Ceiling
from lopt.symbolic.search import predict
from lopt.symbolic.select import output_variance

# How the field, such as Operon, counts a variable with its factor; here they are three nodes.
weighted = symbolic.Complexity(weighted=True)
# The R2 that mapping complexity asks for.
ENOUGH = 0.9
_POINTS, _BINS, _MOST = 2000, 24, 6
Row = Mapping[str, Cell]


def add_front(report: Report, found: symbolic.Distillation, top: Ceiling) -> None:
    """Adds the front, and its figure beside what a black box explains."""
    candidates, sides = found.front.candidates, found.splits.mapping()
    nodes, chosen = [one.complexity for one in candidates], candidates.index(found.chosen)
    scores = {
        name: [1 - one.losses[name] / output_variance(side) for one in candidates]
        for name, side in sides.items()
    }
    rows: list[Row] = [
        {
            "nodes": int(one.complexity),
            "weight x variable as one": int(weighted(one.expression)),
            **{name: own[i] for name, own in scores.items()},
            "equation": symbolic.to_text(one.expression, 3),
        }
        for i, one in enumerate(candidates)
    ]
    report.heading("The front")
    report.table("Front: R2 against length", rows, [chosen])
    trees = [symbolic.to_json(one.expression) for one in candidates]
    report.data |= {"chosen": chosen, "expressions": trees}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, own in scores.items():
            axes.plot(nodes, 1 - np.asarray(own), marker="o", ms=3, lw=1.2, label=name)
        axes.axhline(1 - top.scores["test"], color="#7f7f7f", ls="--", lw=1, label="black box")
        axes.axvline(nodes[chosen], color="#d62728", ls=":", lw=1.2, label="chosen")
        label = "nodes, a weight times a variable being three"
        finish(axes, log=True, xlabel=label, ylabel="1 - R2", title="Loss against length")

    caption = "Share of variance that is left, against length; the chosen equation is marked."
    report.figure("front", draw, (5.6, 3.8), caption)


def add_equation(
    report: Report,
    found: symbolic.Distillation,
    shown: symbolic.Expression,
    top: Ceiling,
    output: str,
) -> None:
    """Adds the chosen equation, rounded as `shown`, how well it fits, and its responses."""
    test, expression = found.splits.test, found.chosen.expression
    report.heading("The equation")
    report.add(Equation(f"{output} = {symbolic.to_text(shown)}", symbolic.to_latex(shown)))
    where = "runs" if "test" in found.splits.unseen_runs else "coordinates"
    report.text(
        f"{expression.complexity} nodes, {weighted(expression):g} where a weight times a variable "
        f"counts as one. The test side is of {where} that nothing else has seen."
    )
    rows: list[Row] = [{"": "equation", **found.r_squared}, {"": "black box", **top.scores}]
    report.table("R2", rows)
    variables = shown.variables[:_MOST] or test.columns[:1]

    def draw_fit(figure: Any) -> None:
        few = test.take(np.linspace(0, len(test) - 1, min(_POINTS, len(test))).round().astype(int))
        axes, ends = figure.add_subplot(), [float(few.output.min()), float(few.output.max())]
        axes.scatter(few.output, predict(expression, few), s=4, alpha=0.3, lw=0)
        axes.plot(ends, ends, color="#7f7f7f", lw=1)
        finish(axes, xlabel="network", ylabel="equation", title="Outputs on the test side")

    def draw_responses(figure: Any) -> None:
        edges = np.linspace(0.01, 0.99, _BINS + 1)
        for axes, variable in zip(panels(figure, len(variables)), variables, strict=True):
            curve = symbolic.partial_dependence(expression, test, variable)
            values = test.column(variable)
            axes.plot(curve.grid, curve.output[0], color="#d62728", lw=1.8, label="equation")
            place = np.digitize(values, np.unique(np.quantile(values, edges)))
            bins = [place == b for b in range(1, place.max())]
            means = [(values[own].mean(), test.output[own].mean()) for own in bins if own.any()]
            if means:
                axes.plot(*np.transpose(means), "o", ms=3, color="#1f77b4", label="network, binned")
            finish(axes, xlabel=str(variable), legend=variable is variables[0])

    columns = min(3, len(variables))
    size = (3.4 * columns, 2.8 * -(-len(variables) // columns))
    report.heading("The fit")
    report.figure("fit", draw_fit, (4.2, 4.0), "Equation against network on the test side.")
    caption = "Mean response to each feature over the recorded others, of the equation; the network"
    report.figure("responses", draw_responses, size, f"{caption}'s mean recorded outputs.")


def add_features(
    report: Report, found: symbolic.Distillation, few: Mapping[str, symbolic.Table], seed: int
) -> None:
    """Adds mapping complexity, what is lost without each feature, and how far back each counts.

    `few` are rows of each side, for fits that are only compared.
    """
    sides, expression = found.splits.mapping(), found.chosen.expression
    nodes = equation_complexity(found.front, sides["validation"], ENOUGH, "validation")
    size = network_complexity(few, ENOUGH, seed=seed)
    report.text(
        f"Mapping complexity: an R2 of {ENOUGH} takes "
        + (f"an equation of {nodes:g} nodes" if nodes < np.inf else "longer equations than found")
        + (f", or a network of {size:g} weights." if size < np.inf else ", or larger networks.")
    )
    lost = symbolic.ablate(expression, few["train"], sides["test"])
    seen = symbolic.perception_of_expression(expression, sides["test"])
    rows: list[Row] = [
        {
            "feature": loss.feature,
            "R2 lost at its mean": loss.replaced,
            "R2 lost after a new fit": loss.refitted,
            "temporal perception field, steps": one.field,
            "lags that take part": one.participation,
        }
        for loss, one in zip(lost, seen, strict=True)
    ]
    report.table("What each feature is for", rows, detail=True)


def add_roll_outs(report: Report, comparisons: Sequence[Comparison]) -> None:
    """Adds trainings with network, equation and tuned baselines, side by side."""
    if comparisons:
        report.heading("In the network's place")
        report.add(curves_of("roll_outs", comparisons))
    for comparison in comparisons:
        network = float(comparison.final(comparison.of("learned")).mean())
        about, rows = comparison.evaluation, comparison.rows()
        for row, entry in zip(rows, comparison.entries, strict=True):
            final = float(comparison.final(entry).mean())
            row["x network"] = final / network if network else None
            del row["steps to tuned Adam"], row["by seeds"], row["Adam steps to its loss"]
        report.table(f"{about.name} ({about.horizon} steps, {about.num_seeds} seeds)", rows)
