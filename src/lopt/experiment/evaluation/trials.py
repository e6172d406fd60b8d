"""Trials on one evaluation: trained where they are missing, kept on disk, and chosen among.

Choices are made on the seeds "validation" and reported on the seeds "report", which nothing was
chosen on. Every optimizer sees the same initial params and batches at the same seed. What is kept
depends on the task, not on the name of the evaluation.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key
from lopt.experiment.baselines import BASELINES, Contestant, Grid, Tuned, random_adam, tune
from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.evaluation import Evaluation, Trial, trial
from lopt.experiment.runs import files
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.run import printed
from lopt.experiment.trainings import OverDevices, bytes_per_param, drawn, dtype_of, stream

# The version of the protocol: results of another one are not used again.
FORMAT = 3
SEEDS = ("validation", "report")
OBJECTIVES = ("train", "held_out")
# Hyperparameters that are trained side by side.
AT_ONCE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An optimizer after a number of trials, its budget, on fresh seeds."""

    contestant: Contestant
    budget: int
    tuned: dict[str, Tuned]  # what was chosen, by objective: "train" or "held_out"
    found: dict[str, Trial]  # the results of these
    microseconds: float  # per step of one training among those side by side
    state_bytes: float  # of the optimizer's state, per parameter

    @property
    def name(self) -> str:
        """The name of the optimizer and its number of trials, the same on all evaluations."""
        return f"{self.contestant.name} ({self.budget} {'trials' if self.budget > 1 else 'trial'})"


class Trials:
    """The trials of one evaluation; `seed` is that of both streams of random numbers."""

    def __init__(self, evaluation: Evaluation, seed: int = 0) -> None:
        self.evaluation = evaluation
        base, count = stream("evaluation", seed), evaluation.num_seeds
        self._keys = {
            name: jax.random.split(jax.random.fold_in(base, i), count)
            for i, name in enumerate(SEEDS)
        }
        self._dtype = dtype_of(evaluation.task)
        self._about = {
            "format": FORMAT,
            "lopt": version("lopt"),
            "jax": version("jax"),
            "task": fingerprint((evaluation.task, _program_of(evaluation.task))),
            "dtype": str(self._dtype),
            "horizon": evaluation.horizon,
            "seeds": count,
            "seed": seed,
        }
        self._programs: dict[int, OverDevices] = {}
        self._known: dict[Path, dict[str, Any]] = {}

    def results(self, contestant: Contestant, rows: Grid, seeds: str) -> list[Trial]:
        """Returns a result for each row of hyperparameters; those not known are trained."""
        known, path = self._load(contestant)
        names = [f"{seeds} " + " ".join(f"{value:.6g}" for value in row) for row in rows]
        asked = dict(zip(names, rows, strict=True))
        missing = [name for name in asked if name not in known]
        for i in range(0, len(missing), AT_ONCE):
            some = missing[i : i + AT_ONCE]
            program = self._program(contestant, seeds)
            found = program(np.stack([asked[name] for name in some]).astype(self._dtype))
            runs = self.evaluation.horizon * program.batch * self.evaluation.num_seeds
            for j, name in enumerate(some):
                one = jax.tree.map(lambda leaf, j=j: _rounded(leaf[j]).tolist(), vars(found))
                known[name] = {"microseconds": 1e6 * program.seconds / runs, "trial": one}
            if contestant.identity is not None:
                about = {"evaluation": self.evaluation.name, "method": contestant.name}
                files.write_json(path, self._about | about | {"results": known}, sealed=True)
        return [Trial(**_arrays(known[name]["trial"])) for name in names]

    def choose(self, contestant: Contestant, budget: int, objective: str) -> Tuned:
        """Returns the best hyperparameters of so many trials, on validation seeds."""

        def scores_of(rows: Grid) -> list[float]:
            tried = self.results(contestant, rows, "validation")
            ends = [one.train[:, 1] if objective == "train" else one.choice for one in tried]
            return [float(np.mean(end)) for end in ends]

        widens = contestant.widens and 1 < budget == len(contestant.grid)
        return tune(contestant.grid[:budget], scores_of, widens=widens)

    def entries(self, contestant: Contestant) -> list[Entry]:
        """Returns the optimizer at each of its numbers of trials, on fresh seeds."""
        self.results(contestant, contestant.grid, "validation")  # of all budgets, side by side
        choices = [
            {one: self.choose(contestant, budget, one) for one in OBJECTIVES}
            for budget in contestant.budgets
        ]
        rows = np.array([tuned.values for one in choices for tuned in one.values()])
        found = iter(self.results(contestant, rows, "report"))
        known = self._load(contestant)[0].values()
        made = partial(contestant.factory, contestant.grid[0].astype(self._dtype))
        size = bytes_per_param(self.evaluation.task, lambda: made(self.evaluation.horizon))
        costs = float(np.median([one["microseconds"] for one in known])), size
        return [
            Entry(contestant, budget, one, {name: next(found) for name in one}, *costs)
            for budget, one in zip(contestant.budgets, choices, strict=True)
        ]

    def scale(self) -> metrics.Scale:
        """Returns the scale of losses, which is also written, for other programs to read."""
        adams = BASELINES["Adam"], random_adam()
        one, other = (self.results(adam, adam.grid, "validation") for adam in adams)
        scale = metrics.Scale.of(one, other, self.evaluation.horizon)
        about = self._about | {"made_from": f"Adam, {len(one)} rates, {len(other)} random settings"}
        if not (path := self._path(about, "scale", None)).exists():
            numbers = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), vars(scale))
            files.write_json(path, about | numbers)
        return scale

    def compile(self, contestants: Sequence[Contestant]) -> None:
        """Compiles, two at a time, what is needed for optimizers of which nothing is known."""
        new = {id(one.factory): one for one in contestants if not self._load(one)[0]}
        for one in new.values():
            self._program(one, SEEDS[0]).trace(one.grid.astype(self._dtype))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: self._program(one, SEEDS[0]).compile(), new.values()))

    def _path(self, about: dict[str, Any], method: str, folder: Path | None) -> Path:
        digest = hashlib.sha256(repr(sorted((about | {"method": method}).items())).encode())
        name = re.sub(r"\W+", "_", method).strip("_")[:40]
        return (folder or cache_folder() / "evaluations") / f"{name}_{digest.hexdigest()[:12]}.json"

    def _load(self, contestant: Contestant) -> tuple[dict[str, Any], Path]:
        """Returns what is known of an optimizer, and where that is kept if it has an identity."""
        about = self._about | {"identity": contestant.identity}
        path = self._path(about, contestant.name, contestant.folder)
        if path not in self._known:
            self._known[path] = {}
            with contextlib.suppress(FileNotFoundError, ValueError):  # what is damaged is trained
                self._known[path] = files.read_json(path, sealed=True)["results"]
        return self._known[path], path

    def _program(self, contestant: Contestant, seeds: str) -> OverDevices:
        """Returns what trains at rows of hyperparameters, compiled once for each factory."""
        horizon, params_of = self.evaluation.horizon, contestant.params_of
        shared = self.evaluation.task, contestant.factory, self._keys[seeds]

        def one(shared: Any, values: Any) -> Trial:
            task, factory, keys = shared
            return trial(task, factory(values, horizon), keys, horizon, params_of)

        program = self._programs.get(id(contestant.factory)) or OverDevices(one, shared, AT_ONCE)
        program.share(shared)
        return self._programs.setdefault(id(contestant.factory), program)


def _program_of(tasks: AbstractTaskFamily) -> Any:
    """Returns what tasks compute: functions of one name need not do the same."""

    def one(tasks: AbstractTaskFamily, key: Key) -> Any:
        task = drawn(tasks, key)
        params = task.init(key)
        state = task.prepare(params, key)
        measured = task.metrics(params, state, task.batch(key))
        return task.estimate(params, state, key), measured

    program = eqx.filter_make_jaxpr(one)(tasks, jax.random.key(0))[0]
    return str(program.jaxpr), tuple(program.consts)


def fingerprint(tree: Any) -> str:
    """Returns the SHA-256 of what a task or an optimizer is, all numbers of its arrays included."""
    found = hashlib.sha256(printed(tree).encode())
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array | np.ndarray):
            found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


# Seven digits are what a 32-bit float has; what is not finite is NaN, or null in JSON.
_rounded = np.vectorize(lambda x: float(f"{x:.7g}") if np.isfinite(x) else np.nan, otypes=[float])


def _arrays(content: Any) -> Any:
    """Returns lists of numbers, and None for what is not finite, as arrays, in dictionaries."""
    if isinstance(content, dict):
        return {name: _arrays(value) for name, value in content.items()}
    return np.array(content, float)
