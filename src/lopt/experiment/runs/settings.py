"""Settings of the commands that meta-train: `lopt train`, `lopt sweep` and `lopt compare`."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated

from lopt.experiment.settings import LOGGERS, Positional, Repeated, check


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Meta-train an optimizer, then evaluate it."""

    # the name of a recipe, such as digits, or a Python file that defines one.
    recipe: Positional = None
    # change a field of the recipe; may be repeated. With --resume, outer_steps alone.
    settings: Repeated = ()
    # train on, on --task, what a run trained, or what comes with lopt, by name, such as lopt-1;
    # instead of a recipe (it is then transfer).
    start: Path | None = None
    # with --from, the name of a task, such as digits_conv or mlp_family_seed7: see lopt tasks.
    task: str | None = None
    # the folder of the new run; runs/RECIPE, numbered if need be, by default.
    run: Path | None = None
    resume: Path | None = None  # the folder of a run to continue, instead of a recipe.
    # where to log besides metrics.jsonl, tensorboard or wandb; may be repeated. A run to continue
    # keeps what it has, and another gets its earlier steps, too.
    logger: Repeated = ()
    trust: bool = False  # run the recipe file that a run to continue names, or has brought along.
    # join other processes, started with the same command, as one mesh; Slurm, Open MPI and
    # Kubernetes say which there are.
    distributed: bool = False
    coordinator: str | None = None  # HOST:PORT of process 0, where nothing else says which.
    processes: int | None = None  # with --coordinator, how many there are.
    process: int | None = None  # with --coordinator, which of them this one is, from 0.
    # train so many seeds, from the recipe's on, side by side as memory allows; RUN has a run for
    # each, and one report with bands.
    seeds: int = 1
    # spread particles over so many workers of Ray, which may come and go; 0 is this process, with
    # a program for each architecture, whose first steps do not wait for the last compilation.
    workers: int | None = None
    ray: str | None = None  # the address of Ray's cluster; by default workers are on this machine.
    # with --workers, outer steps that the theta of an estimate may be old; 0 waits for all workers.
    stale: int = 0

    def __post_init__(self) -> None:
        check(self, logger=LOGGERS, processes=1, process=0, workers=0, stale=0, seeds=1)
        if not self.workers and (self.ray is not None or self.stale):
            raise ValueError("--ray and --stale go with --workers; try --workers 2.")
        several = self.distributed or self.coordinator is not None
        if sum((several, self.workers is not None, self.seeds > 1)) > 1:
            raise ValueError("--workers, --distributed and --seeds: give one of them.")
        if self.seeds > 1 and self.recipe is None:
            raise ValueError("--seeds goes with a recipe; a run to continue has its seeds already.")
        if len({one is None for one in (self.coordinator, self.processes, self.process)}) > 1:
            raise ValueError(
                "--coordinator, --processes and --process go together; try --coordinator "
                "127.0.0.1:7654 --processes 2 --process 0, and 1 for the other."
            )
        if self.process is not None and not 0 <= self.process < (self.processes or 1):
            raise ValueError(f"--process {self.process} must be below --processes; try 0.")
        if self.coordinator is not None and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ValueError(
                f"--coordinator {self.coordinator} must be HOST:PORT; try :7654 at its end."
            )
        if sum(option is not None for option in (self.recipe, self.resume, self.start)) != 1:
            raise ValueError("lopt train takes a recipe, --from RUN or --resume RUN: one of them.")
        if self.resume is not None and self.run is not None:
            raise ValueError("lopt train --resume RUN takes no --run: it goes on in its folder.")
        if (self.task is None) != (self.start is None):
            raise ValueError("--from RUN and --task NAME go together; try --task digits_conv.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Workers:
    """Where runs are trained: one after another in this process, if nothing is said."""

    # train so many runs at a time, each in a process of its own on one core, by Ray.
    workers: int | None = None
    # the address of a Ray cluster that sees the same files; this machine by default.
    ray: str | None = None

    def __post_init__(self) -> None:
        check(self, seeds=1, workers=1)
        if self.ray is not None and self.workers is None:
            raise ValueError(f"--ray {self.ray} goes with --workers; try --workers 8.")
        if not getattr(self, "designs", True):
            raise ValueError("lopt compare needs the name of a design; try small_mlp.")


@dataclasses.dataclass(frozen=True)
class SweepSettings(_Workers):
    """Meta-train a recipe in several settings, and compare their outer losses.

    Killed and started again, it goes on.
    """

    recipe: Annotated[str, "Positional"]  # by name, such as digits, or as a Python file.
    # change a field of the recipe, or sweep over it, as in horizon=50,100; may be repeated: all
    # combinations are trained. Commas within brackets or quotes separate nothing.
    settings: Repeated = ()
    seeds: int = 1  # of each setting, from 0.


@dataclasses.dataclass(frozen=True)
class CompareSettings(_Workers):
    """Meta-train designs of learned optimizers alike, and compare their outer losses.

    Killed and started again, it goes on.
    """

    # names, such as small_mlp or rnnprop; those that the field `optimizer` of the recipe takes.
    designs: Annotated[tuple[str, ...], "Positional"]
    recipe: str = "digits"  # a recipe with the field `optimizer`, by name or as a Python file.
    settings: Repeated = ()  # change a field of the recipe; may be repeated.
    seeds: int = 3  # of each design, from 0.
