"""Fleets of workers: threads of this process, and actors of Ray, on one machine or many.

Threads compile their architectures apart; actors may join, leave and fail.
"""

import dataclasses
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load, save
from typing_extensions import override

from lopt.core.types import Key, State, Theta
from lopt.estimators import Mean
from lopt.estimators.mean import step_cost
from lopt.experiment.report import tell
from lopt.experiment.runs import workers
from lopt.experiment.runs.cluster import be_like, here
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.files import write_bytes
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import beginning

# Bytes that are sent with a call sooner than they are put where it finds them.
SMALL = 50_000


class Here(workers.AbstractFleet):
    """Workers of this process, each with one architecture.

    Each is compiled once, in the background; steps are taken with those that are ready. Every
    device has a thread, in which its workers do one window after another.
    """

    def __init__(self, experiment: Experiment) -> None:
        mean, devices = workers.mean_of(experiment), jax.local_devices()
        rows = [(rows.start, rows.stop) for _, rows in mean.shares()]
        parts = [dataclasses.replace(mean, rows=each) for each in rows]
        threads = [ThreadPoolExecutor(1, f"{device}") for device in devices]
        # As many at a time as there are devices, or else those that run take the cores.
        self._compiler = ThreadPoolExecutor(len(devices), "compiler")
        begun, loads = beginning(experiment), [0.0] * len(devices)
        self.workers = self._threads = list[_Thread]()
        # The cheapest first: their steps do not wait for the others' compilation.
        costs = [sum(step_cost(one) for one, _ in part.shares()) for part in parts]
        for i in np.argsort(costs):
            at = int(np.argmin(loads))
            loads[at] += costs[i] * (parts[i].rows[1] - parts[i].rows[0])
            self._threads.append(_Thread(parts[i], devices[at], threads[at], self._compiler, begun))

    def close(self) -> None:
        """Compiles nothing any more but what is begun."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    @override
    def waiting(self) -> list["Future[Any]"]:
        return [one.made for one in self._threads if not one.ready]


class _Thread(workers.AbstractWorker):
    """A worker that is a thread of this process with a device."""

    def __init__(
        self, part: Mean, device: Any, thread: Any, compiler: ThreadPoolExecutor, begun: Any
    ) -> None:
        super().__init__(part)
        self._device, self._thread = device, thread
        self._state: State = None
        self.made = compiler.submit(self._make, *begun)

    def _make(self, theta: Theta, key: Key) -> Any:
        with jax.default_device(self._device):
            arrays, static = eqx.partition(self.part, eqx.is_array)
            self._own = eqx.combine(jax.device_put(arrays, self._device), static)
            self._begun = workers.prepare(self._own, theta, key)
            theta, key = jax.device_put((theta, key), self._device)
            lower: Any = workers.window  # which Equinox's type does not say
            return lower.lower(self._own, theta, self._begun, key).compile()

    @property
    @override
    def ready(self) -> bool:
        return self.made.done()

    @override
    def ask(self, theta: Theta, key: np.ndarray) -> "Future[Any]":
        return self._thread.submit(self._window, theta, key)

    def _window(self, theta: Theta, key: np.ndarray) -> tuple[workers.Answer, Any]:
        run = self.made.result()
        with jax.default_device(self._device):
            if self._state is None:
                old = self.snapshot
                self._state = self._begun if old is None else workers.from_host(old, self._begun)
            own = jax.device_put((theta, jax.random.wrap_key_data(jnp.asarray(key))), self._device)
            found = run(self._own, own[0], self._state, own[1])
            estimate, count, self._state = jax.block_until_ready(found)
            return workers.answer_of(estimate, count), workers.to_host(self._state)

    @override
    def received(self, future: "Future[Any]") -> tuple[workers.Answer, Any] | None:
        return future.result()


class RayFleet(workers.AbstractFleet):
    """Actors of Ray, each with particles of a run; started again where there is room."""

    def __init__(self, ray: Any, run: Run, count: int) -> None:
        parts = workers.split(workers.mean_of(run.experiment), count)
        # What a run consists of: also the weights that its settings name.
        own = ("run", "recipe", *run.config["settings"])
        content = {p.name: p.read_bytes() for p in run.folder.glob("*.*") if p.stem in own}
        if (cores := ray.cluster_resources().get("CPU", 0)) < count:
            tell(f"Ray has {cores:.0f} cores for {count} workers now; it waits for others.")
        gpus = ray.cluster_resources().get("GPU", 0) >= count
        options = {"max_restarts": -1, "num_cpus": 1, "num_gpus": int(gpus)}
        actor = ray.remote(**options)(_Actor)
        given = content, here()
        self.workers = [_Remote(ray, part, actor.remote(*given, part.rows)) for part in parts]
        self._ray = ray

    @override
    def share(self, theta: Theta) -> Any:
        leaves = workers.to_host(theta)
        small = sum(leaf.nbytes for leaf in leaves) < SMALL
        return leaves if small else self._ray.put(leaves)


class _Remote(workers.AbstractWorker):
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
    def received(self, future: Any) -> tuple[workers.Answer, Any] | None:
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
        self._part = dataclasses.replace(workers.mean_of(run.experiment), rows=rows)
        self._theta, self._key = beginning(run.experiment)
        self._like = eqx.filter_eval_shape(workers.prepare, self._part, self._theta, self._key)
        self._done, self._state = -1, None

    def window(
        self, theta: Any, key: Any, windows: int, snapshots: list[Any]
    ) -> tuple[workers.Answer, Any]:
        """Returns an answer, and a snapshot, after so many answered windows."""
        theta, key = (
            workers.from_host(theta, self._theta),
            jax.random.wrap_key_data(jnp.asarray(key)),
        )
        if windows != self._done:
            self._state = self._restored(theta, snapshots)
        estimate, count, self._state = workers.window(self._part, theta, self._state, key)
        self._done = windows + 1
        # One array, which Ray stores in a third of the time that it takes for thirty.
        packed = save({f"{i}": leaf for i, leaf in enumerate(workers.to_host(self._state))})
        return workers.answer_of(estimate, count), np.frombuffer(packed, np.uint8)

    def _restored(self, theta: Any, snapshots: list[Any]) -> Any:
        import ray

        for snapshot in snapshots:
            if (found := _fetched(ray, snapshot)) is not None:
                return workers.from_host(found, self._like)
        return workers.prepare(self._part, theta, self._key)  # before the first window


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
