"""Runs of one recipe from several seeds: side by side in one program, and one report on all."""

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from lopt.core.devices import device_mesh, replicate, spread
from lopt.core.types import Record
from lopt.core.unroll import TrainState, start, unroll
from lopt.experiment.runs import files, train
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.registry import parsed, seed_of
from lopt.experiment.runs.run import SEEDS, Run, holds_run
from lopt.experiment.runs.workers import to_host

# What the system and cgroups, of version 2 and 1, say of memory: limit and use.
ROOT = Path("/")
GROUPS = {"": ("memory.max", "memory.current")}
GROUPS["memory"] = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def create(
    folder: Path, recipe: str, settings: Sequence[str], loggers: Sequence[str], count: int
) -> list[Run]:
    """Makes the runs of so many seeds, from that of the recipe on, in folders of their own."""
    first = seed_of(recipe, parsed(settings), count)
    others = [text for text in settings if not text.startswith("seed=")]
    source = str(Path(recipe).resolve()) if Path(recipe).suffix == ".py" else recipe
    about = {"recipe": source, "settings": others, "loggers": [*loggers]}
    if holds_run(folder):
        raise FileExistsError(f"{folder} already holds a run; give another folder with --run.")
    run = Run.create(folder / f"seed-{first}", recipe, [*others, f"seed={first}"], loggers)
    about["seeds"] = [*range(first, first + count)]
    files.write_json(folder / SEEDS, about, new=True, sealed=True)
    return [run, *open_all(folder)[1:]]


def open_all(folder: Path, trust: bool = False) -> list[Run]:
    """Returns the runs of a folder; those that are not there yet are made."""
    about = files.read_json(folder / SEEDS, sealed=True)
    runs = []
    for seed in about["seeds"]:
        place = folder / f"seed-{seed}"
        if holds_run(place):
            runs.append(Run(place, trust=trust))
        else:
            # Of the code that the first began with.
            recipe = runs[0].trust_recipe() if runs else about["recipe"]
            words = [*about["settings"], f"seed={seed}"]
            runs.append(Run.create(place, recipe, words, about["loggers"]))
    return runs


def train_seeds(runs: Sequence[Run], stop: Callable[[], int] = lambda: 0) -> None:
    """Meta-trains runs that differ in their seeds, as many side by side as memory allows."""
    experiments = [run.experiment for run in runs]
    (text, arrays), *others = map(train.program, experiments)
    alike = all(text == own and equal(arrays, enclosed) for own, enclosed in others)
    waiting, at_once = [*runs], len(runs) if alike else 1
    while waiting:
        some = waiting[:at_once]
        engine = SideBySide([run.experiment for run in some])
        if len(some) > 1 and engine.memory > free_memory():
            at_once = -(-len(some) // 2)
            continue
        train.train_together(some, engine, stop=stop)
        del waiting[:at_once]


def free_memory() -> float:
    """Returns the bytes that the first device has left; of a CPU, within its cgroups."""
    if found := jax.local_devices()[0].memory_stats():
        return found["bytes_limit"] - found["bytes_in_use"]

    def number(path: Path, name: str = "") -> float:
        return float(re.findall(rf"\b{name}:? *(\d+)", path.read_text())[0])

    left = [float("inf")]
    with contextlib.suppress(OSError, IndexError):
        left.append(1024 * number(ROOT / "proc/meminfo", "MemAvailable"))
    with contextlib.suppress(OSError):
        groups = (ROOT / "proc/self/cgroup").read_text()
        for kind, path in re.findall(r"^\d+:(memory|):/(.*)", groups, re.MULTILINE):
            place = ROOT / "sys/fs/cgroup" / kind / path
            for group in (place, *place.parents):
                with contextlib.suppress(OSError, IndexError):  # not there, or "max"
                    limit, used = (number(group / name) for name in GROUPS[kind])
                    left.append(limit - used + number(group / "memory.stat", "inactive_file"))
    return min(left)


class SideBySide(train.AbstractEngine):
    """Outer steps of runs that differ in their seeds, as one program mapped over them.

    They are spread over the devices that they divide among. What is equal in their estimators, such
    as data, is there once.
    """

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self._experiments, first = experiments, experiments[0]
        self._optimizer, self._log = train.guarded(first), train.StepLog(first.record)
        metas = [eqx.filter(one.meta, eqx.is_array) for one in experiments]
        self._static = eqx.filter(first.meta, eqx.is_array, inverse=True)
        count, devices = len(experiments), len(jax.local_devices())
        self._mesh = device_mesh(max(d for d in range(1, devices + 1) if count % d == 0))
        columns = [*zip(*map(jax.tree.leaves, metas), strict=True)]
        shared = [all(equal([leaf], [some[0]]) for leaf in some) for some in columns]
        put = [
            replicate(some[0], self._mesh) if same else spread(jnp.stack(some), self._mesh)
            for some, same in zip(columns, shared, strict=True)
        ]
        unflatten = functools.partial(jax.tree.unflatten, jax.tree.structure(metas[0]))
        self._meta = unflatten(put)
        self._axes = unflatten([None if same else 0 for same in shared])
        self._compiled: dict[int, Any] = {}

    @property
    def memory(self) -> float:
        """Bytes that a chunk of outer steps takes of a memory, as XLA says; 0 if it does not."""
        steps = min(self._experiments[0].steps_per_chunk, self._experiments[0].outer_steps)
        found = self._program(self.begin(), steps).memory_analysis()
        parts = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
        # CPU devices share the memory of the machine.
        sharing = self._mesh.size if jax.default_backend() == "cpu" else 1
        return float(sharing * sum(getattr(found, part, 0) for part in parts))

    @override
    def begin(self) -> TrainState:
        every = self._experiments
        return self._stacked([start(e.meta, self._optimizer, *train.beginning(e)) for e in every])

    @override
    def restore(self, begun: TrainState, states: list[TrainState]) -> TrainState:
        return self._stacked(states)

    def _stacked(self, states: list[TrainState]) -> TrainState:
        return spread(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), self._mesh)

    @override
    def advance(self, state: TrainState, num_steps: int) -> tuple[TrainState, Record]:
        state, record = self._program(state, num_steps)(self._meta, state)
        return spread(state, self._mesh), record

    @override
    def states(self, state: TrainState) -> list[TrainState]:
        count = len(self._experiments)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(count)]

    @override
    def records(self, record: Record) -> list[Record]:
        return [{k: v[i] for k, v in record.items()} for i in range(len(self._experiments))]

    def _program(self, state: TrainState, num_steps: int) -> Any:
        if num_steps not in self._compiled:

            def one(arrays: Any, state: TrainState) -> tuple[TrainState, Record]:
                meta = eqx.combine(arrays, self._static)
                return unroll(meta, self._optimizer, state, num_steps, record=self._log)

            mapped = jax.jit(jax.vmap(one, (self._axes, 0)))
            self._compiled[num_steps] = mapped.lower(self._meta, state).compile()
        return self._compiled[num_steps]


def equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Returns whether arrays, which may be keys, are as many and equal."""
    pairs = [*zip(to_host([*some]), to_host([*others]), strict=False)]
    return len(some) == len(others) and all(np.array_equal(*pair) for pair in pairs)
