"""The files of a run in training: its log, its latest weights, its checkpoints."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import numpy as np

from lopt.core.unroll import TrainState
from lopt.experiment.runs import files, storage
from lopt.experiment.runs.distributed import is_first, tell_each_other
from lopt.experiment.runs.loggers import Log, opened
from lopt.experiment.runs.run import Run


class Journal:
    """What a run in training writes, so that it can be killed at any moment and goes on.

    Of several processes that train it the first has the log and the weights.
    """

    def __init__(self, run: Run) -> None:
        self.run, self._learned = run, run.experiment.learned
        self._metrics = run.folder / "metrics.jsonl"
        self.kept = run.folder / "checkpoints"
        self._tell: Log
        self.dropped = 0  # particles, of all that is logged

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder against other processes, and tidies what a killed one was writing."""
        if not is_first():
            yield
            return
        with files.locked(self.run.folder):
            for folder in (self.run.folder, self.kept):
                for torn in files.temporary_files(folder):
                    torn.unlink()
            yield

    def points(self) -> list[int]:
        """Returns the checkpoints that the log has all lines of: from there the run can go on."""
        saved = storage.checkpoints(self.kept)
        lines = sum(1 for _ in files.scan_lines(self._metrics))
        found = [step for step in saved if step <= lines]
        if saved and not found:
            raise ValueError(
                f"{self._metrics} holds {lines} whole lines, and the first of the checkpoints was "
                f"made after {saved[0]} outer steps; restore it from a copy, or begin a new run."
            )
        return found

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Opens the log after so many steps: what comes after them will be logged again."""
        length = 0
        for number, (line, end) in enumerate(files.scan_lines(self._metrics)):
            if number == step:
                break
            length = end
            self.dropped += int(max(0, files.number_in(line, "dropped")))
        if not is_first():
            yield
            return
        self._metrics.touch()
        os.truncate(self._metrics, length)
        loggers, settings = self.run.loggers, self.run.config["settings"]
        with (
            self._metrics.open("a") as self._log,
            opened(loggers, self.run.folder, settings) as self._tell,
        ):
            yield

    def write(
        self, first: int, record: Mapping[str, np.ndarray], seconds: float, state: TrainState
    ) -> None:
        """Writes the lines of some outer steps, the weights and a checkpoint after them."""
        done = first + len(record["meta_loss"])
        self.dropped += int(record["dropped"].sum())
        if is_first():
            for i in range(done - first):
                values = {name: float(value[i]) for name, value in record.items()}
                values["seconds"] = seconds
                self._log.write(files.to_line({"step": first + i, **values}))
                self._tell(first + i, values)
            self._log.flush()
            os.fsync(self._log.fileno())
        self.save_weights(state)
        # Last: what has a checkpoint is not computed again.
        storage.save_checkpoint(self.kept, done, state, tell_each_other)

    def save_weights(self, state: TrainState) -> None:
        """Writes the weights of a state."""
        if is_first():
            path = self.run.folder / "weights.safetensors"
            storage.save_weights(path, self._learned, state.params)
