"""Reference optimizers: one table of what is tried of each, in which order; and the one tuner."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpy.typing import ArrayLike
from optax import contrib

from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Scalar
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.files import digest
from lopt.experiment.trainings import Keys, dtype_of, trainings
from lopt.learned.matrices import MatrixAxes
from lopt.learned.presets import aggmo

Values = Float[Array, " hyperparameter"]
Grid = Float[np.ndarray, "trial hyperparameter"]
# By how many rates a grid is widened at most.
WIDEN_BY = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Contestant:
    """An optimizer to be judged, and the hyperparameters that are tried, in the order of trials."""

    name: str
    # From hyperparameters and the length of a run; those of one factory share a compiled program.
    factory: Callable[[Any, int], optax.GradientTransformation]
    grid: Grid  # of each trial; the first is that of someone who tunes nothing
    budgets: tuple[int, ...] = (1, 11)  # of trials; the largest is that of the whole grid
    # Whether half decades of the first, a rate or factor, are added while the best is at an edge.
    widens: bool = True
    # From the optimizer's state and the trained params to those that are judged.
    params_of: Callable[[Any, Any], Any] = lambda state, params: params
    # What results depend on besides name and grid; they are not kept on disk where it is None.
    identity: str | None = ""
    folder: Path | None = None  # where they are kept; by default where those of all baselines are
    is_baseline: bool = False  # whether others are judged by it


def outward(default: float, *fixed: float, count: int = 11) -> Grid:
    """Returns half decades around a rate, the closest first, beside hyperparameters that stay."""
    powers = sorted(range(-(count // 2), count - count // 2), key=abs)
    return np.array([(default * 10.0 ** (power / 2), *fixed) for power in powers])


def _schedule(values: Any, num_steps: int) -> Callable[[Any], Any]:
    """Returns warm-up, constant, cosine: the rate, two ends and the last rate, as shares."""
    rate, warmup, constant, last = values

    def at(step: Any) -> Any:
        done = step.astype(jnp.result_type(rate)) / num_steps
        rise = jnp.clip((done + 1 / num_steps) / jnp.maximum(warmup, 1 / num_steps), 0, 1)
        start = jnp.maximum(constant, warmup)
        fall = jnp.clip((done - start) / jnp.maximum(1 - start, 1e-6), 0, 1)
        return rate * rise * (last + (1 - last) * 0.5 * (1 + jnp.cos(jnp.pi * fall)))

    return at


def _adam(values: Any, num_steps: int, nesterov: bool = False) -> optax.GradientTransformation:
    """Returns Adam, by its schedule, two decays, epsilon, and weight decay after and before it."""
    decay, noise, epsilon, weight_decay, penalty = values[4:]
    return optax.chain(
        optax.add_decayed_weights(penalty),
        optax.scale_by_adam(decay, noise, epsilon, nesterov=nesterov),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(_schedule(values[:4], num_steps)),
    )


_nadam = functools.partial(_adam, nesterov=True)
_NO_SCHEDULE, _ADAM = (0.0, 1.0, 0.0), (0.9, 0.999, 1e-8)


def _of_rate(factory: Callable[..., Any], **fixed: Any) -> Callable[[Any, int], Any]:
    return lambda values, num_steps: factory(values[0], **fixed)


def _muon(values: Any, num_steps: int) -> optax.GradientTransformation:
    """Returns Muon with Adam for vectors and embeddings; matrices are (outputs, inputs)."""
    rate = _schedule(values, num_steps)
    return contrib.muon(
        rate,
        adam_learning_rate=lambda step: 0.1 * rate(step),
        muon_weight_dimension_numbers=MatrixAxes("out_in"),
    )


def _schedule_free(values: Any, num_steps: int) -> optax.GradientTransformation:
    warmup = max(1, num_steps // 20)
    return contrib.schedule_free_adamw(values[0], warmup_steps=warmup, weight_decay=0.01)


def _decaying(values: Any, num_steps: int) -> optax.GradientTransformation:
    """Returns Adam at the rate a (1 + r s)^-p (1 - s)^q at a share s of the run, by a, r, p, q."""
    rate, speed, power, last_power = values

    def at(step: Any) -> Any:
        done = step.astype(jnp.result_type(rate)) / num_steps
        return rate * (1 + speed * done) ** -power * jnp.maximum(1 - done, 0) ** last_power

    return optax.adam(at)


# Factory, default rate, and other hyperparameters, which stay. Weight decay of AdamW is 0.01, of
# others zero; warm-up takes a twentieth of the run.
_ROWS: dict[str, tuple[Any, ...]] = {
    "SGD": (_of_rate(optax.sgd), 0.1),
    "momentum": (_of_rate(optax.sgd, momentum=0.9), 0.01),
    "Adam": (_adam, 1e-3, *_NO_SCHEDULE, *_ADAM, 0.0, 0.0),
    "RMSProp": (_of_rate(optax.rmsprop), 1e-3),
    "AdamW, cosine": (_adam, 1e-3, 0.05, 0.0, 0.0, *_ADAM, 0.01, 0.0),
    "Lion": (_of_rate(optax.lion, weight_decay=0.0), 1e-4),
    "Muon, cosine": (_muon, 0.01, 0.05, 0.0, 0.0),
    "schedule-free AdamW": (_schedule_free, 1e-3),
}
_MORE: dict[str, tuple[Any, ...]] = {
    "Muon": (_muon, 0.01, *_NO_SCHEDULE),
    "Adam, inverse time": (_decaying, 1e-3, 10.0, 1.0, 0.0),
    "Adam, inverse root": (_decaying, 1e-3, 100.0, 0.5, 0.0),
    "Adam, linear": (_decaying, 1e-3, 0.0, 0.0, 1.0),
    "AggMo": (_of_rate(aggmo), 0.01),
}
BASELINES = {
    name: Contestant(name, factory, outward(*row), is_baseline=True)
    for name, (factory, *row) in (_ROWS | _MORE).items()
}
BASELINES["schedule-free AdamW"] = dataclasses.replace(
    BASELINES["schedule-free AdamW"], params_of=contrib.schedule_free_eval_params
)
# Those of suites.
USUAL = tuple(_ROWS)


def baselines(names: Sequence[str], optlist_path: Path | None = None) -> list[Contestant]:
    """Returns reference optimizers by name; a ValueError if there is no such."""
    known = (*BASELINES, "OptList")
    for name in names:
        if name not in known:
            raise ValueError(f"--baselines {name} must be one of: {', '.join(known)}.")
    return [optlist(optlist_path) if name == "OptList" else BASELINES[name] for name in names]


def random_adam() -> Contestant:
    """Returns Adam at random settings, for the scale of losses and for what tuning is worth.

    Rate from 1e-5 to 1, both decays from 0 to 0.999 and 0.99999, epsilon from 1e-10 to 1e-2: all
    log-uniform, the decays in their distance from 1.
    """
    low, high = np.log([1e-5, 1e-3, 1e-5, 1e-10]), np.log([1.0, 1.0, 1.0, 1e-2])
    drawn = np.exp(np.random.default_rng(0).uniform(low, high, (32, 4)))
    grid = np.array([(r, *_NO_SCHEDULE, 1 - a, 1 - b, e, 0.0, 0.0) for r, a, b, e in drawn])
    return Contestant("random Adam", _adam, grid, (len(grid),), widens=False)


OPTLIST = (
    "https://raw.githubusercontent.com/google/learned_optimization/main/"
    "learned_optimization/optimizers/data/opt_list.json"
)
OPTLIST_SHA256 = "774c4c189a6f75301c16c59dd9433c62f9a5d199c407de9a8df929d4c7702766"


def optlist(path: Path | None = None) -> Contestant:
    """Returns NAdamW at the settings of OptList, in their order (Metz et al., arXiv:2002.11887).

    The order was found with an implementation whose L2 term has the other sign. The list, JSON, is
    downloaded once if no path is given; at most 30 settings are taken from it.
    """
    if path is None:
        import pooch

        try:
            path = Path(pooch.retrieve(OPTLIST, OPTLIST_SHA256, "opt_list.json", cache_folder()))
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"OptList could not be downloaded from {OPTLIST}: {error} Without a network, give "
                "the file with --optlist PATH."
            ) from error
    names = [
        *("learning_rate", "warmup_fraction", "constant_fraction", "min_learning_rate_mult"),
        *("beta1", "beta2", "epsilon", "adamw_weight_decay", "l2_weight_decay"),
    ]
    try:
        found = json.loads(path.read_bytes())[:30]
        grid = np.array([[float(one[name]) for name in names] for one in found])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--optlist {path} is not a list of settings with {', '.join(names)}."
        ) from error
    kept = tuple(budget for budget in (1, 10, 30) if budget <= len(grid))
    known: Any = {"widens": False, "identity": digest(path), "is_baseline": True}
    return Contestant("OptList", _nadam, grid, kept, **known)


class Tuned(NamedTuple):
    """The best hyperparameters, whether their rate is at an edge, and how many were tried."""

    values: tuple[float, ...]
    at_edge: bool
    trials: int


def tune(grid: Grid, scores_of: Callable[[Grid], ArrayLike], *, widens: bool = False) -> Tuned:
    """Chooses the hyperparameters with the lowest finite score, the first if there is none.

    If it widens, further half decades of the first one, the rate, are tried while it is at an edge.
    """

    def scored(rows: Grid) -> Float[np.ndarray, " trial"]:
        found = np.asarray(scores_of(rows), float)
        return np.where(np.isfinite(found), found, np.inf)

    scores, most = scored(grid), len(grid) + WIDEN_BY
    while True:
        rates, seen = grid[:, 0], np.isfinite(scores).any()
        # Where all rates diverge, lower ones may not.
        best = int(np.argmin(rates if widens and not seen else scores))
        row = grid[best]
        at_edge = widens and row[0] in (rates.min(), rates.max())
        if not (at_edge and len(grid) < most):
            return Tuned(tuple(row.tolist()), bool(at_edge), len(grid))
        factor = 10.0 ** (-0.5 if row[0] == rates.min() else 0.5)
        further = np.stack([[row[0] * factor**i, *row[1:]] for i in (1, 2)])
        grid, scores = np.concatenate([grid, further]), np.append(scores, scored(further))


def tuned_baseline(tasks: AbstractTaskFamily, keys: Keys, num_steps: int, name: str) -> Tuned:
    """Returns the rate of a baseline with the lowest mean loss over all steps and keys.

    It is the published criterion (Sobotka et al. 2024, arXiv:2312.07174).
    """
    baseline, dtype = BASELINES[name], dtype_of(tasks)

    def loss(row: Values) -> Scalar:
        optimizer = baseline.factory(row, num_steps)
        return jnp.mean(trainings(tasks, optimizer, keys, num_steps)[1])

    every = jax.jit(jax.vmap(loss))
    return tune(baseline.grid, lambda rows: every(rows.astype(dtype)), widens=True)
