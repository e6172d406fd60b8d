"""Workers that are actors of Ray: on one machine or many, which may join, leave and fail."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from lopt.core.types import Theta
from lopt.estimators import Mean
from lopt.experiment.report import tell
from lopt.experiment.runs.environment import one_core
from lopt.experiment.runs.files import write_bytes
from lopt.experiment.runs.run import Run, surroundings
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
# Of JAX, what numbers depend on.
CONFIG = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


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
        given = content, versions(), {name: jax.config.values[name] for name in CONFIG}
        self._ray = ray
        self.workers = [_Remote(ray, part, actor.remote(given, part.rows)) for part in parts]

    @override
    def share(self, theta: Theta) -> Any:
        leaves = to_host(theta)
        small = sum(leaf.nbytes for leaf in leaves) < SMALL
        return leaves if small else self._ray.put(leaves)

    @override
    def fetch(self, snapshot: Any) -> Any:
        if not isinstance(snapshot, self._ray.ObjectRef):
            return snapshot
        try:
            return self._ray.get(snapshot)
        except self._ray.exceptions.ObjectLostError:  # with its machine
            return None


class _Remote(AbstractWorker):
    """A worker that is an actor; its snapshots stay where they were made."""

    def __init__(self, ray: Any, part: Mean, actor: Any) -> None:
        super().__init__(part)
        self._ray, self._actor, self._next = ray, actor, None
        self._windows = 0

    @override
    def ask(self, theta: Any, key: np.ndarray) -> Any:
        # In a list, so that it is not sent unless it is needed.
        call = self._actor.window.options(num_returns=2)
        answer, self._next = call.remote(theta, key, self._windows, [self.snapshot])
        return answer.future()

    @override
    def received(self, future: Any) -> tuple[Answer, Any] | None:
        failures = self._ray.exceptions
        try:
            answer = future.result()
        except (failures.ActorUnavailableError, failures.WorkerCrashedError):
            return None
        except failures.RayError as error:
            cause = getattr(error, "cause", None) or error
            lines = f"{cause}".strip().splitlines()
            raise RuntimeError(f"a worker failed: {lines[-1] if lines else cause!r}") from error
        self._windows += 1
        return answer, self._next


class _Actor:
    """Particles of a run, in a process of their own."""

    def __init__(self, given: Any, rows: tuple[int, int]) -> None:
        one_core()
        content, expected, config = given
        for name, value in config.items():
            jax.config.update(name, value)
        if (found := versions()) != expected:
            raise ValueError(f"this machine has {found}, and the driver {expected}")
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
        self, theta: Any, key: np.ndarray, windows: int, snapshot: list[Any]
    ) -> tuple[Any, Any]:
        """Returns an estimate with its count, and a snapshot, after so many answered windows."""
        if windows != self._done:
            self._state = self._restored(from_host(theta, self._theta), snapshot[0])
        own = jax.random.wrap_key_data(jnp.asarray(key))
        theta = from_host(theta, self._theta)
        estimate, count, self._state = window(self._part, theta, self._state, own)
        self._done = windows + 1
        return answer_of(estimate, count), to_host(self._state)

    def _restored(self, theta: Any, snapshot: Any) -> Any:
        import ray

        if isinstance(snapshot, ray.ObjectRef):
            try:
                snapshot = ray.get(snapshot)
            except ray.exceptions.ObjectLostError:  # with its machine: new particles
                snapshot = None
        if snapshot is None:
            return prepare(self._part, theta, self._key)
        return from_host(snapshot, self._like)


def versions() -> dict[str, str]:
    """Returns the versions that workers must have in common."""
    return {name: value for name, value in surroundings().items() if name != "devices"}
