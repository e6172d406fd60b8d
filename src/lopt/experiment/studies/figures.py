"""The figures of `lopt horizon surface`, `smd`, `best` and `online`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lopt.experiment.report import finish, panels
from lopt.experiment.studies.offline import Choice, Surface

PATHS = ("#d62728", "#ff7f0e", "#e377c2", "#8c564b")


def surface_figure(figure: Any, surface: Surface, paths: Sequence[dict[str, Any]]) -> None:
    """Draws the loss after each horizon, its best point, its field, and descents on it."""
    horizons = surface.settings.horizons
    rates, powers = np.exp(surface.places).T
    for i, horizon in enumerate(horizons):
        axes = figure.add_subplot(1, len(horizons), i + 1)
        losses = surface.losses[i]
        finite = np.isfinite(losses)
        # What is far above the start is all the same: training got nowhere.
        top = np.quantile(losses[finite], 0.9)
        heights = np.log10(np.minimum(losses[finite], top))
        levels = np.linspace(heights.min(), heights.max() + 1e-9, 13)
        x, y = np.log10(rates[finite]), np.log10(powers[finite])
        drawn = axes.tricontourf(x, y, heights, levels=levels, cmap="viridis")
        axes.plot(x, y, ".", color="white", ms=0.8, alpha=0.5)
        if horizon in surface.settings.field_horizons:
            _field(axes, surface, i)
        axes.plot(*np.log10(surface.best(horizon)), "*", color="white", mec="black", ms=15)
        for k, descent in enumerate(p for p in paths if p["horizon"] == horizon):
            line = np.log10(descent["rates"]), np.log10(descent["powers"])
            color = PATHS[k % len(PATHS)]
            axes.plot(*line, color=color, lw=1.6)
            axes.plot(line[0][:1], line[1][:1], "o", color=color, mec="black", ms=6)
            axes.plot(line[0][-1:], line[1][-1:], "s", color=color, mec="black", ms=6)
        axes.set(
            title=f"after {horizon:,} steps",
            xlabel="log10 learning rate",
            ylabel="log10 power of decay" if i == 0 else "",
        )
        figure.colorbar(drawn, ax=axes, label="log10 loss" if i == len(horizons) - 1 else "")
    figure.suptitle(
        f"{surface.settings.dataset}: star, the best; arrows, the direction of steepest descent; "
        "circle to square, meta-descent",
        fontsize=10,
    )


def _field(axes: Any, surface: Surface, i: int) -> None:
    down = -surface.field[i]
    norms = np.linalg.norm(down, axis=1)
    fine = np.isfinite(norms) & (norms > 0)
    down = down[fine] / norms[fine, None]
    places = surface.field_places[fine] / np.log(10)
    axes.quiver(*places.T, *down.T, color="white", alpha=0.75, scale=28, width=0.004)


def best_figure(
    figure: Any, choices: Sequence[Choice], runs: dict[str, Any], time_constant: float
) -> None:
    """Draws loss, accuracy and learning rate of the runs to the end."""
    loss, accuracy, rate = panels(figure, 3)
    steps = runs["steps"]
    longest = max(choice.horizon for choice in choices)
    for i, choice in enumerate(choices):
        color = _shade(choice.horizon, longest)
        style = {"color": color, "ls": "-" if choice.name.startswith("surface") else "--"}
        for axes, name in ((loss, "train_loss"), (accuracy, "test_accuracy")):
            values = runs[name][i]
            axes.plot(steps, values.mean(0), label=choice.name, **style)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        rate.plot(steps, choice.rates(steps, time_constant), **style)
    finish(loss, log="xy", title="training loss", xlabel="step")
    finish(accuracy, log="x", legend=False, title="test accuracy", xlabel="step")
    finish(rate, log="x", title="learning rate", xlabel="step")
    rate.set(yscale="log", ylim=(1e-5, 1))


def online_figure(
    figure: Any,
    runs: dict[float, list[dict[str, Any]]],
    choices: Sequence[Choice],
    trained: dict[str, Any],
    time_constant: float,
) -> None:
    """Draws loss and learning rate of online runs, with bands over seeds, against schedules."""
    left, right = panels(figure, 2)
    for color, (rate, several) in zip(PATHS * len(runs), runs.items(), strict=False):
        steps = several[0]["steps"]
        for axes, name in ((left, "train_loss"), (right, "learning_rate")):
            values = np.stack([run[name] for run in several])
            axes.plot(steps, values.mean(0), color=color, label=f"online, from {rate:g}")
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    for style, (i, choice) in zip(("k-", "b-"), enumerate(choices), strict=True):
        steps, values = trained["steps"], trained["train_loss"][i]
        left.plot(steps, values.mean(0), style, lw=1.8, label=choice.name)
        left.fill_between(steps, values.min(0), values.max(0), color=style[0], alpha=0.15, lw=0)
        right.plot(steps, choice.rates(steps, time_constant), style, lw=1.8)
    finish(left, log=True, xlabel="step", ylabel="training loss")
    finish(right, log=True, legend=False, xlabel="step", ylabel="learning rate")


def _shade(horizon: int, longest: int) -> Any:
    import matplotlib

    position = np.log(horizon) / np.log(max(2, longest))
    return matplotlib.colormaps["plasma"](0.85 * float(position))
