"""Reference optimizers: what is tried of each, in which order, and the one tuner of studies."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax import contrib

from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Scalar
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.files import digest
from lopt.experiment.trainings import Keys, dtype_of, trainings

Values = Float[Array, " hyperparameter"]
Grid = Float[np.ndarray, "trial hyperparameter"]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A hand-made optimizer, by its learning rate, and rates to choose from, for studies.

    They are half decades, wide enough that the best is at no end on the tasks of the recipes.
    """

    factory: Callable[[Any], optax.GradientTransformation]
    rates: Float[np.ndarray, " rate"]


def _baseline(low: float, high: float, factory: Any, **fixed: float) -> Baseline:
    rates = 10.0 ** np.arange(low, high + 0.25, 0.5)
    return Baseline(functools.partial(factory, **fixed), rates)


BASELINES = {
    "SGD": _baseline(-3.0, 2.0, optax.sgd),
    "momentum": _baseline(-4.0, 1.0, optax.sgd, momentum=0.9),
    "Adam": _baseline(-4.5, 0.5, optax.adam),
    "Lion": _baseline(-5.5, 0.0, optax.lion, weight_decay=0.0),
}


def _params(state: Any, params: Any) -> Any:
    return params


@dataclasses.dataclass(frozen=True, eq=False)
class Contestant:
    """An optimizer to be judged, and the hyperparameters that are tried, in the order of trials.

    Attributes:
        name: of the optimizer.
        factory: from hyperparameters and the length of a run to an Optax optimizer. Contestants
            with the same factory share a compiled program.
        grid: the hyperparameters of each trial. The first trial has those of someone who tunes
            nothing; the first hyperparameter is the learning rate, or a multiplier of updates.
        budgets: numbers of trials that it is judged at; that of the whole grid comes last.
        widens: whether rates are half decades, and more are tried if the best is at an edge.
        params_of: from the optimizer's state and the trained params to those that are judged.
        identity: what its results depend on besides name and hyperparameters; they are not kept
            on disk where it is None.
        folder: where results are kept; by default where those of all baselines are.
    """

    name: str
    factory: Callable[[Any, int], optax.GradientTransformation]
    grid: Grid
    budgets: tuple[int, ...]
    widens: bool = True
    params_of: Callable[[Any, Any], Any] = _params
    identity: str | None = ""
    folder: Path | None = None


def outward(default: float, *fixed: float, count: int = 11) -> Grid:
    """Returns half decades around a rate, the closest first, beside hyperparameters that stay."""
    powers = sorted(range(-(count // 2), count - count // 2), key=abs)
    return np.array([(default * 10.0 ** (power / 2), *fixed) for power in powers])


def _sgd(values: Values, num_steps: int) -> optax.GradientTransformation:
    return optax.sgd(values[0], momentum=values[1])


def _schedule(values: Values, num_steps: int) -> Callable[[Any], Any]:
    """Returns warm-up, a constant part and a cosine, by rate and three shares of the run's length.

    `values` are the rate, the share of warm-up, the share until which it is constant, and the last
    rate as a share of the largest.
    """
    rate, warmup, constant, last = values

    def at(step: Any) -> Any:
        done = step.astype(rate.dtype) / num_steps
        rise = jnp.clip((done + 1 / num_steps) / jnp.maximum(warmup, 1 / num_steps), 0, 1)
        start = jnp.maximum(constant, warmup)
        fall = jnp.clip((done - start) / jnp.maximum(1 - start, 1e-6), 0, 1)
        return rate * rise * (last + (1 - last) * 0.5 * (1 + jnp.cos(jnp.pi * fall)))

    return at


def _adam(values: Values, num_steps: int, nesterov: bool = False) -> optax.GradientTransformation:
    """Returns Adam with weight decay on either side of it and a schedule.

    `values` are those of the schedule, the two decays, epsilon, and weight decay after and before.
    """
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


def _muon(rate: Any) -> optax.GradientTransformation:
    return contrib.muon(rate, adam_learning_rate=0.1 * rate)


def _schedule_free(values: Values, num_steps: int) -> optax.GradientTransformation:
    warmup = max(1, num_steps // 20)
    return contrib.schedule_free_adamw(values[0], warmup_steps=warmup, weight_decay=0.01)


def _row(name: str, factory: Any, grid: Grid, **more: Any) -> tuple[str, Contestant]:
    return name, Contestant(name, factory, grid, (1, len(grid)), **more)


# Weight decay of AdamW is 0.01, of others zero; warm-up takes a twentieth of the run.
CONTESTANTS = dict(
    [
        _row("SGD", _sgd, outward(0.1, 0.0)),
        _row("momentum", _sgd, outward(0.01, 0.9)),
        _row("Adam", _adam, outward(1e-3, *_NO_SCHEDULE, *_ADAM, 0.0, 0.0)),
        _row("RMSProp", _of_rate(optax.rmsprop), outward(1e-3)),
        _row("AdamW, cosine", _adam, outward(1e-3, 0.05, 0.0, 0.0, *_ADAM, 0.01, 0.0)),
        _row("Lion", _of_rate(optax.lion, weight_decay=0.0), outward(1e-4)),
        _row("Muon", _of_rate(_muon), outward(0.01)),
        _row(
            *("schedule-free AdamW", _schedule_free, outward(1e-3)),
            params_of=contrib.schedule_free_eval_params,
        ),
    ]
)


def random_adam(count: int = 32) -> Contestant:
    """Returns Adam at random settings, for the scale of losses and for what tuning is worth.

    Rate from 1e-5 to 1, both decays from 0 to 0.999 and 0.99999, epsilon from 1e-10 to 1e-2: all
    log-uniform, the decays in their distance from 1.
    """
    low, high = np.log([1e-5, 1e-3, 1e-5, 1e-10]), np.log([1.0, 1.0, 1.0, 1e-2])
    drawn = np.exp(np.random.default_rng(0).uniform(low, high, (count, 4)))
    grid = np.array([(r, *_NO_SCHEDULE, 1 - a, 1 - b, e, 0.0, 0.0) for r, a, b, e in drawn])
    return Contestant("random Adam", _adam, grid, (count,), widens=False)


OPTLIST = (
    "https://raw.githubusercontent.com/google/learned_optimization/main/"
    "learned_optimization/optimizers/data/opt_list.json"
)
OPTLIST_SHA256 = "774c4c189a6f75301c16c59dd9433c62f9a5d199c407de9a8df929d4c7702766"


def optlist(path: Path | None = None, budgets: tuple[int, ...] = (1, 10, 30)) -> Contestant:
    """Returns NAdamW at the settings of OptList, in their order (Metz et al., arXiv:2002.11887).

    The order was found with an implementation whose L2 term has the other sign.

    Args:
        path: of the list, as JSON; by default it is downloaded once.
        budgets: numbers of trials; as many settings are taken from the list.
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
        found = json.loads(path.read_bytes())[: budgets[-1]]
        grid = np.array([[float(one[name]) for name in names] for one in found])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--optlist {path} is not a list of settings with {', '.join(names)}."
        ) from error
    kept = tuple(budget for budget in budgets if budget <= len(grid))
    identity = digest(path)
    return Contestant("OptList", _nadam, grid, kept, widens=False, identity=identity)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was chosen from a grid, and what training with it, and with each value, resulted in."""

    value: Any
    at_edge: bool  # the first or last of the grid
    result: Any
    results: Any


def tune(
    factory: Callable[[Any], Any],
    grid: Float[np.ndarray, "value ..."],
    train: Callable[[Any], tuple[Scalar, Any]],
) -> Tuned:
    """Trains with every value of a grid, side by side, and chooses the one with the lowest score.

    `train` maps what the factory makes of a value to a score and anything; it is traced once.
    Where no score is finite the first value is chosen.
    """
    every = jax.jit(jax.vmap(lambda value: train(factory(value))))
    scores, results = jax.device_get(every(jnp.asarray(grid)))
    own = np.asarray(scores, float)
    best = int(np.argmin(np.where(np.isfinite(own), own, np.inf)))
    value = float(grid[best]) if grid.ndim == 1 else grid[best]
    chosen = jax.tree.map(lambda leaf: leaf[best], results)
    return Tuned(value, best in (0, len(grid) - 1), chosen, results)


def tuned_baseline(tasks: AbstractTaskFamily, keys: Keys, num_steps: int, name: str) -> Tuned:
    """Returns the learning rate of a baseline with the lowest mean loss over all steps and keys.

    It is the published criterion (Sobotka et al. 2024, arXiv:2312.07174).
    """
    baseline = BASELINES[name]

    def train(optimizer: optax.GradientTransformation) -> tuple[Scalar, tuple[()]]:
        return jnp.mean(trainings(tasks, optimizer, keys, num_steps)[1]), ()

    return tune(baseline.factory, baseline.rates.astype(dtype_of(tasks)), train)
