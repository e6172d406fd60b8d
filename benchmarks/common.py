"""What both benchmarks share: rows in processes of their own, medians, a table."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lopt.experiment.runs.environment import release_memory


def megabytes() -> float:
    """Peak resident memory of this process so far.

    Not `getrusage`: a child inherits its parent's peak from it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure(function: Any, arguments: tuple[Any, ...], carry: Callable, repeats: int = 7) -> dict:
    """Times trace, compilation and runs of `function.lower(*arguments)`.

    `carry(arguments, outputs)` gives the arguments of the next run, so that nothing is constant.
    """
    jax.block_until_ready(jax.numpy.zeros(()))
    before = megabytes()
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    release_memory()  # as `lopt train` does
    done = time.perf_counter()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        outputs = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
        arguments = carry(arguments, outputs)
    analysis = compiled.compiled.memory_analysis()
    return {
        "trace": traced - began,
        "compile": done - traced,
        "seconds": statistics.median(seconds[1:]),
        "slowest": max(seconds[1:]),
        "fastest": min(seconds[1:]),
        "temporary_mb": analysis.temp_size_in_bytes / 1e6,
        "mb_beyond_process": megabytes() - before,
    }


def in_own_process(script: str, *row: str) -> dict:
    """Runs one row of a benchmark in a fresh process, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, script, "--row", *row], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, headings: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
