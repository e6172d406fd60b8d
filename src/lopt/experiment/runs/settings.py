"""Settings of the commands that meta-train several runs alike: `lopt sweep` and `lopt compare`."""

import dataclasses
from typing import Annotated

from lopt.experiment.settings import Repeated, check


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

    recipe: Annotated[str, "positional"]  # by name, such as digits, or as a Python file.
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
    designs: Annotated[tuple[str, ...], "positional"]
    recipe: str = "digits"  # a recipe with the field `optimizer`, by name or as a Python file.
    settings: Repeated = ()  # change a field of the recipe; may be repeated.
    seeds: int = 3  # of each design, from 0.
