"""Clusters of Ray, and tasks in processes of their own there."""

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import jax

from lopt.experiment.runs.environment import asked_to_stop, one_core
from lopt.experiment.runs.run import surroundings

MAJOR = "2"
# How often a task whose process died is started again.
RETRIES = 3
# On a machine of its own Ray listens on loopback only, as it does elsewhere than on Linux, and
# reports to nobody. Its processes read this, and it does when it is imported.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# Of JAX, what numbers depend on.
CONFIG = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


@contextlib.contextmanager
def connected(workers: int, address: str | None) -> Iterator[Any]:
    """Yields Ray, connected to a cluster, or to one of this machine that ends with this.

    Without an address nothing listens on other than the loopback interface.

    Raises:
        ImportError: without Ray, or with one of another major version.
        ConnectionError: if there is no such cluster, or it has another version.
    """
    if address is None:
        os.environ.update(ALONE)
    # A driver that takes a whole GPU at once would leave none to a worker there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    installed = importlib.util.find_spec("ray") and version("ray")
    if not installed or installed.partition(".")[0] != MAJOR:
        raise ImportError(
            f"--workers needs Ray {MAJOR}, not {installed}; try: pip install 'lopt[ray]'"
        )
    import ray

    options: dict[str, Any] = {"address": address or "local"}
    if not address:
        options |= {"num_cpus": workers, "include_dashboard": False}
        options["_node_ip_address"] = "127.0.0.1"
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # if it was imported before
    # Ray's own handler would end this process before there is a checkpoint.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # JAX warns of forks; those of Ray become other programs at once.
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            _check_answers(address or "")
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit:  # of that handler
        raise KeyboardInterrupt(signal.SIGTERM) from None
    except Exception as error:  # of any kind: versions, addresses, tokens
        said, where = " ".join(f"{error}".split())[:300], f"--ray {address}" if address else "Ray"
        raise ConnectionError(
            f"{where} cannot be reached as a cluster of Ray {ray.__version__} ({said}); check that "
            "it runs there. If it asks for a token, as after `ray start` where there is one, set "
            "RAY_AUTH_MODE=token."
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuses an address where no Ray answers, for which it would wait for ever.

    By what `ray health-check` uses.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=20).close()
        if "://" not in address:
            from ray._raylet import GcsClient  # type: ignore[attr-defined]

            GcsClient(address=address)


def here() -> dict[str, Any]:
    """Returns what workers must have in common with this process: versions, and of JAX's config."""
    config = {name: jax.config.values[name] for name in CONFIG}
    return surroundings() | config | {"devices": "any"}


def be_like(there: dict[str, Any]) -> None:
    """Sets up JAX for a worker on one core, as it is `here` in the driver; refuses versions."""
    one_core()
    for name in CONFIG:
        jax.config.update(name, there[name])
    if (found := here()) != there:
        raise ValueError(f"this machine has {found}, and the driver {there}")


def map_on_workers(
    function: Callable[[Any, Any], Any], items: Sequence[Any], workers: int, address: str | None
) -> Iterator[Any]:
    """Yields `function(item, here())` of each item as it is done, so many at a time.

    Each is computed by a new process on a core, on this machine or on the cluster at an address.
    """
    if not items:
        return
    with connected(workers, address) as ray, asked_to_stop() as stop:
        task = ray.remote(num_cpus=1, max_calls=1, max_retries=RETRIES)(function)
        waiting, there = list(items), here()
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(waiting.pop(0), there))
            # Ray, which would wait for them, loses the number of the signal.
            some, running = ray.wait(running, timeout=1.0)
            if number := stop():
                raise KeyboardInterrupt(number)
            if not some:
                continue
            (done,) = some
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # without the worker's traceback
            yield result
