"""Learned optimizers that come with lopt, as Optax optimizers; any of them as one Python file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from lopt.core.types import NumSteps, Params, Scalar
from lopt.experiment.runs.files import check_writable, write_bytes
from lopt.experiment.runs.storage import load, pretrained_file, pretrained_names
from lopt.experiment.settings import ExportSettings
from lopt.learned import FallBack, MatrixAxes

# The rate of AdamW in rates of the rule, and that of the rule where it has a schedule of its own.
SHARE, RATE = 0.02, 0.05
LIMIT = 300.0


def pretrained(
    name: str,
    num_steps: NumSteps = None,
    *,
    learning_rate: float | Scalar | Callable[[Any], Any] | None = None,
    axes: str | Callable[[Params], Any] = "in_out",
    weight_decay: float | Scalar | None = None,
    weight_decay_mask: Callable[[Params], Any] | None = None,
    guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that comes with lopt, one of `lopt.pretrained_names()`, ready for use.

        optimizer = lopt.pretrained("lopt-1", num_steps=2_000)
        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params)

    Args:
        name: of the optimizer.
        num_steps: the length of the run, which its learned schedule is for; nothing has to be
            tuned.
        learning_rate: in place of that schedule: a number, such as 0.05, or an Optax schedule; for
            a factor of it, chain `optax.scale(factor)`.
        axes: "in_out" for params of Flax, Haiku and Keras, "out_in" for those of Equinox; or a
            function from params to a tree of `optax.contrib.MuonDimensionNumbers`, None for no
            matrix.
        weight_decay: decoupled, per step and unit of the rate, times a learned factor; None for
            what is stored with the weights, 0.06 for lopt-1.
        weight_decay_mask: from params to a tree of booleans, what decays; by default matrices do.
        guard: whether a step that is not finite, or has more than 300 times the norm of AdamW's, is
            replaced by AdamW's. The state counts them, as `state.count`, and has another 8 bytes
            for each weight; see `lopt.learned.FallBack`.

    Raises:
        ValueError: if there is no such optimizer, its file is damaged, or neither `num_steps` nor
            `learning_rate` is given; by `init`, if params are not floats.
    """
    path = pretrained_file(name)
    if num_steps is None and learning_rate is None:
        raise ValueError(
            f"pretrained({name!r}) needs the length of the run or a rate; try num_steps=1000, or "
            f"learning_rate={RATE}."
        )
    learned: Any
    learned, theta = load(path)
    learned = dataclasses.replace(
        learned,
        learning_rate=learning_rate,
        axes=MatrixAxes(axes) if isinstance(axes, str) else axes,
        weight_decay=learned.weight_decay if weight_decay is None else weight_decay,
        weight_decay_mask=weight_decay_mask,
    )
    if guard:
        rate = RATE if learning_rate is None else learning_rate
        own = (lambda step: SHARE * rate(step)) if callable(rate) else SHARE * rate
        # Where gradients shrink to nothing the rule's steps, of normalised directions, do not. Nor
        # do these, as both moments have one memory: the ratio was at most 114 in healthy trainings.
        adamw = optax.adamw(own, b2=0.9)
        learned = FallBack(learned, adamw, LIMIT)
        theta = (theta, learned.fall_back.init(jax.random.key(0)))
    return learned.optimizer(theta, num_steps)


def export_command(settings: ExportSettings) -> Any:
    """Writes the file, and returns a report of what to do with it."""
    # `pretrained` needs neither, and is imported in half the time without.
    from lopt.bridges import export
    from lopt.experiment.report import Report

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
