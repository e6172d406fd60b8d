"""The figures of a distillation: front, fit, response curves, roll-outs."""

import numpy as np

from lopt.experiment.distill_run import Report
from lopt.experiment.figures import figure_of, png
from lopt.experiment.report import draw_curves
from lopt.symbolic.response import partial_dependence
from lopt.symbolic.search import predict
from lopt.symbolic.select import output_variance

_POINTS, _BINS, _MOST = 2000, 24, 6


def draw_front(report: Report) -> bytes:
    """Draws the share of variance that is left against length, on each side of the split."""
    figure = figure_of(5.6, 3.8)
    axes = figure.add_subplot()
    candidates = report.found.front.candidates
    nodes = [one.complexity for one in candidates]
    for name, side in report.found.splits.mapping().items():
        left = [one.losses[name] / output_variance(side) for one in candidates]
        axes.plot(nodes, left, marker="o", ms=3, lw=1.2, label=name)
    top = 1 - report.ceiling.scores["test"]
    axes.axhline(top, color="#7f7f7f", ls="--", lw=1, label="black box, test")
    axes.axvline(report.found.chosen.complexity, color="#d62728", ls=":", lw=1.2, label="chosen")
    axes.set(xlabel="nodes", ylabel="1 - R2", yscale="log", title="Loss against length")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def draw_fit(report: Report) -> bytes:
    """Draws what the equation says against what the network put out, on the test side."""
    test = report.found.splits.test
    few = test.take(np.linspace(0, len(test) - 1, min(_POINTS, len(test))).round().astype(int))
    figure = figure_of(4.2, 4.0)
    axes = figure.add_subplot()
    said = predict(report.found.chosen.expression, few)
    axes.scatter(few.output, said, s=4, alpha=0.3, lw=0)
    ends = [float(few.output.min()), float(few.output.max())]
    axes.plot(ends, ends, color="#7f7f7f", lw=1)
    axes.set(xlabel="network", ylabel="equation", title="Outputs on the test side")
    return png(figure)


def draw_responses(report: Report) -> bytes:
    """Draws the equation's mean output along its variables, and the recorded means in bins."""
    expression, test = report.found.chosen.expression, report.found.splits.test
    variables = expression.variables[:_MOST] or test.columns[:1]
    columns = min(3, len(variables))
    rows = -(-len(variables) // columns)
    figure = figure_of(3.4 * columns, 2.8 * rows)
    for i, variable in enumerate(variables):
        axes = figure.add_subplot(rows, columns, i + 1)
        curve = partial_dependence(expression, test, variable)
        axes.plot(curve.grid, curve.output[0], color="#d62728", lw=1.8, label="equation")
        values = test.mapping()[variable]
        edges = np.unique(np.quantile(values, np.linspace(0.01, 0.99, _BINS + 1)))
        if len(edges) > 2:
            place = np.digitize(values, edges)
            inside = [np.flatnonzero(place == b) for b in range(1, len(edges))]
            means = [
                (values[rows_].mean(), test.output[rows_].mean()) for rows_ in inside if len(rows_)
            ]
            axes.plot(
                *zip(*means, strict=True), "o", ms=3, color="#1f77b4", label="network, binned"
            )
        axes.set(xlabel=str(variable))
        axes.grid(alpha=0.25, lw=0.5)
        if i == 0:
            axes.legend(fontsize=8, frameon=False)
    return png(figure)


def draw_roll_outs(report: Report) -> bytes:
    """Draws training losses of network, equation and tuned baselines."""
    return draw_curves(list(report.comparisons))
