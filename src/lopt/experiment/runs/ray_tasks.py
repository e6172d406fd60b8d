"""Tasks in processes of their own, by Ray: it schedules them, and starts again those that die."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# How often a task whose process died is started again.
RETRIES = 3
# On a machine of its own Ray listens on loopback only, asks for no token, and reports to nobody.
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def map_on_workers(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, ray_address: str | None
) -> Iterator[Any]:
    """Yields `function(item)` of each item as it is done, so many at a time.

    Each is computed by a new process, on this machine or on the cluster at an address.
    """
    if not items:
        return
    if ray_address is None:
        os.environ.update(ALONE)  # which Ray reads when it is imported
    try:
        import ray
    except ImportError as error:
        raise ImportError("--workers needs Ray; pip install 'lopt[ray]'.") from error
    # The address again, as Ray may have been imported before.
    alone = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    where: dict[str, Any] = alone if ray_address is None else {"address": ray_address}
    with warnings.catch_warnings():
        # JAX warns of forks; those of Ray become other programs at once.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        ray.init(**where, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    try:
        task = ray.remote(num_cpus=1, max_calls=1, max_retries=RETRIES)(function)
        waiting = list(items)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(waiting.pop(0)))
            (done,), running = ray.wait(running)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # without the worker's traceback
            yield result
    finally:
        ray.shutdown()
