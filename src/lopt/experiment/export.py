"""`lopt export`: a learned optimizer as one Python file."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from lopt.experiment.settings import Positional, check


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Write a learned optimizer as one Python file that needs no lopt."""

    source: Positional = None  # the folder of a run, a file of weights, or a name such as lopt-1.
    to: str = "torch"  # torch, which then needs no JAX, or optax.
    out: Path | None = None  # the file; by default SOURCE_torch.py or SOURCE_optax.py.
    num_steps: int | None = None  # the length of the run, for rules that need it.
    # of all parameters, such as 64x32 32, for rules that are not coordinatewise.
    shapes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, to=("torch", "optax"), num_steps=1)
        self.sizes()

    def sizes(self) -> list[tuple[int, ...]]:
        """Returns shapes as numbers; `()` is that of a scalar."""
        wrong = [text for text in self.shapes if not re.fullmatch(r"\(\)|[0-9]+(x[0-9]+)*", text)]
        if wrong:
            raise ValueError(
                f"--shapes {wrong[0]!r} is no shape; try 64x32, 32, or () of a scalar."
            )
        return [tuple(map(int, re.findall("[0-9]+", text))) for text in self.shapes]


def export_command(settings: ExportSettings) -> Any:
    """Writes the file, and returns a report of what to do with it."""
    # Help is given before JAX is loaded.
    from lopt.bridges import export
    from lopt.experiment.pretrained import RATE, pretrained
    from lopt.experiment.report import Report
    from lopt.experiment.runs.files import check_writable, write_bytes
    from lopt.experiment.runs.storage import load, pretrained_names

    source, num_steps, sizes = settings.source, settings.num_steps, settings.sizes()
    if source is None:
        raise ValueError("lopt export needs a run, a file of weights or a name; try lopt-1.")
    out = settings.out or Path(f"{Path(source).stem.replace('-', '_')}_{settings.to}.py")
    check_writable(out)
    made: Any
    made, theta = load(source)
    rate = ""
    if sizes and source in pretrained_names():  # with its guard
        made = pretrained(source, num_steps, learning_rate=None if num_steps else 1.0)
        rate = "" if num_steps else f" It has no schedule: give it a rate, such as {RATE}."
    text = export(made, theta, to=settings.to, num_steps=num_steps, shapes=sizes, title=str(source))
    write_bytes(out, text.encode())
    report = Report(f"{source}, for {settings.to}")
    report.text(f"{out} defines LearnedOptimizer, and needs nothing of lopt.{rate}")
    return report
