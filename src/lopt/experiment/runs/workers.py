"""Workers, each with some of the particles: threads of this process, or Ray's, that come and go.

The driver sends theta and a key; a worker runs the windows of its particles and answers with the
mean of their estimates, and with a snapshot of its particles, from which another could go on. With
enough answers the driver takes a step. Snapshots together are the state that one process would
have: checkpoints are the same, and a run goes on with any number of workers, or without.
"""

import abc
import dataclasses
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from typing_extensions import override

from lopt.core.estimator import Estimate
from lopt.core.types import Key, Record, State, Theta
from lopt.core.unroll import TrainState, take
from lopt.estimators import Mean
from lopt.estimators.finite import is_finite, mean_of_finite, total
from lopt.estimators.mean import step_cost
from lopt.experiment.report import tell
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.storage import is_key
from lopt.experiment.runs.train import AbstractEngine, StepLog, beginning, guarded, shapes

# Seconds after which one that is gone is asked again, and after which waiting is said.
RETRY, PATIENCE = 0.1, 60.0


class Answer(NamedTuple):
    """What a worker says: the mean of `number` estimates that were finite, as plain NumPy."""

    loss: np.ndarray
    grads: list[np.ndarray]
    extra: dict[str, np.ndarray]
    dropped: int
    number: int


@eqx.filter_jit
def prepare(part: Mean, theta: Theta, key: Key) -> State:
    """Returns the particles of a worker before their first window; `key` is that of the run."""
    return part.prepare(theta, jax.random.fold_in(key, 2**32 - 1))


def answer_of(estimate: Estimate, count: Any) -> Answer:
    """Returns what a window found, for its way to the driver."""
    extra = {name: np.asarray(value) for name, value in estimate.extra.items()}
    grads, loss = to_host(estimate.grads), np.asarray(estimate.loss)
    return Answer(loss, grads, extra, int(estimate.dropped), int(count))


def pooled(answers: Sequence[Answer], theta: Theta) -> Estimate:
    """Returns the mean over all particles that were finite."""
    every = sum(each.number for each in answers)
    used = [each for each in answers if each.number] or answers
    shares = [each.number / every if every else 1 / len(used) for each in used]

    def mean(*leaves: np.ndarray) -> np.ndarray:
        parts = zip(shares, leaves, strict=True)
        return np.asarray(sum(share * leaf for share, leaf in parts), leaves[0].dtype)

    loss, extra = jax.tree.map(mean, *((each.loss, each.extra) for each in used))
    still = [np.zeros_like(leaf) for leaf in answers[0].grads]
    grads = jax.tree.map(mean, *(each.grads for each in used)) if every else still
    grads = jax.tree.unflatten(jax.tree.structure(theta), grads)
    dropped = np.int32(sum(each.dropped for each in answers))
    return Estimate(*jax.device_put((loss, grads, dropped, extra)))  # all at once


@eqx.filter_jit
def window(part: Mean, theta: Theta, state: State, key: Key) -> tuple[Estimate, Any, State]:
    """Returns the mean of the estimates that are finite, how many these are, and the next state."""
    every, state = part.particles(theta, state, key)
    return mean_of_finite(every), total(is_finite(every)), state


@eqx.filter_jit
def _step(
    optimizer: optax.GradientTransformation, state: TrainState, estimate: Estimate, log: StepLog
) -> tuple[TrainState, Record]:
    key = jax.random.fold_in(state.key, state.step)
    state, step = take(optimizer, state, estimate, state.estimator_state, key)
    return state, log(step)


class AbstractWorker(abc.ABC):
    """One that has the particles of `part`; it does one window at a time.

    Attributes:
        part: a `Mean` with rows, and how many these are: its size.
        snapshot: its particles after the last window that was answered; None before the first.
        asked: the outer step whose theta its window in progress has; None if there is none.
        began: when it was asked.
        due: when it may be asked again.
        answered: the last outer step that it answered, and how often.
        alive: whether it answered when it last was to.
    """

    def __init__(self, part: Mean) -> None:
        first, stop = part.rows or (0, part.num)
        self.part, self.size, self.alive = part, stop - first, True
        self.snapshot: Any = None
        self.asked: int | None = None
        self.began = self.due = 0.0
        self.answered = (-1, 0)
        self.answer: Future[Any]

    @property
    def ready(self) -> bool:
        """Whether it can be asked."""
        return True

    def fetched(self) -> Any:
        """Returns what its snapshot stands for, which may be elsewhere; None if it is lost."""
        return self.snapshot

    @abc.abstractmethod
    def ask(self, theta: Any, key: np.ndarray) -> "Future[Any]":
        """Begins a window, of which `received` makes an answer."""

    @abc.abstractmethod
    def received(self, future: "Future[Any]") -> tuple[Answer, Any] | None:
        """Returns the answer and a snapshot after it, or None if the window is lost."""


class AbstractFleet:
    """Workers, and how theta gets to them."""

    workers: Sequence[AbstractWorker]

    def share(self, theta: Theta) -> Any:
        """Returns what workers are given as theta."""
        return theta

    def waiting(self) -> list["Future[Any]"]:
        """Returns what ends when another worker gets ready."""
        return []


class Workers(AbstractEngine):
    """Outer steps from the answers of workers.

    Each step has the estimates of as many particles as there are. With `stale` = 0 all workers get
    the same theta, and steps are those of one process with all particles, up to the order of sums:
    a window that was lost is computed again. Otherwise a worker gets the theta of the moment as
    soon as it has answered, and an answer whose theta is more than `stale` steps old is dropped. An
    estimate belongs to the theta that its noise was added to, on the worker.

    The `tally` is a file that outlives the driver. The last checkpoint is that before or after a
    chunk: for each a row has its outer step, and how many windows were asked for that it lacks.
    """

    def __init__(
        self,
        experiment: Experiment,
        fleet: AbstractFleet,
        stale: int = 0,
        tally: np.ndarray | None = None,
    ) -> None:
        self._experiment, self._fleet, self._stale = experiment, fleet, stale
        self._tally = np.zeros((2, 2), np.int64) if tally is None else tally
        self._optimizer, self._log = guarded(experiment), StepLog(experiment.record)
        self._like = shapes(experiment).estimator_state
        self._layout = _Layout(mean_of(experiment), self._like)
        self._counts = {"lost": 0, "stale": 0, "windows": 0}
        self._began = time.perf_counter()
        self._known: dict[int, Any] = {}

    @property
    @override
    def status(self) -> str:  # type: ignore[override]
        workers, counts = self._fleet.workers, self._counts
        able = sum(one.alive and one.ready for one in workers)
        rate = counts["windows"] / (time.perf_counter() - self._began)
        text = f", {able} of {len(workers)} workers, {rate:.1f} windows/s"
        return text + "".join(f", {counts[n]} {n}" for n in ("stale", "lost") if counts[n])

    @override
    def begin(self) -> TrainState:
        theta, key = beginning(self._experiment)
        return TrainState(theta, self._optimizer.init(theta), None, key, jnp.zeros((), jnp.int32))

    @override
    def restore(self, begun: TrainState, states: list[TrainState]) -> TrainState:
        state = to_host(states[0].estimator_state)
        for i, one in enumerate(self._fleet.workers):
            self._known[i] = one.snapshot = self._layout.cut(state, one.part)
        return dataclasses.replace(states[0], estimator_state=None)

    @override
    def advance(self, state: TrainState, num_steps: int) -> tuple[TrainState, Record]:
        records, before, step = [], dict(self._counts), int(state.step)
        self._tally[0] = step, dict(self._tally[::-1].tolist()).get(step, 0)
        if not self._counts["windows"]:  # of another driver, before this one
            self._counts["lost"] += int(self._tally[0, 1])
        for _ in range(num_steps):
            estimate = self._gathered(state)
            state, record = _step(self._optimizer, state, estimate, self._log)
            since = {name: self._counts[name] - before[name] for name in ("lost", "stale")}
            records.append(jax.device_get(record) | since)
            before = dict(self._counts)
        self._tally[1] = state.step, sum(one.asked is not None for one in self._fleet.workers)
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *records)

    @override
    def states(self, state: TrainState) -> list[TrainState]:
        for i, one in enumerate(self._fleet.workers):
            found = one.fetched()
            if found is not None:
                self._known[i] = found
            elif i not in self._known:  # its first window is not there yet
                self._known[i] = to_host(prepare(one.part, *beginning(self._experiment)))
        parts = [one.part for one in self._fleet.workers]
        whole = self._layout.join(parts, [self._known[i] for i in range(len(parts))])
        return [dataclasses.replace(state, estimator_state=from_host(whole, self._like))]

    def _gathered(self, state: TrainState) -> Estimate:
        """Returns the mean over answers of as many particles as there are, of workers if ready."""
        fleet, step = self._fleet, int(state.step)
        while not any(one.ready for one in fleet.workers):
            wait(fleet.waiting(), return_when=FIRST_COMPLETED)
        theta, ready = fleet.share(state.params), [one for one in fleet.workers if one.ready]
        wanted, found = sum(one.size for one in ready), list[Answer]()
        own, gathered = jax.random.fold_in(state.key, step), 0
        while gathered < wanted:
            for one in ready:
                last, times = one.answered
                free = one.asked is None and time.perf_counter() >= one.due
                if free and (self._stale or last < step):
                    key = jax.random.fold_in(own, times) if last == step else own
                    one.asked, one.began = step, time.perf_counter()
                    self._tally[0, 1] += 1
                    one.answer = one.ask(theta, np.asarray(jax.random.key_data(key)))
            asked = [one for one in ready if one.asked is not None]
            seconds = RETRY if any(not one.alive for one in ready) else PATIENCE
            answers = [one.answer for one in asked]
            if not asked:
                time.sleep(seconds)
            elif not wait(answers, seconds, FIRST_COMPLETED).done and seconds == PATIENCE:
                tell(f"Waiting for {len(asked)} of {len(fleet.workers)} workers.")
            for one in asked:
                if one.answer.done() and (answer := self._received(one, step)) is not None:
                    found.append(answer)
                    gathered += one.size
        return pooled(found, state.params)

    def _received(self, one: AbstractWorker, step: int) -> Answer | None:
        """Returns the answer of a worker, if it is of use, and counts it."""
        asked, one.asked = one.asked, None
        assert asked is not None
        received = one.received(one.answer)
        if received is None:
            # One that is asked while it is not back fails at once, and has lost nothing.
            lost = one.alive or time.perf_counter() - one.began > 0.25
            self._counts["lost"] += lost
            self._tally[0, 1] -= not lost
            one.alive, one.due = False, time.perf_counter() + RETRY
            return None
        answer, one.snapshot = received
        one.alive = True
        one.answered = (step, one.answered[1] + 1 if one.answered[0] == step else 1)
        self._counts["windows"] += 1
        if step - asked > self._stale:
            self._counts["stale"] += 1
            return None
        return answer


def mean_of(experiment: Experiment) -> Mean:
    """Returns the estimator of an experiment, which must be a mean over particles."""
    if not isinstance(experiment.meta, Mean):
        raise ValueError(
            f"Workers share particles, and {type(experiment.meta).__name__} has none; try "
            "lopt.Mean(estimator, num), or train without --workers."
        )
    return experiment.meta


def split(mean: Mean, count: int) -> list[Mean]:
    """Returns parts of about the same cost for so many workers, of whole architectures if it can.

    Raises:
        ValueError: if there are fewer particles than workers.
    """
    if not 1 <= count <= mean.num:
        raise ValueError(f"{mean.num} particles are too few for {count} workers; try {mean.num}.")
    costs = np.zeros(mean.num)
    for one, rows in mean.shares():
        cost = step_cost(one)
        costs[rows] = cost if np.isfinite(cost) else 1.0
    before = np.concatenate([[0.0], np.cumsum(costs)])
    ends = np.searchsorted(before, before[-1] * np.arange(count + 1) / count - 1e-9 * before[-1])
    ends[-1] = mean.num
    # Each has one at least.
    ends = np.maximum(ends, np.arange(count + 1))
    ends = np.minimum(ends, mean.num - np.arange(count, -1, -1))
    return [dataclasses.replace(mean, rows=(int(a), int(b))) for a, b in itertools.pairwise(ends)]


def to_host(tree: Any) -> list[np.ndarray]:
    """Returns the leaves of a tree as NumPy has them, contiguous, keys as their numbers."""
    return [
        np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf, order="C")
        for leaf in jax.tree.leaves(tree)
    ]


def from_host(leaves: Sequence[np.ndarray], like: Any) -> Any:
    """Returns the tree whose leaves these were, of the structure of `like`."""
    found = [
        jax.random.wrap_key_data(jnp.array(leaf)) if is_key(old) else jnp.array(leaf)
        for leaf, old in zip(leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), found)


class _Layout:
    """Where among the leaves of the state of a `Mean`, of the shapes `like`, its particles are."""

    def __init__(self, mean: Mean, like: State) -> None:
        shares = mean.shares()
        trees = like if len(shares) > 1 else (like,)
        pairs = zip(shares, trees, strict=True)
        self._rows = [rows for (_, rows), tree in pairs for _ in jax.tree.leaves(tree)]

    def _of(self, part: Mean) -> list[tuple[int, slice]]:
        """Returns which leaves have particles of a part, and in which of their rows."""
        low, high = part.rows or (0, part.num)
        every = [(max(low, rows.start), min(high, rows.stop), rows.start) for rows in self._rows]
        return [(i, slice(a - at, b - at)) for i, (a, b, at) in enumerate(every) if a < b]

    def cut(self, leaves: Sequence[np.ndarray], part: Mean) -> list[np.ndarray]:
        """Returns those of a part's particles."""
        return [leaves[i][rows] for i, rows in self._of(part)]

    def join(self, parts: Sequence[Mean], leaves: Sequence[Sequence[np.ndarray]]) -> list[Any]:
        """Returns those of all, given those of each part, in order."""
        found: list[list[np.ndarray]] = [[] for _ in self._rows]
        for part, own in zip(parts, leaves, strict=True):
            for (i, _), leaf in zip(self._of(part), own, strict=True):
                found[i].append(leaf)
        return [np.concatenate(some) for some in found]
