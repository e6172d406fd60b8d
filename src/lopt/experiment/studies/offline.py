"""Offline: the loss after a short run as a surface over hyperparameters, and what it leads to.

A folder holds the study of one data set: `surface.json` with the losses, one folder per
meta-descent below `smd/`, and `best.json`, the runs to the end with what each horizon prefers.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.analysis.surface import losses_after, measure_after
from lopt.core.devices import device_mesh, round_up, spread
from lopt.core.types import Key, Params, State, Theta
from lopt.experiment.horizon_settings import SurfaceSettings
from lopt.experiment.report import progress
from lopt.experiment.runs.files import read_json, read_lines, to_line, write_bytes, write_json
from lopt.experiment.studies.setting import (
    LEARNING_RATES,
    POWERS,
    Setting,
    measure,
    setting,
    theta_at,
)

# Wu et al. average the lowest 50 of 2,500.
LOWEST = 0.02


def places_of(settings: SurfaceSettings) -> Float[np.ndarray, "point 2"]:
    """Returns logarithms (base e) of learning rates and powers."""
    low, high = np.log([LEARNING_RATES, POWERS]).T
    if settings.sample == "grid":
        side = np.linspace(0, 1, math.isqrt(settings.points))
        unit = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    else:
        drawn = jax.random.uniform(jax.random.key(settings.seed), (settings.points, 2))
        unit = np.asarray(drawn, float)
    return low + unit * (high - low)


@dataclasses.dataclass(frozen=True)
class Surface:
    """The losses after each horizon, and their derivatives in some places.

    Attributes:
        settings: what it is of.
        places: logarithms (base e) of learning rate and power.
        losses: after each horizon; not a number where training diverged.
        field_places: where `field` is, logarithms like `places`.
        field: derivatives of the losses by both logarithms, after all horizons but the longest
            (where there are several), which would take several times as long as the losses.
    """

    settings: SurfaceSettings
    places: Float[np.ndarray, "point 2"]
    losses: Float[np.ndarray, "horizon point"]
    field_places: Float[np.ndarray, "place 2"]
    field: Float[np.ndarray, "shorter place 2"]

    def best(self, horizon: int) -> tuple[float, float]:
        """Returns the learning rate and power that a horizon prefers.

        They are the geometric means over the lowest 2 % of the points.
        """
        losses = self.losses[self.settings.horizons.index(horizon)]
        losses = np.where(np.isfinite(losses), losses, np.inf)
        count = max(1, round(LOWEST * losses.size))
        rate, power = np.exp(self.places[np.argsort(losses)[:count]].mean(axis=0))
        return float(rate), float(power)


def compute_surface(settings: SurfaceSettings, folder: Path, *, show: bool = True) -> Surface:
    """Computes a surface, all its runs mapped in one compiled program.

    It is written to `surface.json` at the end, and to `surface.jsonl` as it grows: killed, it goes
    on from there.

    Raises:
        FileExistsError: if the folder holds another surface.
    """
    if (folder / "surface.json").exists():
        return read_surface(folder, settings)
    chosen = setting(settings.dataset, settings.decay_time, seed=settings.seed)
    log = folder / "surface.jsonl"
    said = {**dataclasses.asdict(settings), "horizons": list(settings.horizons)}
    _claim(folder / "surface_settings.json", said)
    places, field_places = places_of(settings), _field_places()
    inner = chosen.inner(settings.horizons[-1])
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)

    def after(horizons: tuple[int, ...], inner: Any, place: Float[Array, " two"]) -> Array:
        theta = theta_at(place[0], place[1])
        return losses_after(inner, theta, key, horizons, settings.batches)

    def losses(inner: Any, place: Float[Array, " two"]) -> Array:
        return after(settings.horizons, inner, place)

    def slopes(inner: Any, place: Float[Array, " two"]) -> Array:
        return jax.jacfwd(lambda place: after(settings.field_horizons, inner, place))(place)

    # Lines of the log are of one size, whatever devices a run goes on with.
    at_once = 4 if settings.dataset == "cifar10" else 64
    jobs = [("losses", part) for part in _parts(places, at_once)]
    jobs += [("field", part) for part in _parts(field_places, at_once)]
    functions = {"losses": losses, "field": slopes}
    programs = {name: eqx.filter_jit(jax.vmap(f, (None, 0))) for name, f in functions.items()}
    mesh, lines = device_mesh(), read_lines(log)
    write_bytes(log, "".join(map(to_line, lines)).encode())
    done = len(lines)
    with log.open("a") as file, progress("training", len(jobs), done=done, show=show) as at:
        for i, (name, part) in list(enumerate(jobs))[done:]:
            filled = np.resize(part, (round_up(at_once, mesh.size), 2)).astype(np.float32)
            found = programs[name](inner, spread(jnp.asarray(filled), mesh))
            rows = np.asarray(found, float)[: len(part)]
            lines.append({"step": i, name: rows.tolist()})
            file.write(to_line(lines[-1]))
            file.flush()
            at(len(lines), "")

    def gathered(name: str) -> np.ndarray:
        rows = [row for line in lines if name in line for row in line[name]]
        return np.moveaxis(np.array(rows, float), 1, 0)

    surface = Surface(settings, places, gathered("losses"), field_places, gathered("field"))
    arrays = {k: v.tolist() for k, v in vars(surface).items() if isinstance(v, np.ndarray)}
    write_json(folder / "surface.json", {"settings": said, **arrays})
    return surface


def read_surface(folder: Path, settings: SurfaceSettings | None = None) -> Surface:
    """Reads a finished surface.

    Raises:
        FileNotFoundError: if the folder holds none.
        FileExistsError: if it is not of these settings.
        ValueError: if the file is damaged.
    """
    path = folder / "surface.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no surface; make one with lopt horizon surface --out {folder}."
        )
    content = read_json(path)
    try:
        said = {**content["settings"], "horizons": tuple(content["settings"]["horizons"])}
        found = SurfaceSettings(**said)
        names = ("places", "losses", "field_places", "field")
        arrays = [np.array(content[name], float) for name in names]
        shapes = [(found.points, 2), (len(found.horizons), found.points)]
        if [array.shape for array in arrays[:2]] != shapes:
            raise ValueError(f"its places and losses are not of shapes {shapes}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole surface ({error}); delete it.") from error
    if settings is not None and found != settings:
        raise FileExistsError(f"{path} is of other settings ({said}); give another --out.")
    return Surface(found, *arrays)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Hyperparameters, and who chose them."""

    name: str
    horizon: int
    learning_rate: float
    power: float

    def rates(self, steps: np.ndarray, time_constant: float) -> np.ndarray:
        """Returns the learning rate after each of some numbers of steps."""
        return self.learning_rate / (1 + steps / time_constant) ** self.power


def train_to_the_end(
    choices: Sequence[Choice],
    dataset: str,
    time_constant: float,
    steps: int,
    seeds: int,
    points: int = 50,
    *,
    show: bool = True,
) -> dict[str, Any]:
    """Trains with each choice from several warm starts, and measures all the way.

    Returns:
        "steps", where measured, and for "train_loss", "test_loss" and "test_accuracy" arrays of
        (choice, seed, step).

    Raises:
        ValueError: if there is nothing to train, or a number is not positive.
    """
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be positive; try 3.")
    where = np.unique(np.geomspace(1, steps, points).round().astype(int))
    horizons = tuple(int(n) for n in where)
    rates, powers = (
        jnp.asarray([getattr(choice, name) for choice in choices], jnp.float32)
        for name in ("learning_rate", "power")
    )
    thetas = jax.vmap(theta_at)(jnp.log(rates), jnp.log(powers))
    results = []
    with progress("training to the end", seeds, show=show) as at:
        for seed in range(seeds):
            chosen = setting(dataset, time_constant, seed=seed)
            key = jax.random.fold_in(jax.random.key(seed), 2)
            results.append(_all_the_way(chosen, thetas, key, horizons))
            at(seed + 1, "")
    stacked = {
        name: np.stack([np.asarray(r[name], float) for r in results], 1) for name in results[0]
    }
    return {"steps": where, **stacked}


@eqx.filter_jit
def _all_the_way(
    chosen: Setting, thetas: Theta, key: Key, horizons: tuple[int, ...]
) -> dict[str, Float[Array, "choice step"]]:
    inner = chosen.inner(horizons[-1])

    def measured(task: Any, params: Params, state: State, key: Key) -> dict[str, Array]:
        return measure(chosen.classification, params)

    return jax.vmap(lambda theta: measure_after(inner, theta, key, horizons, measured))(thetas)


def _field_places(side: int = 7) -> Float[np.ndarray, "place 2"]:
    low, high = np.log([LEARNING_RATES, POWERS]).T
    unit = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(unit, unit, indexing="ij"), axis=-1).reshape(-1, 2)
    return low + grid * (high - low)


def _parts(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[i : i + size] for i in range(0, len(places), size)]


def _claim(path: Path, said: dict[str, Any]) -> None:
    """Writes the settings of an unfinished surface, or checks that they are these."""
    if path.exists() and read_json(path) != said:
        raise FileExistsError(
            f"{path.parent} holds an unfinished surface of other settings ({path.name}); "
            "give another --out."
        )
    write_json(path, said)
