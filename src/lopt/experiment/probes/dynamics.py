"""The dynamics of a run's learned optimizer, beside that of SGD, momentum, Adam and Lion.

All of them train fresh tasks of the run from the same params on the same batches, get the same
scripted gradients, and run in the valley (x - y)^2 / 2.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lopt.analysis import dynamics
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.inner import InnerTraining
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key, Theta
from lopt.core.unroll import Step, TrainState
from lopt.experiment.baselines import BASELINES, Tuned, tuned_baseline
from lopt.experiment.probes.subject import REFERENCES, num_steps, rate_cells
from lopt.experiment.report import Report, curves, measured, shown_steps, stages
from lopt.experiment.report import dynamics_plots as plots
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import DynamicsSettings
from lopt.experiment.trainings import RECORD_SIZE, Keys, begin, drawn, stream, trainings

FINAL = 10  # steps that the final loss is a mean of
SIGNALS: tuple[dynamics.script.Signal, ...] = ("impulse", "step", "sign flip")
MOST_CURVES, MOST_ROWS = 8, 12  # features that are drawn, and in the table
HISTOGRAM = dynamics.UpdateHistogram()
# What is recorded of trainings by seed and step, some of it by the title of its panel.
Record = dict[str, Any]
Optimizers = Mapping[str, optax.GradientTransformation]
LOSS, RELATIVE = "Training loss", "Relative step |u| / |params|"
RATE = "Effective learning rate -<u, g> / <g, g>"
COSINE, SIZE = "Cosine with the update of", "Step relative to that of"


def probe_dynamics(run: Run, settings: DynamicsSettings) -> Report:
    """Measures the latest weights of a run on tasks that its meta-training never drew."""
    learned, theta, tasks = run.learned, run.theta, run.inner.tasks
    steps, key = num_steps(run, settings, 10), stream("dynamics", settings.seed)
    run_key, valley_key, signal_key, input_key = jax.random.split(key, 4)
    keys = jax.random.split(run_key, settings.seeds)
    valley_keys = jax.random.split(valley_key, settings.starts**2)
    head = {"run": run.name, **dataclasses.asdict(settings), "steps": steps}
    report = Report(f"The dynamics of {run.name}", head)
    # Two rates of each reference; the trainings of each optimizer; what they and the rule answer.
    with stages("probing", 3 * len(REFERENCES) + 3) as progress:
        tuned, in_valley, references = {}, {}, {}
        for name in REFERENCES:
            progress(f"tuning {name}")
            tuned[name] = tuned_baseline(tasks, keys, steps, name)
            references[name] = BASELINES[name].factory(tuned[name].values, steps)
            # A rate suits a curvature: that of the valley is 2, whatever the run's tasks have.
            progress(f"tuning {name} in the valley")
            in_valley[name] = tuned_baseline(dynamics.Valley(), valley_keys, steps, name)
        optimizers = {"learned": learned.optimizer(theta, steps), **references}
        # Parts of one length share a program; the last may be longer.
        part = max(1, steps // settings.moments)
        moments = [*range(0, steps - part + 1, part)[: settings.moments], steps]
        watch = partial(recorded_trainings, tasks, keys, moments, settings.batches)
        trained, noise = {}, {}
        for name, optimizer in optimizers.items():
            progress(f"training with {name}, and its noise")
            others = references if name == "learned" else {}
            trained[name], noise[name] = watch(optimizer, others)
        params = begin(tasks, optax.set_to_zero(), keys[0]).params
        names = dynamics.tensor_names(params)
        _add_trainings(report, trained, tuned, names)
        _add_alignment(report, trained["learned"], names)
        _add_noise(report, noise, moments)
        progress("the valley, and signals")
        script = script_like(trained["learned"], optax.tree.size(params), steps, signal_key)
        add_answers(report, optimizers, in_valley, script)
        progress("what the rule does")
        inner = dataclasses.replace(run.inner, learned=learned)
        add_features(report, inner, theta, keys[0], input_key)
    return report


def recorded_trainings(
    tasks: AbstractTaskFamily,
    keys: Keys,
    moments: Sequence[int],
    batches: int,
    optimizer: optax.GradientTransformation,
    references: Optimizers,
) -> tuple[Record, Float[np.ndarray, "seed moment 2 3"]]:
    """Trains fresh tasks, and measures the noise of gradients and updates at moments, also the end.

    It has a tail index, a trace and a top eigenvalue; NaN where there is none, or none is finite.
    """
    companions = dynamics.Companions(optimizer, {**references}) if references else None
    optimizer = companions.optimizer if companions else optimizer

    def noise_at(states: TrainState) -> Float[np.ndarray, "seed 2 3"]:
        found = []
        for i, run_key in enumerate(keys):
            state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
            # Steps fold their numbers into the run's key, and preparation the largest of 32 bits.
            key, task = jax.random.fold_in(state.key, 2**32 - 2), drawn(tasks, run_key)
            samples = dynamics.noise_samples(task, optimizer, state, key, batches)
            for vectors in (samples.grads, samples.updates):
                leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(vectors)]
                try:
                    one = dynamics.noise_of(leaves)
                    found.append([one.tail_index, one.trace, one.top_eigenvalue])
                except ValueError:
                    found.append([np.nan] * 3)
        return np.reshape(found, (-1, 2, 3))

    states, parts = jax.vmap(partial(begin, tasks, optimizer))(keys), []
    noise, record = [noise_at(states)], eqx.Partial(_record, companions)
    for steps in np.diff(moments).tolist():
        states, part = trainings(
            tasks, optimizer, keys, steps, record, states=states, record_size=RECORD_SIZE
        )
        parts.append(jax.device_get(part))
        noise.append(noise_at(states))
    recorded = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    return recorded, np.stack(noise, axis=1)


def _record(companions: dynamics.Companions | None, step: Step) -> Record:
    updates, rate = HISTOGRAM(step), dynamics.effective_rate(step.updates, step.grads)
    aligned = dynamics.AlignmentRecord(companions)(step) if companions else {}
    return {
        LOSS: step.loss,
        RELATIVE: updates.overall_relative,
        RATE: rate.overall,
        COSINE: {name: one.overall_cosine for name, one in aligned.items()},
        SIZE: {name: one.overall_relative for name, one in aligned.items()},
        "rates": rate.per_tensor,
        "counts": updates.counts,
        "largest": updates.largest,
        "gradient": optax.tree.norm(step.grads),
        "params": optax.tree.norm(step.params),
    }


def _add_trainings(
    report: Report, trained: Mapping[str, Record], tuned: Mapping[str, Tuned], names: Sequence[str]
) -> None:
    steps, seeds = report.settings["steps"], report.settings["seeds"]
    report.heading(
        "Training",
        f"{seeds} fresh tasks of the run, {steps} steps each; all optimizers begin at the same "
        "params and see the same batches. The rates of references are the best of half decades "
        "for just these trainings (mean training loss).",
    )
    titles = (LOSS, RELATIVE, RATE)
    panels = {title: {name: one[title] for name, one in trained.items()} for title in titles}
    caption = "Mean and standard error over seeds."
    report.add(curves("courses", panels, caption, log={RATE: "signed"}, xlabel="step"))
    # Of all seeds together: an update that is largest in one of them is the largest.
    largest = {name: one["largest"].max(axis=(0, 2)) for name, one in trained.items()}
    report.table(
        f"Training ({steps} steps, {seeds} seeds; edge: of the grid of rates)",
        [
            {
                "optimizer": name,
                **rate_cells(tuned, name),
                "mean loss": measured(one[LOSS].mean(axis=1, dtype=float)),
                "final loss": measured(one[LOSS][:, -FINAL:].mean(axis=1, dtype=float)),
                "largest |u|, first step": float(largest[name][0]),
                "last step": float(largest[name][-1]),
                "relative step": float(np.median(one[RELATIVE])),
                "effective rate": float(np.median(one[RATE])),
            }
            for name, one in trained.items()
        ],
    )
    report.heading("How large updates are")
    for name, one in trained.items():
        counts, largest = one["counts"].sum(axis=0), one["largest"].max(axis=0)
        found, steps = (counts, largest, HISTOGRAM.edges), np.array(shown_steps(len(counts)))
        numbers = {"steps": steps, "counts": counts[steps - 1], "largest": largest[steps - 1]}
        report.figure(
            f"updates_{name}",
            partial(plots.draw_histograms, found=found, names=names),
            caption=f"{name}: the distribution of |update| in each tensor, of all seeds together. "
            f"Shares of less than {HISTOGRAM.lowest:g}, zeros included, are not drawn.",
            edges=HISTOGRAM.edges.tolist(),
            **{name: values.tolist() for name, values in numbers.items()},
        )


def _add_alignment(report: Report, learned: Record, names: Sequence[str]) -> None:
    report.heading("Alignment with references")
    rates = {name: learned["rates"][..., i] for i, name in enumerate(names)}
    panels = {
        title: {name: learned[title][name] for name in REFERENCES} for title in (COSINE, SIZE)
    }
    panels["Effective learning rate"] = {**rates, "all": learned[RATE]}
    caption = "The learned optimizer on its own path: what the references would have done there."
    log: dict[str, bool | str] = {COSINE: False, "Effective learning rate": "signed"}
    report.add(curves("alignment", panels, caption=caption, log=log, xlabel="step"))
    rows: list[dict[str, Any]] = [{"reference": name} for name in REFERENCES]
    for label, title in (("cosine", COSINE), ("|u| / |ref|", SIZE)):
        for row, values in zip(rows, panels[title].values(), strict=True):
            # Angles to an update of zero are NaN, and left out of the mean.
            mean = np.ma.masked_invalid(values).mean(axis=1, dtype=float)
            row[f"{label}, first"] = measured(values[:, 0])
            row[f"{label}, mean"] = measured(np.ma.compressed(mean))
            row[f"{label}, last"] = measured(values[:, -1])
    report.table("The learned optimizer against references, on its own path", rows)


def _add_noise(report: Report, noise: Mapping[str, np.ndarray], moments: Sequence[int]) -> None:
    report.heading(
        "Noise",
        f"How gradients (g) of {report.settings['batches']} batches at one checkpoint vary, and "
        "the updates (u) made of them: tail index (2: Gaussian), trace and top eigenvalue of the "
        "covariance. The tail index is that of published studies, over all coordinates together: "
        "unequal coordinates lower it, as heavy tails do.",
    )
    panels = {
        f"{measure} {vectors}": {name: found[:, :, i, j] for name, found in noise.items()}
        for j, measure in enumerate(("tail", "trace", "top"))
        for i, vectors in enumerate("gu")
    }
    log, caption = {"tail g": False, "tail u": False}, "Each on its own path, states frozen."
    report.add(curves("noise", panels, caption, 2, steps=moments, log=log, xlabel="step"))
    rows: list[dict[str, Any]] = []
    for name, (i, moment) in itertools.product(noise, enumerate(moments)):
        rows.append({"optimizer": name, "step": moment})
        for title, panel in panels.items():
            cell = measured([one for one in panel[name][:, i] if np.isfinite(one)])
            rows[-1][title] = cell if title in log else cell.mean
    report.table("Noise of gradients (g) and updates (u)", rows)


def script_like(
    recorded: Record, coordinates: int, steps: int, key: Key
) -> tuple[Float[Array, "kind time 64"], Float[Array, "64"], Float[Array, " time"]]:
    """Returns gradients of a tensor for each of `SIGNALS` and for none, its params, and losses.

    The first coordinate is sent the signal, for at most 100 steps. The others, by which rules may
    normalise, have random gradients and params. All are as large as in trainings.
    """
    length = min(steps, 100)
    loss, gradient, size = (
        _median(recorded[name][recorded[name] > 0]) or 1.0 for name in (LOSS, "gradient", "params")
    )
    height, first, second = gradient / coordinates**0.5, *jax.random.split(key)
    signals = [dynamics.signal(kind, length, length // 4, height) for kind in SIGNALS]
    others = height * jax.random.normal(first, (length, 63))
    grads = [jnp.column_stack([one, others]) for one in (*signals, jnp.zeros(length))]
    params = size / coordinates**0.5 * jax.random.normal(second, (64,))
    return jnp.stack(grads), params.at[0].set(0.0), jnp.full(length, loss)


def add_answers(
    report: Report, optimizers: Optimizers, tuned: Mapping[str, Tuned], script: Sequence[Array]
) -> None:
    """Adds what optimizers do in the valley, at other rates, and in response to signals.

    Those made for other tensors than vectors are left out.
    """
    steps = report.settings["steps"]
    starts = dynamics.valley_starts(2.0, report.settings["starts"])
    portraits, responses = {}, {"-gradient": -np.asarray(script[0][..., 0], float)}
    for name, optimizer in optimizers.items():
        there = BASELINES[name].factory(tuned[name].values, steps) if name in tuned else optimizer
        try:
            respond = jax.vmap(partial(dynamics.scripted_updates, optimizer), (0, None, None))
            responses[name] = np.asarray(respond(*script)[..., 0], float)
            portraits[name] = dynamics.valley_portrait(there, starts, steps)
        except ValueError as error:
            report.text(f"Left out: valley and signals of {name}. {error}")
    report.heading(
        "In the valley",
        "f(x, y) = (x - y)^2 / 2. A coordinatewise rule that is odd in gradients and ignores "
        "params keeps x + y; drift is 1 - |x + y| at the end / at the start. References have the "
        "best rates for the valley.",
    )
    report.figure(
        "valley",
        partial(plots.draw_portraits, found=portraits),
        caption="Paths from a grid of starts (arrows: first updates, dots: ends). Every point of "
        "the diagonal is a minimum.",
    )
    report.table(
        "In the valley (x - y)^2 / 2, and after an impulse (steps)",
        [
            {
                "optimizer": name,
                "rate": tuned[name].values[0] if name in tuned else None,
                # Opposite starts may drift in opposite directions, which must not cancel.
                "|drift|": _median(np.abs(plots.drifts(one))),
                "|change of x+y|": float(np.max(np.abs(one.displacement))),
                "oddness": _median(one.oddness),
                "reflection": _median(one.reflection),
                "final loss": float(np.max(one.losses[:, -1])),
                "impulse half after": plots.half_life(responses[name][0] - responses[name][-1]),
            }
            for name, one in portraits.items()
        ],
    )
    report.heading(
        "Responses to signals",
        "The other coordinates of the tensor have random gradients, as large as in training, so "
        "that rules that normalise over tensors have something to go by.",
    )
    relative = {name: one / (np.max(np.abs(one)) or 1.0) for name, one in responses.items()}
    panels: dict[str, Any] = {}
    for i, kind in enumerate(SIGNALS):
        panels[kind] = {name: one[None, i] for name, one in relative.items()}
    caption = "Updates of one coordinate, whose gradient is scripted, relative to the largest."
    report.add(curves("signals", panels, caption=caption, log=False, xlabel="step"))


def _median(values: Any) -> float | None:
    finite = np.asarray(values, float)[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def add_features(
    report: Report, inner: InnerTraining, theta: Theta, run_key: Key, key: Key
) -> None:
    """Adds what the rule makes of each feature that varies between recorded inputs."""
    learned, nothing = inner.learned, "Left out: response curves. "
    if not isinstance(learned, Coordinatewise):
        report.text(f"{nothing}{type(learned).__name__} is no lopt.Coordinatewise.")
        return
    steps, rows = report.settings["steps"], report.settings["rows"]
    state, task = begin(inner.tasks, optax.set_to_zero(), run_key), drawn(inner.tasks, run_key)
    inputs = dynamics.recorded_inputs(task, learned, theta, state.params, state.key, steps, 32)
    # Slopes and spreads are of more inputs than curves, of which nobody sees a thousand.
    chosen = jax.random.permutation(key, len(inputs.columns))[: 10 * rows]
    many = jax.tree.map(lambda leaf: leaf[chosen], inputs)
    few = jax.tree.map(lambda leaf: leaf[:rows], many)
    slopes = np.asarray(dynamics.sensitivities(learned, theta, many), float)
    given = np.concatenate([many.columns, many.shared], axis=1).astype(float)
    spreads = given.std(axis=0)
    swings = spreads * np.sqrt((slopes**2).mean(axis=0))
    order = [i for i in np.argsort(-swings, kind="stable") if spreads[i] > 0]
    names, found = learned.features.names(), {}
    for i in order[:MOST_CURVES]:
        low, high = np.quantile(given[:, i], [0.005, 0.995])
        values = jnp.linspace(low, high, 41, dtype=few.columns.dtype)
        updates = dynamics.response_curves(learned, theta, few, names[i], values)
        found[names[i]] = (np.asarray(values), np.asarray(updates))
    if not found:
        report.text(f"{nothing}No feature that the rule gets varies and stays finite.")
        return
    report.heading(
        "Response to each feature",
        "Swing is the spread of a feature over recorded inputs times the root mean square "
        "derivative of the update in it.",
    )
    means = {name: updates.mean(axis=0) for name, (_, updates) in found.items()}
    report.figure(
        "responses",
        partial(plots.draw_responses, curves=found),
        caption="The update as each feature alone is varied, at recorded inputs, and in bold the "
        "mean: the partial dependence.",
        values={name: values.tolist() for name, (values, _) in found.items()},
        means={name: mean.tolist() for name, mean in means.items()},
    )
    ranges = {name: float(np.ptp(mean)) for name, mean in means.items()}
    report.table(
        "What moves the learned rule's updates most",
        [
            {
                "feature": names[i],
                "swing": swings[i],
                "mean slope": slopes[:, i].mean(),
                "spread": spreads[i],
                "range of the mean response": ranges.get(names[i]),
            }
            for i in order[:MOST_ROWS]
        ],
    )
