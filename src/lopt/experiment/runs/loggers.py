"""Where a run is logged besides its `metrics.jsonl`: TensorBoard, Weights & Biases, your own.

A logger is given that file from its first line whenever a run is begun or resumed, and then every
new line: nothing is there twice, and nothing is missing, wherever the run was killed.
"""

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.experiment.runs import files

# Is called with each outer step, from 0, and its finite numbers: {"meta_loss": 2.3, ...}.
Log = Callable[[int, Mapping[str, float]], object]
# From the folder of a run and its settings to a context, which is left when training ends.
Logger = Callable[[Path, Mapping[str, Any]], contextlib.AbstractContextManager[Log]]


@contextlib.contextmanager
def tensorboard(folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Writes a scalar for each number of a step to RUN/tensorboard."""
    from tensorboardX import SummaryWriter

    place = folder / "tensorboard"
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    # A TensorBoard that shows the old file drops what it has from step 0 on.
    with SummaryWriter(str(place), purge_step=0, flush_secs=10) as writer:

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        yield log


@contextlib.contextmanager
def wandb(folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Logs to a run of Weights & Biases, of the project lopt unless WANDB_PROJECT is set.

    A resumed run has the same id. Offline, in RUN/wandb, its last folder has all steps.
    """
    import wandb as library

    begun = sorted((folder / "wandb").glob("*run-*-*"))
    with library.init(
        project=os.environ.get("WANDB_PROJECT", "lopt"),
        name=folder.resolve().name,
        id=begun[-1].name.rpartition("-")[2] if begun else None,
        dir=folder,
        config=dict(settings),
        resume="allow",
    ) as run:
        first = run.starting_step  # the server has what is before

        def log(step: int, numbers: Mapping[str, float]) -> None:
            if step >= first:
                run.log(dict(numbers), step=step)

        yield log


# By name, which is also that of the extra; with the module that each needs.
LOGGERS: dict[str, tuple[Logger, str]] = {
    "tensorboard": (tensorboard, "tensorboardX"),
    "wandb": (wandb, "wandb"),
}


def check_installed(loggers: Sequence[str | Logger]) -> None:
    """Refuses loggers whose packages are missing: an ImportError."""
    for name in loggers:
        if isinstance(name, str) and importlib.util.find_spec(LOGGERS[name][1]) is None:
            raise ImportError(
                f"The logger {name!r} needs the package {LOGGERS[name][1]}; install it with: pip "
                f"install 'lopt[{name}]'"
            )


@contextlib.contextmanager
def opened(
    loggers: Sequence[str | Logger], folder: Path, settings: Mapping[str, Any]
) -> Iterator[Log]:
    """Opens loggers, tells them what is logged already, and yields a function that tells them."""
    check_installed(loggers)
    with contextlib.ExitStack() as stack:
        functions = [LOGGERS[one][0] if isinstance(one, str) else one for one in loggers]
        logs = [stack.enter_context(function(folder, settings)) for function in functions]

        def log(step: int, numbers: Mapping[str, float | None]) -> None:
            finite = {k: v for k, v in numbers.items() if v is not None and math.isfinite(v)}
            for one in logs:
                one(step, finite)

        for line, _ in files.scan_lines(folder / "metrics.jsonl") if logs else ():
            numbers = json.loads(line)
            log(numbers.pop("step"), numbers)
        yield log
