"""Processes that train one run together: joining, agreeing, and noticing that one is lost.

The engine is JAX's own. A process alone agrees with itself, so that nobody has to ask how many.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds until one that cannot be reached, or is lost, is given up.
REACH, LOST = 40, 20
LOCAL = "127.0.0.1", "localhost", "[::1]"
# Characters that a process tells the others.
LONGEST = 4000
_T = TypeVar("_T")


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Joins this process to others; what is not given is JAX's to find out: Slurm, Open MPI, ...

    A lost process ends the others. After an error nobody is waited for.

    Raises:
        ValueError: if JAX cannot find out what is not given.
        ConnectionError: if the coordinator, or a process, is not there in time, or is lost.
    """
    local = coordinator is not None and coordinator.rpartition(":")[0] in LOCAL
    # Two devices of a CPU in each of several processes can wait for one another without end.
    jax.config.update("jax_num_cpu_devices", 1)
    # It would take SIGTERM away from the commands, which stop together by themselves.
    jax.config.update("jax_enable_preemption_service", False)
    apart = (
        f"The processes of this run did not meet within {REACH} seconds; check that --coordinator "
        "is the address of process 0, with a port that is free there, and that all --processes are "
        "there."
    )
    try:
        here = _listening_here() if local else contextlib.nullcontext()
        with _last_words(apart), here, _without_traces():
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=REACH,
                heartbeat_timeout_seconds=LOST,
                shutdown_timeout_seconds=LOST,
                coordinator_bind_address=coordinator if local else None,
            )
            jax.devices()  # waits for the devices of all
    except jax.errors.JaxRuntimeError as error:
        _leave_at_once()
        raise ConnectionError(apart) from error
    except ValueError as error:
        raise ValueError(
            f"--distributed cannot tell how many processes there are ({error}); give --coordinator "
            "HOST:PORT --processes N --process I."
        ) from error
    try:
        with _last_words(_lost("or this one was killed")):
            yield
    except (KeyboardInterrupt, SystemExit):
        raise  # all of them stop
    except BaseException as error:
        _leave_at_once()
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in f"{error}":
            raise ConnectionError(_lost(f"{error}".partition("\n")[0][:200])) from error
        raise


def leave() -> None:
    """Ends being joined, together with the others."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def tell_each_other(text: str) -> list[str]:
    """Returns what every process says here, by process; all wait for all."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text[:LONGEST].encode().ljust(4 * LONGEST, b"\0"), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(said)).astype(np.uint8)
    return [row.tobytes().rstrip(b"\0").decode() for row in every]


def together(function: Callable[[], _T]) -> _T:
    """Returns what a function does; an error in one process is one in all, the same.

    Raises:
        ValueError: in processes where nothing was wrong.
    """
    try:
        result = function()
    except Exception as error:
        tell_each_other(f"{error}" or type(error).__name__)
        raise
    if wrong := [(i, text) for i, text in enumerate(tell_each_other("")) if text]:
        raise ValueError(f"Process {wrong[0][0]}: {wrong[0][1]}")
    return result


def _shortened(text: str) -> str:
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text if len(text) < 80 else f"{text[:60]}... ({mark})"


def check_same(own: dict[str, Any]) -> None:
    """Refuses processes that differ in what they were given or consist of, by name."""
    # Short, and different where they differ.
    short = {name: _shortened(f"{value}") for name, value in own.items()}
    said = tell_each_other(json.dumps(short))
    first, *others = map(json.loads, said)
    for i, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first.get(name):
                raise ValueError(
                    f"Process {i} differs from process 0 in {name}: {value}, not "
                    f"{first.get(name)}; start all with the same command and versions."
                )


def _lost(reason: str) -> str:
    return (
        f"Another process of this run was lost ({reason}); its checkpoints are whole: start all "
        "processes again, with --resume RUN."
    )


def _leave_at_once() -> None:
    """At the end of this process, does not wait for others, which may be gone."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    atexit.register(end)


@contextlib.contextmanager
def _listening_here() -> Iterator[None]:
    """Has the CPU's collectives listen on this machine only, for which JAX has no option."""
    from jax._src.lib import _jax

    make = _jax.make_gloo_tcp_collectives
    _jax.make_gloo_tcp_collectives = functools.partial(make, hostname="127.0.0.1")
    try:
        yield
    finally:
        _jax.make_gloo_tcp_collectives = make


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Leaves out what C++ writes of its stack, a hundred lines, where it ends a process."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# XLA ends a process without its coordinator, from a thread of its own: another process says so.
_SPEAKER = "import sys; sys.stdin.read() or print('lopt:', sys.argv[1], file=sys.stderr)"


@contextlib.contextmanager
def _last_words(words: str) -> Iterator[None]:
    """Has words said if this process is ended from outside of Python."""
    command = [sys.executable, "-c", _SPEAKER, words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as speaker:
        try:
            yield
        finally:
            assert speaker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it was ended before us
                speaker.stdin.write(b".")
                speaker.stdin.close()
