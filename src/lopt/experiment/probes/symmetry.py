"""Which symmetries a run's learned optimizer breaks, beside SGD, momentum, Adam and Lion.

In meta-testing all of them train fresh tasks of the run, from the same params on the same batches.
In meta-training the learned optimizer does so with the theta of each checkpoint, and for a few
steps with that of every outer step, while the beginning of the run's meta-training is done again.
The study is that of Sobotka et al. 2024 (arXiv:2312.07174).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.analysis.symmetry import Deviation, Symmetries, SymmetryProbe, drift, symmetries
from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.core.checks import check_length
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key
from lopt.core.unroll import Step
from lopt.experiment.baselines import BASELINES, Tuned, tuned_baseline
from lopt.experiment.report import Cell, Figure, Report, curves, measured, number, stages
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import SymmetrySettings
from lopt.experiment.trainings import RECORD_SIZE, Keys, dtype_of, stream, trainings

LONGEST = 500
# Inner steps of the truncations of the study, after which learned optimizers are fastest.
SHORT = 20
# Outer steps that are done again in one call, at most.
PER_CALL = 10
# A figure of more symmetries is no longer looked at; the JSON has all.
MOST_ROWS = 8
# The headings of measures, and what `Deviation` calls them.
MEASURES = {"signed": "signed", "absolute": "absolute", "normalised": "cosine"}
Deviations = dict[str, Deviation]  # by symmetry


class Trajectory(NamedTuple):
    """What is kept of trainings, by seed and step.

    Deviations have no sign: learned optimizers add updates that the study's baselines subtract.
    Drift, where it is known, is how far what gradient flow conserves has moved.
    """

    losses: Any
    updates: Deviations
    gradients: Deviations
    drift: dict[str, Any]


def probe_symmetry(run: Run, settings: SymmetrySettings, *, show_progress: bool = True) -> Report:
    """Measures a run's weights on tasks that its meta-training never drew.

    Args:
        run: the run.
        settings: what is measured.
        show_progress: whether to draw a progress bar.

    Raises:
        FileNotFoundError: if the folder holds no run, or no weights.
        ValueError: if the run has no inner training, its tasks have no continuous symmetry, or its
            optimizer is not made for such steps.
    """
    learned, tasks = run.learned, run.inner.tasks
    steps = settings.steps or max(2, min(run.inner.horizon, LONGEST))
    check_length(f"lopt probe symmetry --steps {steps}", steps, learned.max_steps)
    find_key, run_key = jax.random.split(stream("symmetry", settings.seed))
    keys, thetas = jax.random.split(run_key, settings.seeds), run.thetas()
    short, again = min(SHORT, steps), min(settings.outer_steps, run.experiment.outer_steps)
    per_call = math.gcd(again, PER_CALL)
    trained, rates, kept, replayed = {}, {}, {}, []
    total = 2 + 2 * len(BASELINES) + len(thetas) + again // per_call
    with stages("probing", total, show=show_progress) as progress:
        progress("finding symmetries")
        found = _symmetries(run, find_key)
        probe = SymmetryProbe((*found.generators, *found.nearly))
        watch = eqx.Partial(trajectory, tasks, keys, probe)
        progress("training with the learned optimizer")
        trained["learned"] = watch(steps, learned.optimizer(run.theta, steps))
        for name, baseline in BASELINES.items():
            progress(f"tuning {name}")
            rates[name] = tuned_baseline(tasks, keys, steps, name)
            progress(f"training with {name}")
            trained[name] = watch(steps, baseline.factory(rates[name].value))
        for outer_step, theta in thetas.items():
            progress(f"the weights of outer step {outer_step}")
            kept[outer_step] = watch(steps, learned.optimizer(theta, steps)).updates
        replay = run.replay(per_call, eqx.Partial(_of_theta, watch, short, learned))
        for outer_step in range(0, again, per_call):
            progress(f"meta-training again, outer step {outer_step}")
            replayed.append(next(replay))
    trained, kept = jax.device_get((trained, kept))
    head = {"run": run.name, **dataclasses.asdict(settings), "steps": steps}
    report = Report(f"The symmetries that {run.name} breaks", head)
    report.data["precision"] = float(jnp.finfo(dtype_of(tasks)).eps)
    report.data["learning_rates"] = {name: rate.value for name, rate in rates.items()}
    _meta_testing(report, found, trained, rates)
    _meta_training(report, [one.name for one in probe.generators], short, trained, kept, replayed)
    return report


@eqx.filter_jit
def trajectory(
    tasks: AbstractTaskFamily,
    keys: Keys,
    probe: SymmetryProbe,
    steps: int,
    optimizer: optax.GradientTransformation,
) -> Trajectory:
    """Returns what is kept of training a fresh task for each key."""
    _, (losses, found) = trainings(
        tasks, optimizer, keys, steps, lambda s: (s.loss, probe(s)), record_size=RECORD_SIZE
    )
    updates = {name: jax.tree.map(jnp.abs, one.updates) for name, one in found.items()}
    gradients = {name: jax.tree.map(jnp.abs, one.grads) for name, one in found.items()}
    conserved = {name: one.conserved for name, one in found.items() if one.conserved is not None}
    return Trajectory(losses, updates, gradients, jax.tree.map(jax.vmap(drift), conserved))


def _of_theta(watch: Any, steps: int, learned: AbstractLearnedOptimizer, step: Step) -> Deviations:
    """Records what the theta of a step of meta-training does."""
    return watch(steps, learned.optimizer(step.params, steps)).updates


def _symmetries(run: Run, key: Key) -> Symmetries:
    """Returns the symmetries of a task of a run, which all of its tasks share."""
    draw_key, find_key = jax.random.split(key)
    # In double precision what an epsilon breaks is told from rounding.
    with jax.enable_x64(True):
        task = run.inner.tasks.draw(draw_key)
        found = symmetries(task, find_key)
    if found.generators or found.nearly:
        return found
    tried = [one for one in found.evidence.values() if len(one.slopes)]
    nearest = min(tried, key=lambda one: one.slope, default="none, as it has no layers")
    raise ValueError(
        f"The tasks of the run {run.folder} ({type(task).__name__}) have no continuous symmetry "
        f"that an optimizer could break. The nearest of {len(tried)} that were tried: {nearest}. "
        "Try a run on networks, such as one of the recipe digits."
    )


def _meta_testing(
    report: Report, found: Symmetries, trained: dict[str, Trajectory], rates: dict[str, Tuned]
) -> None:
    report.text(
        "Along the tangents of a symmetry the loss cannot change, and gradients have no component. "
        "What updates have along them is the optimizer's own doing.",
        detail=True,
    )
    report.text(str(found), code=True)
    report.heading("Meta-testing")
    report.text(
        f"{report.settings['seeds']} fresh tasks of the run, {report.settings['steps']} steps "
        "each, the same params and batches for all optimizers. Rates are the best of half decades "
        "for just these runs (mean training loss; * at the grid's edge). Tables have means over "
        "steps, and drift and loss at the end. Signed sums are those published, without their "
        "sign: units cancel in them. Absolute sums do not cancel; the normalised measure is the "
        "length of the cosines between the update and the tangents, which does not grow with the "
        "learning rate. Drift is how far what gradient flow conserves has moved, as a share of it.",
        detail=True,
    )
    losses = {name: one.losses for name, one in trained.items()}
    report.add(curves("losses", {"Training loss": losses}, xlabel="step"))

    def row(name: str, symmetry: str) -> dict[str, Cell]:
        one, rate = trained[name], rates.get(name)
        updates, gradients = one.updates[symmetry], one.gradients[symmetry]
        return {
            "optimizer": name,
            "rate": "-" if rate is None else number(rate.value) + "*" * rate.at_edge,
            **{m: measured(getattr(updates, f).mean(axis=1)) for m, f in MEASURES.items()},
            "gradients": measured(gradients.cosine.mean(axis=1)),
            "drift": measured(one.drift[symmetry][:, -1]) if symmetry in one.drift else None,
            "final loss": measured(one.losses[:, -1]),
        }

    caption = (
        "Updates, mean and standard error over seeds, and the gradients on the learned optimizer's "
        "path. What is exactly zero is not drawn."
    )
    drawn = {name: one.updates for name, one in trained.items()}
    drawn["gradients"] = trained["learned"].gradients
    for name, but, generators in (
        ("deviations", "", found.generators),
        ("nearly", " but for an epsilon, as that of batch norm", found.nearly),
    ):
        if generators:
            names = [one.name for one in generators]
            report.heading(f"Symmetries that hold{but}")
            report.add(_figure(name, names, drawn, caption, xlabel="step"))
        for one in generators:
            slope = f", nearly: slope {number(found.evidence[one.name].slope, 2)}" if but else ""
            rows = [row(optimizer, one.name) for optimizer in trained]
            report.table(f"{one.name} ({one.units} units{slope})", rows)


def _meta_training(
    report: Report,
    names: Sequence[str],
    short: int,
    trained: Mapping[str, Trajectory],
    kept: Mapping[int, Deviations],
    replayed: Sequence[Deviations],
) -> None:
    def early(updates: Deviations) -> Deviations:
        return jax.tree.map(lambda values: values[..., :short].mean(axis=-1), updates)

    means = {outer_step: early(updates) for outer_step, updates in kept.items()}
    drawn = {name: early(trained[name].updates) for name in BASELINES}
    drawn["learned (kept)"] = jax.tree.map(
        lambda *each: dict(zip(means, each, strict=True)), *means.values()
    )
    if replayed:
        again = jax.tree.map(lambda *each: np.concatenate(each), *replayed)
        drawn["learned"] = jax.tree.map(np.transpose, early(again))
    report.heading("Meta-training")
    caption = (
        f"Mean deviation of the updates in the first {short} steps. Line: the weights of each "
        "outer step, as meta-training is done again; dots: kept weights; dashed: the references."
    )
    report.add(_figure("meta_training", names, drawn, caption, first=0, xlabel="outer step"))
    rows: list[dict[str, Cell]] = [
        {"outer step": n, **{name: measured(one[name].cosine) for name in names}}
        for n, one in means.items()
    ]
    report.table(f"Over meta-training: normalised, mean of the first {short} steps", rows)
    caption = "The learned optimizer with the weights it began with, and those of kept checkpoints."
    drawn = {f"outer step {outer_step}": updates for outer_step, updates in kept.items()}
    report.add(_figure("stages", names, drawn, caption, ordered=True, xlabel="step"))


def _figure(
    name: str,
    symmetries: Sequence[str],
    found: Mapping[str, Deviations],
    caption: str,
    **style: Any,
) -> Figure:
    """Returns a figure with a row for each symmetry and a column for each measure."""
    panels = {
        f"{symmetry}: {measure}": {n: getattr(one[symmetry], field) for n, one in found.items()}
        for symmetry in symmetries
        for measure, field in MEASURES.items()
    }
    return curves(name, panels, caption=caption, most=MOST_ROWS * len(MEASURES), **style)
