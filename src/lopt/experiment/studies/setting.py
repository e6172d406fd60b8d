"""The training on which short horizons are studied, and its loss over learning rate and decay.

As in Wu et al. 2018, arXiv:1803.02021, section 4: momentum with the rate lr (1 + t / K)^-power,
begun from weights that have been trained for a few steps. A folder holds the losses of a surface,
`surface.jsonl`, line by line as they are computed, and what they are of, `surface_settings.json`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import lopt
from lopt.analysis.surface import losses_after
from lopt.core.types import Key, Params, State, Theta
from lopt.experiment.data.named_tasks import named_task
from lopt.experiment.report import panels, progress
from lopt.experiment.runs.files import read_json, read_lines, to_line, write_bytes, write_json
from lopt.experiment.studies.settings import MOMENTUM, NETWORKS, SurfaceSettings
from lopt.experiment.trainings import OverDevices, trainings
from lopt.learned import inverse_time_momentum
from lopt.tasks import warm_start

WARM_STEPS = 50
# The ranges of learning rate and power that surfaces cover.
LEARNING_RATES, POWERS = (1e-3, 0.5), (0.01, 200.0)
# What lines of the log hold.
FIELDS = ("losses", "field")
# Wu et al. average the lowest 50 of 2,500 points.
LOWEST = 0.02


def warm_task(dataset: str, seed: int = 0) -> lopt.AbstractTask:
    """Returns the task of a data set, one of `NETWORKS`, begun from the warm start of a seed."""
    network, size, batch_size, rate = NETWORKS[dataset]
    keys = jax.random.key(seed)[None]
    task = named_task(f"{dataset}_{network}", size, batch_size).draw(keys[0])
    state, _ = trainings(task, optax.sgd(rate, momentum=MOMENTUM), keys, WARM_STEPS)
    return warm_start(task, jax.tree.map(lambda leaf: leaf[0], state.params))


def decayed_training(
    task: lopt.AbstractTask,
    horizon: int,
    time_constant: float,
    learning_rate: float = 0.01,
    power: float = 1.0,
    batches: int = 10,
) -> lopt.InnerTraining:
    """Returns training judged by its final loss, the mean over some batches.

    Theta is the learning rate, of plain momentum, and the power; K is the time constant.
    """
    constants, learn = (learning_rate, MOMENTUM, power, time_constant), ("learning_rate", "power")
    learned = inverse_time_momentum(*constants, learn=learn, effective=False)
    return lopt.InnerTraining(task, learned, horizon, lopt.FinalLoss(batches))


def theta_at(log_rate: Array, log_power: Array) -> Theta:
    """Returns the theta of `decayed_training`."""
    return {"learning_rate": {"initial": log_rate, "power": log_power}}


def outer_adam(learning_rate: float, clip: float = 10.0) -> optax.GradientTransformation:
    """Returns Adam on clipped derivatives by logarithms, which keeps them in the paper's ranges.

    Rates stay between 1e-4 and 10, powers 1e-4 and 1e3, one minus momentum 1e-4 and 1.
    """

    def update(updates: Theta, state: State, params: Theta | None = None) -> tuple[Theta, State]:
        def cut(path: Any, change: Array, leaf: Array) -> Array:
            highest = {"power": 1e3, "momentum": 1.0}.get(path[-1].key, 10.0)
            return jnp.clip(leaf + change, math.log(1e-4), math.log(highest)) - leaf

        return jax.tree_util.tree_map_with_path(cut, updates, params), state

    ranges = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.clip(clip), optax.adam(learning_rate), ranges)


def measure(
    task: lopt.AbstractTask, params: Params, state: State = (), key: Key | None = None
) -> dict[str, Float[Array, ""]]:
    """Returns metrics on all training and all test images, such as "train_loss"."""
    return {
        f"{split}_{name}": value
        for split in ("train", "test")
        for name, value in task.metrics(params, state, task.everything(split)).items()
    }


@dataclasses.dataclass(frozen=True)
class Surface:
    """The losses after each horizon over learning rate and power, and their derivatives.

    Places are natural logarithms of learning rate and power; the field has the derivatives by both,
    after all horizons but the longest, which would take several times as long as the losses.
    """

    settings: SurfaceSettings
    places: Float[np.ndarray, "point 2"]
    losses: Float[np.ndarray, "horizon point"]  # NaN where training diverged.
    field_places: Float[np.ndarray, "place 2"]
    field: Float[np.ndarray, "shorter place 2"]

    def best(self, horizon: int) -> tuple[float, float]:
        """Returns the learning rate and power of the lowest 2 % of the points, geometric means."""
        losses = self.losses[self.settings.horizons.index(horizon)]
        order = np.argsort(np.where(np.isfinite(losses), losses, np.inf))
        count = max(1, round(LOWEST * losses.size))
        rate, power = np.exp(self.places[order[:count]].mean(axis=0))
        return float(rate), float(power)


def surface_settings(folder: Path) -> SurfaceSettings | None:
    """Returns what the surface of a folder is of, or None if it has none."""
    path = folder / "surface_settings.json"
    if not path.exists():
        return None
    content = read_json(path, sealed=True)
    return SurfaceSettings(**content | {"horizons": tuple(content["horizons"])})


def read_surface(folder: Path) -> Surface | None:
    """Returns the surface of a folder, or None if it has no finished one."""
    settings, path = surface_settings(folder), folder / "surface.jsonl"
    lines = read_lines(path)
    if settings is None or len(lines) < len(_jobs(settings)):
        return None
    points, places = _places(settings)
    try:
        rows = {name: [row for line in lines for row in line.get(name, ())] for name in FIELDS}
        losses = np.array(rows["losses"], float).reshape(len(points), len(settings.horizons))
        field = np.array(rows["field"], float).reshape(len(places), -1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole surface ({error}); delete it.") from error
    return Surface(settings, points, losses.T, places, np.moveaxis(field, 1, 0))


def compute_surface(settings: SurfaceSettings, folder: Path) -> Surface:
    """Returns the surface of a folder, computed as far as it is not there."""
    if surface_settings(folder) not in (None, settings):
        raise FileExistsError(f"{folder} holds a surface of other settings; give another --out.")
    if (whole := read_surface(folder)) is not None:
        return whole
    task = warm_task(settings.dataset, settings.seed)
    inner = decayed_training(task, settings.horizons[-1], settings.decay_time)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)

    def losses(inner: Any, place: Array, horizons: tuple[int, ...] = settings.horizons) -> Array:
        return losses_after(inner, theta_at(*place), key, horizons, settings.batches)

    def field(inner: Any, place: Array) -> Array:
        shorter = settings.horizons[:-1] or settings.horizons
        return jax.jacfwd(lambda place: losses(inner, place, shorter))(place)

    jobs, log = _jobs(settings), folder / "surface.jsonl"
    at_once = max(len(places) for _, places in jobs)
    programs = {f.__name__: OverDevices(f, inner, at_once) for f in (losses, field)}
    lines = read_lines(log)
    write_json(folder / "surface_settings.json", dataclasses.asdict(settings), sealed=True)
    write_bytes(log, "".join(map(to_line, lines)).encode())
    with log.open("a") as file, progress("training", len(jobs), done=len(lines)) as at:
        for i, (name, places) in list(enumerate(jobs))[len(lines) :]:
            rows = np.asarray(programs[name](jnp.asarray(places, jnp.float32)), float)
            file.write(to_line({"step": i, name: rows.tolist()}))
            file.flush()
            at(i + 1, "")
    found = read_surface(folder)
    assert found is not None
    return found


def _jobs(settings: SurfaceSettings) -> list[tuple[str, Float[np.ndarray, "part 2"]]]:
    """Returns what each line of the log is of: as many places whatever devices there are."""
    size = 4 if settings.dataset == "cifar10" else 64
    return [
        (name, places[i : i + size])
        for name, places in zip(FIELDS, _places(settings), strict=True)
        for i in range(0, len(places), size)
    ]


def _places(settings: SurfaceSettings) -> list[Float[np.ndarray, "place 2"]]:
    """Returns logarithms of learning rates and powers, for the losses and for the field."""
    low, high = np.log([LEARNING_RATES, POWERS]).T
    sides = (np.linspace(0, 1, math.isqrt(settings.points)), (np.arange(7) + 0.5) / 7)
    units = [np.array([*itertools.product(side, side)]) for side in sides]
    if settings.sample == "random":
        key, shape = jax.random.key(settings.seed), (settings.points, 2)
        units[0] = np.asarray(jax.random.uniform(key, shape), float)
    return [low + unit * (high - low) for unit in units]


def draw_surface(
    figure: Any, found: Surface, paths: Sequence[tuple[int, Float[np.ndarray, "step 3"]]]
) -> None:
    """Draws losses, the best point, the field, and descents by horizon on an empty figure."""
    places, field_places = found.places / np.log(10), found.field_places / np.log(10)
    horizons = found.settings.horizons
    for i, axes in enumerate(panels(figure, len(horizons), len(horizons))):
        finite = np.isfinite(found.losses[i])
        losses, (x, y) = found.losses[i][finite], places[finite].T
        # What is far above the start is all the same: training got nowhere.
        heights = np.log10(np.minimum(losses, np.quantile(losses, 0.9)))
        levels = np.linspace(heights.min(), heights.max() + 1e-9, 13)
        filled = axes.tricontourf(x, y, heights, levels=levels, cmap="viridis")
        axes.plot(x, y, ".", color="white", ms=0.8, alpha=0.5)
        if i < len(found.field):
            norms = np.linalg.norm(found.field[i], axis=1)
            fine = np.isfinite(norms) & (norms > 0)
            down = -found.field[i][fine] / norms[fine, None]
            style: Any = {"color": "white", "alpha": 0.75, "scale": 28, "width": 0.004}
            axes.quiver(*field_places[fine].T, *down.T, **style)
        axes.plot(*np.log10(found.best(horizons[i])), "*", color="white", mec="black", ms=15)
        for k, (_, path) in enumerate(one for one in paths if one[0] == horizons[i]):
            line, color = np.log10(path[:, :2]), ("C3", "C1", "C6", "C5")[k % 4]
            axes.plot(*line.T, color=color, lw=1.6)
            axes.plot(*line[0], "o", color=color, mec="black", ms=6)
            axes.plot(*line[-1], "s", color=color, mec="black", ms=6)
        axes.set(title=f"after {horizons[i]:,} steps", xlabel="log10 learning rate")
        figure.colorbar(filled, ax=axes)
    figure.axes[0].set_ylabel("log10 power of decay")
    figure.suptitle(
        f"{found.settings.dataset}: log10 loss; star, the best; arrows, the direction of steepest "
        "descent; circle to square, meta-descent",
        fontsize=10,
    )
