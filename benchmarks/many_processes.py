"""Outer steps of one process on one core, of two joined processes, and of two workers of Ray.

    python benchmarks/many_processes.py [windows of so many inner steps, 50 by default]

Each is `lopt train` on the same recipe; processes and workers have a core each. The ratio is to
twice the first. An outer step of so many seconds beyond half of the first's is overhead.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = '''
import dataclasses
import lopt, optax

@dataclasses.dataclass(frozen=True)
class Recipe:
    """Perceptrons on digits, by PES."""
    truncation: int = 50
    outer_steps: int = 120
    def build(self):
        digits = lopt.load_images("digits")
        task = lopt.tasks.mlp_classification(digits, (32,), batch_size=32)
        inner = lopt.InnerTraining(task, lopt.learned.small_mlp(), 10 * self.truncation)
        meta = lopt.Mean(lopt.PES(inner, self.truncation, 0.01), 16)
        return lopt.Experiment(inner.learned, meta, optax.adam(1e-3), self.outer_steps)
'''


def train(folder, words, cores):
    """Starts a process that trains, on these cores."""
    command = [sys.executable, "-m", "lopt.experiment.cli", "train", *words, "--run", folder]
    pinned = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
    return subprocess.Popen(command, preexec_fn=pinned, stdout=subprocess.DEVNULL)


def seconds(folder):
    """Returns the median over chunks, without the first, which is compiled."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[20:])


def measure(place, truncation):
    """Returns the seconds of an outer step in each of the three ways."""
    recipe = place / "recipe.py"
    recipe.write_text(RECIPE)
    words = [str(recipe), "--set", f"truncation={truncation}"]
    train(str(place / "one"), words, {0}).wait()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    join = ["--coordinator", where, "--processes", "2", "--process"]
    both = [train(str(place / "two"), [*words, *join, f"{i}"], {i}) for i in range(2)]
    [one.wait() for one in both]
    train(str(place / "workers"), [*words, "--workers", "2"], {0, 1}).wait()
    train(str(place / "worker"), [*words, "--workers", "1"], {0, 1}).wait()
    return {name: seconds(place / name) for name in ("one", "two", "workers", "worker")}


def main():
    truncation = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), truncation)
    one = found.pop("one")
    print(f"one process, one core: {1e3 * one:.1f} ms an outer step of {truncation} inner steps")
    for name, each in found.items():
        cores = 1 if name == "worker" else 2
        over, share = 1e3 * (each - one / cores), one / each / cores
        print(f"{name}: {1e3 * each:.1f} ms, {share:.2f} of {cores} times one, {over:.1f} ms over")


if __name__ == "__main__":
    main()
