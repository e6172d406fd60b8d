"""How short may a truncation be? Meta-gradient and optimum against truncation length.

Each knob, a hyperparameter or the scale of a rule's updates, is turned to several positions. The
slopes there say which way truncated backpropagation would turn it, and where it would come to rest.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lopt.analysis.truncation import Knob, TruncationSweep, truncations_of
from lopt.core.devices import device_mesh, round_up, spread
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Scalar, Theta
from lopt.core.unroll import start, unroll
from lopt.estimators import TruncatedBackprop
from lopt.experiment.trainings import over_devices
from lopt.learned import Learnable

MOST_KNOBS = 6


@dataclasses.dataclass(frozen=True)
class KnobResult:
    """One knob, turned.

    Attributes:
        name: of the quantity that is multiplied: a rate, "1 - b1" of a decay, the exponential of
            what has no logarithm, or "update scale".
        factors: by which, at each position.
        losses: the meta-loss of the whole episode, per position and episode.
        slopes: its derivative by the logarithm of the factor, as each truncation sees it, per
            position, episode and truncation.
    """

    name: str
    factors: Float[np.ndarray, " position"]
    losses: Float[np.ndarray, "position episode"]
    slopes: Float[np.ndarray, "position episode truncation"]

    def mean_slopes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard error over episodes, per position and truncation."""
        count = self.slopes.shape[1]
        return self.slopes.mean(1), self.slopes.std(1, ddof=1) / count**0.5

    def rest(self, truncation: int) -> tuple[float, str]:
        """Returns the factor at which descent with a truncation (by number) would come to rest.

        From where the knob stands it goes down the slopes that the truncation sees, until they
        turn. And "inside", or "below" or "above" if that is beyond the positions tried, or
        "nowhere" for a truncation that sees nothing of the knob, such as a single step before its
        update, or "diverged" where there is no slope to begin with.
        """
        slopes = self.mean_slopes()[0][:, truncation]
        if not np.isfinite(slopes[np.argmin(np.abs(np.log(self.factors)))]):
            return float("nan"), "diverged"
        if not np.any(np.nan_to_num(slopes)):
            return float("nan"), "nowhere"
        logs = np.log(self.factors)
        i = int(np.argmin(np.abs(logs)))
        way = -1 if slopes[i] > 0 else 1
        while 0 <= i + way < len(logs) and np.isfinite(slopes[i + way]):
            here, there = slopes[i], slopes[i + way]
            if here * there <= 0:
                share = here / (here - there) if here != there else 0.0
                return float(np.exp(logs[i] + share * (logs[i + way] - logs[i]))), "inside"
            i += way
        return float(self.factors[i]), "below" if way < 0 else "above"

    def best(self) -> tuple[float, float]:
        """Returns the position with the lowest mean meta-loss of the whole episode, and it."""
        means = self.losses.mean(1)
        i = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))
        return float(self.factors[i]), float(means[i])

    def loss_at(self, factor: float) -> float:
        """Returns the mean meta-loss of the whole episode at a factor, between positions linear."""
        if not np.isfinite(factor):
            return float("nan")
        means = self.losses.mean(1)
        return float(np.interp(np.log(factor), np.log(self.factors), means))


@dataclasses.dataclass(frozen=True)
class HorizonProbe:
    """All that was measured.

    Attributes:
        truncations: inner steps; the last is the horizon.
        knobs: what was turned.
        gradients: the gradient by all of theta, per truncation, episode and weight.
        seconds, memory: of one truncated estimate, per truncation; memory in bytes.
    """

    truncations: tuple[int, ...]
    knobs: tuple[KnobResult, ...]
    gradients: Float[np.ndarray, "truncation episode weight"]
    seconds: tuple[float, ...]
    memory: tuple[int | None, ...]


def probe_horizon(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    truncations: tuple[int, ...] | None = None,
    episodes: int = 8,
    positions: int = 13,
    reach: float = 30.0,
    say: Callable[[str], None] = lambda text: None,
) -> HorizonProbe:
    """Measures the bias of every truncation.

    Args:
        inner: what is measured; its horizon is the truth.
        theta: where.
        key: of the episodes, which all truncations and positions share.
        truncations: inner steps, increasing, ending with the horizon; chosen by default.
        episodes: over how many the means are.
        positions: of each knob, odd.
        reach: the largest factor; the smallest is its inverse.
        say: told what is being done.

    Raises:
        ValueError: if a number is out of range, or a truncation does not divide the horizon.
    """
    lengths = truncations_of(inner.horizon) if truncations is None else truncations
    if len(lengths) < 2 or lengths[-1] != inner.horizon:
        raise ValueError(
            f"truncations={lengths} must be at least two and end with the horizon "
            f"{inner.horizon}; try {truncations_of(inner.horizon)}, or a longer horizon."
        )
    if episodes < 2 or positions < 3 or positions % 2 == 0:
        raise ValueError(
            f"episodes={episodes} must be at least 2, positions={positions} odd and at least 3; "
            "try 8 and 13."
        )
    if not 1 < reach < np.inf:
        raise ValueError(f"reach={reach} must be above one; try 30.")
    results = []
    for name, knob, most in _knobs(inner, theta):
        say(f"turning {name}")
        half = positions // 2
        below = np.linspace(-np.log(reach), 0, half + 1)
        places = np.concatenate([below, np.linspace(0, min(np.log(reach), most), half + 1)[1:]])
        places = np.unique(places)
        losses, slopes = _sweep(
            dataclasses.replace(inner, learned=knob), lengths, places, key, episodes
        )
        results.append(KnobResult(name, np.exp(places), losses, slopes))
    say("the whole gradient, one truncation after the other")
    whole = [_truncated(inner, theta, n, key, episodes) for n in lengths]
    gradients, seconds, memory = zip(*whole, strict=True)
    return HorizonProbe(lengths, tuple(results), np.stack(gradients), seconds, memory)


def _knobs(inner: InnerTraining, theta: Theta) -> list[tuple[str, Knob, float]]:
    """Returns a knob for each array of hyperparameters, or one for the updates.

    With each comes its name, and the logarithm of the largest factor that makes sense.
    """
    learned = inner.learned
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    if not isinstance(learned, Learnable) or len(leaves) > MOST_KNOBS:
        return [("update scale", Knob(learned, theta), np.inf)]
    forms = {name: form for name, _, form in learned.initial}
    knobs = []
    for i, (path, leaf) in enumerate(leaves):
        words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        # Constants of schedules other than values have logarithms of their own.
        own = words[-1] in ("power", "factor", "time_constant")
        form, name = "log" if own else forms[words[0]], ".".join(words)
        named = {"log": name, "log_one_minus": f"1 - {name}", "identity": f"exp({name})"}[form]
        # One minus a decay is at most one.
        most = float(-jnp.max(leaf)) if form == "log_one_minus" else np.inf
        direction = [
            jnp.ones_like(x) if k == i else jnp.zeros_like(x) for k, (_, x) in enumerate(leaves)
        ]
        tree = jax.tree.unflatten(jax.tree.structure(theta), direction)
        knobs.append((named, Knob(learned, theta, tree), most))
    return knobs


def _sweep(
    inner: InnerTraining, lengths: tuple[int, ...], places: np.ndarray, key: Key, episodes: int
) -> tuple[np.ndarray, np.ndarray]:
    still = optax.set_to_zero()

    def run(sweep: TruncationSweep, item: tuple[Scalar, Array]) -> tuple[Array, Array]:
        place, number = item
        begin = start(sweep, still, place, jax.random.fold_in(key, number))
        _, (losses, slopes) = unroll(
            sweep,
            still,
            begin,
            inner.horizon // lengths[0],
            record=lambda step: (step.loss, step.estimator_state.slopes),
        )
        return losses.mean(), slopes.mean(0)

    dtype = jax.tree.leaves(inner.learned.theta)[0].dtype  # type: ignore[attr-defined]
    shape = (len(places), episodes)
    each = np.repeat(places, episodes).astype(dtype)
    numbers = np.tile(np.arange(episodes, dtype=np.uint32), len(places))
    sweep = TruncationSweep(inner, lengths)
    losses, slopes = over_devices(run, sweep, min(len(each), 32))((each, numbers))
    return losses.astype(float).reshape(shape), slopes.astype(float).reshape(*shape, len(lengths))


def _truncated(
    inner: InnerTraining, theta: Theta, length: int, key: Key, episodes: int
) -> tuple[np.ndarray, float, int | None]:
    """Returns gradients by all of theta, and what one estimate costs."""
    estimator = TruncatedBackprop(inner, length, stagger=False)
    arrays, static = eqx.partition(estimator, eqx.is_array)
    still = optax.set_to_zero()
    windows = inner.horizon // length

    def run(arrays: Any, theta: Theta, number: Array) -> Float[Array, " weight"]:
        estimator = eqx.combine(arrays, static)
        begin = start(estimator, still, theta, jax.random.fold_in(key, number))
        _, grads = unroll(
            estimator, still, begin, windows, record=lambda step: ravel_pytree(step.grads)[0]
        )
        return grads.mean(0)

    mesh = device_mesh()
    numbers = spread(jnp.arange(round_up(episodes, mesh.size), dtype=jnp.uint32), mesh)
    program = jax.jit(jax.vmap(run, (None, None, 0))).lower(arrays, theta, numbers).compile()
    began = time.perf_counter()
    grads = np.asarray(program(arrays, theta, numbers), float)
    seconds = (time.perf_counter() - began) / (windows * len(grads))
    analysis = program.memory_analysis()
    memory = None if analysis is None else int(analysis.temp_size_in_bytes) * mesh.size
    return grads[:episodes], seconds, None if memory is None else memory // len(grads)
