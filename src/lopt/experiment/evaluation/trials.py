"""Trials on one evaluation: trained where they are missing, kept on disk, and chosen among.

Choices are made on the seeds "validation" and reported on the seeds "report", which nothing was
chosen on. Every optimizer sees the same initial params and batches at the same seed.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lopt.experiment.baselines import CONTESTANTS, Contestant, Grid, random_adam
from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.evaluation import Evaluation, Trial, trial
from lopt.experiment.runs import files
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.run import printed
from lopt.experiment.trainings import OverDevices, drawn, dtype_of, stream

# The version of the protocol: results of another one are not used again.
FORMAT = 1
SEEDS = ("validation", "report")
OBJECTIVES = ("train", "held_out")
# Hyperparameters that are trained side by side, and rates that a grid is widened by at most.
AT_ONCE, WIDEN_BY = 4, 8

Row = Float[np.ndarray, " hyperparameter"]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An optimizer after so many trials, on fresh seeds.

    Attributes:
        contestant: the optimizer.
        budget: at how many trials it was to be judged.
        trials: how many hyperparameters its choices were among, more if a grid was widened.
        values: the hyperparameters with the lowest loss, by objective: "train" or "held_out".
        at_edge: whether a rate is still at an edge of what was tried.
        found: the results of these, by objective.
        microseconds: per step of one training among those side by side.
        state_bytes: of the optimizer's state, per parameter.
    """

    contestant: Contestant
    budget: int
    trials: int
    values: dict[str, Row]
    at_edge: bool
    found: dict[str, Trial]
    microseconds: float
    state_bytes: float

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
            "evaluation": evaluation.name,
            "task": fingerprint(evaluation.task),
            "dtype": str(self._dtype),
            "horizon": evaluation.horizon,
            "seeds": count,
            "seed": seed,
        }
        self._programs: dict[int, OverDevices] = {}
        self._known: dict[str, dict[str, Any]] = {}

    def results(self, contestant: Contestant, rows: Grid, seeds: str) -> list[Trial]:
        """Returns a result for each row of hyperparameters; those not known are trained."""
        known, path = self._load(contestant)
        names = [f"{seeds} " + " ".join(f"{value:.6g}" for value in row) for row in rows]
        asked = dict(zip(names, rows, strict=True))
        missing = [name for name in asked if name not in known]
        for i in range(0, len(missing), AT_ONCE):
            some = missing[i : i + AT_ONCE]
            rows_now = np.stack([asked[name] for name in some])
            found, microseconds = self._train(contestant, rows_now, seeds)
            for j, name in enumerate(some):
                one = {key: _listed(value, j) for key, value in vars(found).items()}
                known[name] = one | {"microseconds": microseconds}
            if path is not None:
                about = self._about | {"method": contestant.name, "results": known}
                files.write_json(path, about, sealed=True)
        return [_trial(known[name]) for name in names]

    def choose(self, contestant: Contestant, budget: int) -> dict[str, tuple[Row, bool, int]]:
        """Returns, by objective, the best hyperparameters, whether at an edge, of how many.

        The whole of a grid of rates is widened while the best is at an edge.
        """
        grid, widens = contestant.grid[:budget], contestant.widens and budget > 1
        widens = widens and budget == len(contestant.grid)
        while True:
            tried = self.results(contestant, grid, "validation")
            scores = {
                "train": [metrics.score(one.train[:, 1]) for one in tried],
                "held_out": [metrics.score(one.choice) for one in tried],
            }
            best = {name: int(np.argmin(some)) for name, some in scores.items()}
            rates, more = grid[:, 0], []
            edges = {rates.min(): 10**-0.5, rates.max(): 10**0.5} if widens else {}
            for name, place in best.items():
                if np.isfinite(scores[name][place]) and rates[place] in edges:
                    further = rates[place] * edges[rates[place]] ** np.arange(1, 3)
                    more += [rate for rate in further if rate not in more]
            if not more or len(grid) >= budget + WIDEN_BY:
                return {name: (grid[i], rates[i] in edges, len(grid)) for name, i in best.items()}
            fixed = grid[0, 1:]
            grid = np.concatenate([grid, [np.array([rate, *fixed]) for rate in more]])

    def entries(self, contestant: Contestant) -> list[Entry]:
        """Returns the optimizer at each of its numbers of trials, on fresh seeds."""
        self.results(contestant, contestant.grid, "validation")  # of all budgets, side by side
        choices = [self.choose(contestant, budget) for budget in contestant.budgets]
        rows = [chosen[name][0] for chosen in choices for name in OBJECTIVES]
        found = iter(self.results(contestant, np.stack(rows), "report"))
        known, bytes_per_param = self._load(contestant)[0], self._state_bytes(contestant)
        microseconds = float(np.median([one["microseconds"] for one in known.values()]))
        return [
            Entry(
                contestant,
                budget,
                chosen["train"][2],
                {name: chosen[name][0] for name in OBJECTIVES},
                any(edge for _, edge, _ in chosen.values()),
                {name: next(found) for name in OBJECTIVES},
                microseconds,
                bytes_per_param,
            )
            for budget, chosen in zip(contestant.budgets, choices, strict=True)
        ]

    def scale(self) -> metrics.Scale:
        """Returns the scale of losses: from Adam at its grid of rates and at random settings.

        It is written beside the results, for other programs to read.
        """
        adam, random = CONTESTANTS["Adam"], random_adam()
        rates = self.results(adam, adam.grid, "validation")
        drawn_ones = self.results(random, random.grid, "validation")
        scale = metrics.Scale.of(rates, drawn_ones, self.evaluation.horizon)
        about = {key: value for key, value in self._about.items() if key != "format"}
        path = self._path(about, "scale", None)
        if not path.exists():
            made = f"Adam at {len(rates)} rates and {len(drawn_ones)} random settings, {SEEDS[0]}"
            content = dataclasses.asdict(scale) | {"made_from": made, **about}
            files.write_json(path, json.loads(json.dumps(content, default=np.ndarray.tolist)))
        return scale

    def _path(self, about: dict[str, Any], method: str, folder: Path | None) -> Path:
        text = json.dumps(about | {"method": method}, sort_keys=True)
        name = re.sub(r"\W+", "_", f"{self.evaluation.name} {method}").strip("_")
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return (folder or cache_folder() / "evaluations") / f"{name[:60]}_{digest}.json"

    def _load(self, contestant: Contestant) -> tuple[dict[str, Any], Path | None]:
        """Returns what is known of an optimizer, and where that is kept."""
        if contestant.identity is None:
            return self._known.setdefault(contestant.name, {}), None
        about = self._about | {"identity": contestant.identity}
        path = self._path(about, contestant.name, contestant.folder)
        if str(path) not in self._known:
            self._known[str(path)] = {}
            with contextlib.suppress(FileNotFoundError, ValueError):  # what is damaged is trained
                self._known[str(path)] = files.read_json(path, sealed=True)["results"]
        return self._known[str(path)], path

    def compile(self, contestants: Sequence[Contestant]) -> None:
        """Compiles, two at a time, what is needed for optimizers of which nothing is known."""
        new = {id(one.factory): one for one in contestants if not self._load(one)[0]}
        for one in new.values():
            self._program(one).trace(jnp.asarray(one.grid.astype(self._dtype)))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: self._program(one).compile(), new.values()))

    def _program(self, contestant: Contestant) -> OverDevices:
        horizon, params_of = self.evaluation.horizon, contestant.params_of

        def one(shared: Any, values: Any) -> Trial:
            task, factory, keys = shared
            return trial(task, factory(values, horizon), keys, horizon, params_of)

        if id(contestant.factory) not in self._programs:
            shared = self.evaluation.task, contestant.factory, self._keys[SEEDS[0]]
            self._programs[id(contestant.factory)] = OverDevices(one, shared, AT_ONCE)
        return self._programs[id(contestant.factory)]

    def _train(self, contestant: Contestant, rows: Grid, seeds: str) -> tuple[Any, float]:
        program = self._program(contestant)
        program.share((self.evaluation.task, contestant.factory, self._keys[seeds]))
        found = program(jnp.asarray(rows.astype(self._dtype)))
        runs = self.evaluation.horizon * program.batch * self.evaluation.num_seeds
        return found, float(f"{1e6 * program.seconds / runs:.4g}")

    def _state_bytes(self, contestant: Contestant) -> float:
        def size(tree: Any) -> int:
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

        def made(key: Any, values: Any) -> Any:
            params = drawn(self.evaluation.task, key).init(key)
            optimizer = contestant.factory(values, self.evaluation.horizon)
            return params, optimizer.init(params)

        row = jnp.asarray(contestant.grid[0].astype(self._dtype))
        params, state = jax.eval_shape(made, jax.random.key(0), row)
        return size(state) / sum(leaf.size for leaf in jax.tree.leaves(params))


def fingerprint(tree: Any) -> str:
    """Returns the SHA-256 of what a task or an optimizer is, all numbers of its arrays included."""
    found = hashlib.sha256(printed(tree).encode())
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array | np.ndarray):
            found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _listed(value: Any, place: int) -> Any:
    """Returns the numbers at a place of an axis, to seven digits, which are what a float has."""
    if isinstance(value, dict):
        return {name: _listed(one, place) for name, one in value.items()}
    found = np.asarray(value, float)[place]
    rounded = [float(f"{x:.7g}") if np.isfinite(x) else None for x in found.ravel()]
    return np.reshape(np.array(rounded, object), found.shape).tolist()


def _trial(content: dict[str, Any]) -> Trial:
    def numbers(value: Any) -> Any:
        return np.array(value, float)

    fields = {key: numbers(value) for key, value in content.items() if isinstance(value, list)}
    named = {name: numbers(value) for name, value in content["metrics"].items()}
    return Trial(**fields, metrics=named)
