"""The figures of `lopt horizon surface`, `smd`, `best` and `online`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopt.experiment.figures import figure_of, png
from lopt.experiment.files import write_bytes
from lopt.experiment.horizon_offline import Choice, Surface

PATHS = ("#d62728", "#ff7f0e", "#e377c2", "#8c564b")


def surface_figure(surface: Surface, paths: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the loss after each horizon, its best point, its field, and descents on it."""
    horizons = surface.settings.horizons
    figure = figure_of(4.6 * len(horizons), 3.9)
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
    write_bytes(path, png(figure))


def _field(axes: Any, surface: Surface, i: int) -> None:
    down = -surface.field[i]
    norms = np.linalg.norm(down, axis=1)
    fine = np.isfinite(norms) & (norms > 0)
    down = down[fine] / norms[fine, None]
    places = surface.field_places[fine] / np.log(10)
    axes.quiver(*places.T, *down.T, color="white", alpha=0.75, scale=28, width=0.004)


def best_figure(
    choices: Sequence[Choice], runs: dict[str, Any], time_constant: float, path: Path
) -> None:
    """Draws loss, accuracy and learning rate of the runs to the end."""
    figure = figure_of(13.8, 3.9)
    panels = [figure.add_subplot(1, 3, i + 1) for i in range(3)]
    steps = runs["steps"]
    longest = max(choice.horizon for choice in choices)
    for i, choice in enumerate(choices):
        color = _shade(choice.horizon, longest)
        style = {"color": color, "ls": "-" if choice.name.startswith("surface") else "--"}
        for axes, name in zip(panels, ("train_loss", "test_accuracy"), strict=False):
            values = runs[name][i]
            axes.plot(steps, values.mean(0), label=choice.name, **style)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        panels[2].plot(steps, choice.rates(steps, time_constant), **style)
    panels[0].set(yscale="log", title="training loss")
    panels[1].set(title="test accuracy")
    panels[2].set(yscale="log", title="learning rate", ylim=(1e-5, 1))
    for axes in panels:
        axes.set(xscale="log", xlabel="step")
        axes.grid(alpha=0.25, which="both", lw=0.5)
    panels[0].legend(fontsize=8, frameon=False)
    write_bytes(path, png(figure))


def online_figure(
    runs: dict[float, list[dict[str, Any]]],
    choices: Sequence[Choice],
    trained: dict[str, Any],
    time_constant: float,
    path: Path,
) -> None:
    """Draws loss and learning rate of online runs, with bands over seeds, against schedules."""
    figure = figure_of(9.2, 3.9)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
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
    left.set(yscale="log", xlabel="step", ylabel="training loss")
    right.set(yscale="log", xlabel="step", ylabel="learning rate")
    left.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both", lw=0.5)
    write_bytes(path, png(figure))


def _shade(horizon: int, longest: int) -> Any:
    import matplotlib

    position = np.log(horizon) / np.log(max(2, longest))
    return matplotlib.colormaps["plasma"](0.85 * float(position))
