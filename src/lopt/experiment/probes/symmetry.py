"""Which symmetries a run's learned optimizer breaks, beside SGD, momentum, Adam and Lion.

In meta-testing all of them train fresh tasks of the run, from the same params on the same batches.
In meta-training the learned optimizer does so with the theta of each checkpoint, and for a few
steps with that of every outer step, while the beginning of the run's meta-training is done again.
The study is that of Sobotka et al. 2024 (arXiv:2312.07174).
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.analysis import equivariances
from lopt.analysis.symmetry import Symmetries, SymmetryProbe, drift, symmetries
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key
from lopt.core.unroll import Step
from lopt.experiment.baselines import BASELINES, Tuned, tuned_baseline
from lopt.experiment.probes.subject import REFERENCES, num_steps, rate_cells
from lopt.experiment.report import Cell, Figure, Report, curves, measured, number, stages
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import OneProgram, kept_thetas
from lopt.experiment.settings import SymmetrySettings
from lopt.experiment.trainings import RECORD_SIZE, Keys, stream, trainings

# Inner steps of the truncations of the study, after which learned optimizers are fastest.
SHORT = 20
# A figure of more symmetries is no longer looked at; the JSON has all.
MOST_ROWS = 8
# The headings of measures, and what `Deviation` calls them.
MEASURES = {"signed": "signed", "absolute": "absolute", "normalised": "cosine"}
# The "losses" of trainings by seed and step; by symmetry the deviations of "updates" and
# "gradients", "early" means of those of updates, and "drift" of what gradient flow conserves.
Trajectory = dict[str, Any]


def probe_symmetry(run: Run, settings: SymmetrySettings) -> Report:
    """Measures a run's weights on tasks it never drew, of the first of several architectures."""
    tasks, steps = run.inner.tasks.architectures()[0], num_steps(run, settings, 2)
    find_key, run_key = jax.random.split(stream("symmetry", settings.seed))
    keys = jax.random.split(run_key, settings.seeds)
    thetas = kept_thetas(run.experiment, run.folder)
    short, again = min(SHORT, steps), min(settings.outer_steps, run.experiment.outer_steps)
    per_call = math.gcd(again, 10)  # outer steps of a compiled call
    trained, rates, rules, kept, replayed = {}, {}, {}, {}, []
    optimizers = {"learned": run.learned.optimizer(run.theta, steps)}
    total = 2 + 2 * len(REFERENCES) + len(thetas) + again // per_call
    with stages("probing", total) as progress:
        progress("finding symmetries")
        found = _symmetries(run, tasks, find_key)
        generators = (*found.generators, *found.nearly)
        watch = eqx.Partial(trajectory, tasks, keys, SymmetryProbe(generators))
        for name in REFERENCES:
            progress(f"tuning {name}")
            rates[name] = tuned_baseline(tasks, keys, steps, name)
            optimizers[name] = BASELINES[name].factory(rates[name].values, steps)
        for name, optimizer in optimizers.items():
            progress(f"training with {name}")
            trained[name] = jax.device_get(watch(steps, optimizer))
            with contextlib.suppress(ValueError):  # of rules for the tensors of their tasks alone
                rules[name] = equivariances(optimizer, find_key, num_steps=min(steps, 5))
        for outer_step, theta in thetas.items():
            progress(f"the weights of outer step {outer_step}")
            kept[outer_step] = jax.device_get(watch(steps, run.learned.optimizer(theta, steps)))
        if again:  # bit for bit, but for what is recorded
            engine = OneProgram(run.experiment, eqx.Partial(_early, watch, short, run.learned))
            state = engine.begin()
        for outer_step in range(0, again, per_call):
            progress(f"meta-training again, outer step {outer_step}")
            state, record = engine.advance(state, per_call)
            replayed.append(jax.device_get(record))
    head = {"run": run.name, **dataclasses.asdict(settings), "steps": steps}
    report = Report(f"The symmetries that {run.name} breaks", head)
    missed = [{"symmetry": one, **{n: rules[n][one] for n in rules}} for one in rules["SGD"]]
    report.table("Symmetries of update rules, and by how much each is missed", missed)
    _meta_testing(report, found, trained, rates)
    report.heading("Meta-training")
    early = {name: trained[name]["early"] for name in REFERENCES}
    if replayed:
        early["learned"] = jax.tree.map(lambda *each: np.concatenate(each).T, *replayed)
    early["learned (kept)"] = jax.tree.map(
        lambda *each: dict(zip(kept, each, strict=True)), *(one["early"] for one in kept.values())
    )
    caption = (
        f"Mean deviation of the updates in the first {short} steps. Line: the weights of each "
        "outer step, as meta-training is done again; dots: kept weights; dashed: the references."
    )
    style: dict[str, Any] = {"steps": range(again), "points": again, "xlabel": "outer step"}
    report.add(_figure("meta_training", generators, early, caption, **style))
    rows: list[dict[str, Cell]] = [
        {"outer step": n, **{g.name: measured(one["early"][g.name].cosine) for g in generators}}
        for n, one in kept.items()
    ]
    report.table(f"Over meta-training: normalised, mean of the first {short} steps", rows)
    caption = "The learned optimizer with the weights it began with, and those of kept checkpoints."
    updates = {f"outer step {outer_step}": one["updates"] for outer_step, one in kept.items()}
    report.add(_figure("stages", generators, updates, caption, ordered=True, xlabel="step"))
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
    # Without their sign, as learned optimizers add updates that the study's baselines subtract.
    updates = {name: jax.tree.map(jnp.abs, one.updates) for name, one in found.items()}
    conserved = {name: one.conserved for name, one in found.items() if one.conserved is not None}
    return {
        "losses": losses,
        "updates": updates,
        "early": jax.tree.map(lambda values: values[:, :SHORT].mean(axis=1), updates),
        "gradients": {name: jax.tree.map(jnp.abs, one.grads) for name, one in found.items()},
        "drift": jax.tree.map(jax.vmap(drift), conserved),
    }


def _early(watch: Any, steps: int, learned: AbstractLearnedOptimizer, step: Step) -> Any:
    return watch(steps, learned.optimizer(step.params, steps))["early"]


def _symmetries(run: Run, tasks: AbstractTaskFamily, key: Key) -> Symmetries:
    draw_key, find_key = jax.random.split(key)
    # In double precision what an epsilon breaks is told from rounding.
    with jax.enable_x64(True):
        task = tasks.draw(draw_key)
        found = symmetries(task, find_key)
    if found.generators or found.nearly:
        return found
    raise ValueError(
        f"The tasks of the run {run.folder} ({type(task).__name__}) have no continuous symmetry "
        "that an optimizer could break; try a run on networks, such as one of the recipe digits."
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
    report.data["slopes"] = {name: one.slope for name, one in found.evidence.items()}
    report.heading(
        "Meta-testing",
        f"{report.settings['seeds']} fresh tasks of the run, {report.settings['steps']} steps "
        "each, the same params and batches for all optimizers. Rates are the best of half decades "
        "for just these runs (mean training loss; edge: of the grid). Tables have means over "
        "steps, and drift and loss at the end. Signed sums are those published, without their "
        "sign: units cancel in them. Absolute sums do not cancel; the normalised measure is the "
        "length of the cosines between the update and the tangents, which does not grow with the "
        "learning rate. Drift is how far what gradient flow conserves has moved, as a share of it.",
    )
    losses = {name: one["losses"] for name, one in trained.items()}
    report.add(curves("losses", {"Training loss": losses}, xlabel="step"))

    def row(name: str, symmetry: str) -> dict[str, Cell]:
        one = trained[name]
        updates, moved = one["updates"][symmetry], one["drift"].get(symmetry)
        return {
            "optimizer": name,
            **rate_cells(rates, name),
            **{m: measured(getattr(updates, f).mean(axis=1)) for m, f in MEASURES.items()},
            "gradients": measured(one["gradients"][symmetry].cosine.mean(axis=1)),
            "drift": None if moved is None else measured(moved[:, -1]),
            "final loss": measured(losses[name][:, -1]),
        }

    caption = (
        "Updates, mean and standard error over seeds, and the gradients on the learned optimizer's "
        "path. What is exactly zero is not drawn."
    )
    drawn = {name: one["updates"] for name, one in trained.items()}
    drawn["gradients"] = trained["learned"]["gradients"]
    for name, but, generators in (
        ("deviations", "", found.generators),
        ("nearly", " but for an epsilon, as that of batch norm", found.nearly),
    ):
        if generators:
            report.heading(f"Symmetries that hold{but}")
            report.add(_figure(name, generators, drawn, caption, xlabel="step"))
        for one in generators:
            slope = f", nearly: slope {number(found.evidence[one.name].slope, 2)}" if but else ""
            rows = [row(optimizer, one.name) for optimizer in trained]
            report.table(f"{one.name} ({one.units} units{slope})", rows)


def _figure(
    name: str, generators: Sequence[Any], found: Mapping[str, Any], caption: str, **style: Any
) -> Figure:
    panels = {
        f"{g.name}: {measure}": {n: getattr(one[g.name], field) for n, one in found.items()}
        for g in generators
        for measure, field in MEASURES.items()
    }
    return curves(name, panels, caption=caption, most=MOST_ROWS * len(MEASURES), **style)
