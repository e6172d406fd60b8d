"""Workers that are threads of this process, each with an architecture that is compiled apart."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from lopt.core.types import Key, State, Theta
from lopt.estimators import Mean
from lopt.estimators.mean import step_cost
from lopt.experiment.runs import workers
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.train import beginning


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
            made = _Thread(parts[i], devices[at], threads[at], self._compiler, begun)
            self._threads.append(made)

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
