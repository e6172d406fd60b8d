"""Workers that are actors of Ray: on one machine or many, which may join, leave and fail."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load, save
from typing_extensions import override

from lopt.core.types import Theta
from lopt.estimators import Mean
from lopt.experiment.report import tell
from lopt.experiment.runs.cluster import be_like, here
from lopt.experiment.runs.files import write_bytes
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import beginning
from lopt.experiment.runs.workers import (
    AbstractFleet,
    AbstractWorker,
    Answer,
    answer_of,
    from_host,
    mean_of,
    prepare,
    split,
    to_host,
    window,
)

# Bytes that are sent with a call sooner than they are put where it finds them.
SMALL = 50_000


class RayFleet(AbstractFleet):
    """Actors of Ray, each with particles of a run; started again where there is room."""

    def __init__(self, ray: Any, run: Run, workers: int) -> None:
        parts = split(mean_of(run.experiment), workers)
        # What a run consists of: also the weights that its settings name.
        own = ("run", "recipe", *run.config["settings"])
        content = {p.name: p.read_bytes() for p in run.folder.glob("*.*") if p.stem in own}
        if (cores := ray.cluster_resources().get("CPU", 0)) < workers:
            tell(f"Ray has {cores:.0f} cores for {workers} workers now; it waits for others.")
        gpus = ray.cluster_resources().get("GPU", 0) >= workers
        options = {"max_restarts": -1, "num_cpus": 1, "num_gpus": int(gpus)}
        actor = ray.remote(**options)(_Actor)
        given = content, here()
        self.workers = [_Remote(ray, part, actor.remote(*given, part.rows)) for part in parts]
        self._ray = ray

    @override
    def share(self, theta: Theta) -> Any:
        leaves = to_host(theta)
        small = sum(leaf.nbytes for leaf in leaves) < SMALL
        return leaves if small else self._ray.put(leaves)


class _Remote(AbstractWorker):
    """A worker that is an actor; its snapshots stay where they were made."""

    def __init__(self, ray: Any, part: Mean, actor: Any) -> None:
        super().__init__(part)
        self._ray, self._actor, self._next = ray, actor, None
        self._windows, self._kept = 0, None

    @override
    def ask(self, theta: Any, key: np.ndarray) -> Any:
        if isinstance(self.snapshot, list):  # of a checkpoint
            self.snapshot = self._kept = self._ray.put(self.snapshot)
        # In a list, so that they are not sent unless they are needed.
        call, snapshots = self._actor.window.options(num_returns=2), [self.snapshot, self._kept]
        answer, self._next = call.remote(theta, key, self._windows, snapshots)
        return answer.future()

    @override
    def fetched(self) -> Any:
        found = _fetched(self._ray, self.snapshot)
        if found is not None:
            self._kept = self._ray.put(found)  # here, should its machine be lost
        return found

    @override
    def received(self, future: Any) -> tuple[Answer, Any] | None:
        failures = self._ray.exceptions
        lost = failures.ActorUnavailableError, failures.WorkerCrashedError, failures.ObjectLostError
        try:
            answer = future.result()
        except lost:  # a large answer may be, with its machine
            return None
        except failures.RayError as error:
            cause = getattr(error, "cause", None) or error
            lines = f"{cause}".strip().splitlines()
            raise RuntimeError(f"a worker failed: {lines[-1] if lines else cause!r}") from error
        self._windows += 1
        return answer, self._next


class _Actor:
    """Particles of a run, in a process of their own."""

    def __init__(self, content: Any, there: Any, rows: tuple[int, int]) -> None:
        be_like(there)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in content.items():
                write_bytes(Path(folder) / name, text)
            run = Run(folder, trust=True)
            run.check_unchanged()
        self._part = dataclasses.replace(mean_of(run.experiment), rows=rows)
        self._theta, self._key = beginning(run.experiment)
        self._like = eqx.filter_eval_shape(prepare, self._part, self._theta, self._key)
        self._done, self._state = -1, None

    def window(
        self, theta: Any, key: Any, windows: int, snapshots: list[Any]
    ) -> tuple[Answer, Any]:
        """Returns an answer, and a snapshot, after so many answered windows."""
        theta, key = from_host(theta, self._theta), jax.random.wrap_key_data(jnp.asarray(key))
        if windows != self._done:
            self._state = self._restored(theta, snapshots)
        estimate, count, self._state = window(self._part, theta, self._state, key)
        self._done = windows + 1
        # One array, which Ray stores in a third of the time that it takes for thirty.
        packed = save({f"{i}": leaf for i, leaf in enumerate(to_host(self._state))})
        return answer_of(estimate, count), np.frombuffer(packed, np.uint8)

    def _restored(self, theta: Any, snapshots: list[Any]) -> Any:
        import ray

        for snapshot in snapshots:
            if (found := _fetched(ray, snapshot)) is not None:
                return from_host(found, self._like)
        return prepare(self._part, theta, self._key)  # before the first window


def _fetched(ray: Any, snapshot: Any) -> Any:
    """Returns what a snapshot stands for; None if it is lost with its machine."""
    if not isinstance(snapshot, ray.ObjectRef):
        return snapshot
    try:
        found = ray.get(snapshot)
    except ray.exceptions.ObjectLostError:
        return None
    if isinstance(found, list):  # of the last checkpoint
        return found
    leaves = load(found.tobytes())
    return [leaves[f"{i}"] for i in range(len(leaves))]
