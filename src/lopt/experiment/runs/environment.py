"""How commands set up JAX, where lopt keeps files between runs, and how long jobs are stopped."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

# How long a job that is asked to end may take to; and one that is to write a checkpoint first,
# within the 30 seconds that Slurm and Kubernetes give.
GRACE, PATIENCE = 4.0, 25.0


def cache_folder() -> Path:
    """Returns `$LOPT_CACHE_DIR`, or lopt's folder among the user's caches."""
    if configured := os.environ.get("LOPT_CACHE_DIR"):
        return Path(configured)
    import pooch

    return Path(pooch.os_cache("lopt"))


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs, in `$JAX_COMPILATION_CACHE_DIR` if that is set."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def use_all_cores() -> None:
    """Makes every core that this process may use a device, as far as JAX has not begun yet.

    XLA computes small products on one core; particles spread over devices keep all of them busy.
    """
    import jax

    if jax.config.values["jax_num_cpu_devices"] == -1 and hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(RuntimeError):  # JAX has begun
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def release_memory() -> None:
    """Returns what compilation left behind, ten times what a small program needs, to the system."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not with glibc
        ctypes.CDLL(None).malloc_trim(0)


def prepare_jax() -> None:
    """Sets up JAX for a command."""
    # A program that asks for a GPU it does not have should say so itself, not through a warning.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    use_compilation_cache()
    use_all_cores()


def one_core() -> None:
    """Sets up JAX for one of several processes, as many as there are cores."""
    os.environ["NPROC"] = "1"  # the threads of XLA
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    prepare_jax()


@contextlib.contextmanager
def stoppable(remedy: str, patience: float = GRACE) -> Iterator[None]:
    """Ends a job within seconds at Ctrl-C, SIGTERM or SIGHUP, and says how to go on.

    Python's handlers wait for compiled programs and compilers; after a while, of `patience` for the
    last two, a thread, which does not, ends the process: what is on disk is whole at any moment.
    So it does if threads, which compile, are not done when the process is to end.
    """

    def tell() -> None:
        if not told.is_set():
            Console().print(Text(f"Stopped. {remedy}"), soft_wrap=True)
        told.set()

    def watch() -> None:
        numbers = os.read(reader, 1)
        if numbers and not ended.wait(GRACE if numbers[0] == signal.SIGINT else patience):
            tell()
            os._exit(128 + numbers[0])
        os.close(reader)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended, told = threading.Event(), threading.Event()
    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    except KeyboardInterrupt as stop:
        tell()
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except BaseException:
        ended.set()
        raise
    else:
        ended.set()
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """Yields what returns the number of the SIGTERM or SIGHUP that came, or 0; a second one ends.

    For loops that have something to finish first.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
