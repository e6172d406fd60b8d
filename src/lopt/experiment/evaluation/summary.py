"""The report of evaluations: tables over all tasks, verdicts, profiles, sweeps, and each task."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.compare import SAID, Comparison, curves_of
from lopt.experiment.evaluation.trials import Entry
from lopt.experiment.report import Cell, Figure, Interval, Report, bands, curves
from lopt.experiment.runs.run import add_log

# Evaluations whose tables the terminal shows, whose verdicts it shows, and that have a panel.
SHOWN, SAID_OF, PANELS = 6, 20, 12
Pairs = list[tuple[Comparison, Entry]]


def evaluation_report(
    name: str,
    comparisons: Sequence[Comparison],
    logs: Sequence[Mapping[str, Float[np.ndarray, " outer"]]] = (),
) -> Report:
    """Returns the report: each task, groups of tasks, all of them, and meta-training by its log.

    Several logs are those of seeds of meta-training, whose optimizers were judged.
    """
    data = {"evaluations": [comparison.summary() for comparison in comparisons]}
    report, count = Report(f"Evaluation of {name}", data=data), len(comparisons)
    groups: dict[str, list[Comparison]] = {}
    for one in comparisons:
        about = one.evaluation
        groups.setdefault(about.group, []).append(one)
        title = f"{about.name} ({about.horizon} steps, {about.num_seeds} seeds)"
        report.table(title, one.rows(), detail=count > SHOWN)
        edge = [e.name for e in one.entries if any(tuned.at_edge for tuned in e.tuned.values())]
        said = f"Still at the edge of what was tried: {', '.join(edge)}." if edge else ""
        report.text(said, detail=count > SHOWN)
    for group, some in groups.items() if len(groups) > 1 else ():
        title = f"{group or 'others'}, {len(some)} tasks: normalised training loss"
        report.table(title, loss_rows(some, "train"))
    for objective, said in SAID.items():
        report.table(f"All {count} tasks: normalised {said}", loss_rows(comparisons, objective))
    report.table(f"All {count} tasks: speed and memory", cost_rows(comparisons))
    verdicts = [row for comparison in comparisons for row in comparison.verdicts()]
    title = "Against tuned Adam: log losses, paired by seed, 95 % intervals"
    report.table(title, verdicts, detail=count > SAID_OF)
    for text in worst(comparisons):
        report.text(text)
    report.add(curves_of("curves", comparisons, PANELS))
    report.add(_profiles(comparisons))
    report.add(_tuning(comparisons))
    for group, some in groups.items():
        if all(one.evaluation.place is not None for one in some) and len(some) > 1:
            report.add(_sweep(group, some))
    if len(logs) > 1:
        rows = [one.over_seeds() for one in comparisons]
        report.table(f"{len(logs)} seeds of meta-training: mean and standard error", rows)
        report.add(curves_of("seeds", comparisons, PANELS, seeds=True))
    if logs:
        add_log(report, *logs)
    return report


def _by_name(comparisons: Sequence[Comparison], shown: bool = False) -> dict[str, Pairs]:
    """Returns, by name, the entries of optimizers that were judged on all of these."""
    found: dict[str, Pairs] = {}
    for one in comparisons:
        for entry in one.shown() if shown else one.entries:
            found.setdefault(entry.name, []).append((one, entry))
    return {name: pairs for name, pairs in found.items() if len(pairs) == len(comparisons)}


def _candidates(comparisons: Sequence[Comparison]) -> dict[str, Pairs]:
    """Returns those that are no baselines."""
    judged = {entry.name for one in comparisons for entry in one.judged()}
    return {name: pairs for name, pairs in _by_name(comparisons).items() if name in judged}


def _head(pairs: Pairs) -> dict[str, Cell]:
    return {"optimizer": pairs[0][1].contestant.name, "trials": pairs[0][1].budget}


def loss_rows(comparisons: Sequence[Comparison], objective: str) -> list[dict[str, Cell]]:
    """Returns losses of each optimizer over tasks, failures, and what they are worth."""
    random, rows = np.stack([one.scale.random[objective] for one in comparisons]), []
    for pairs in _by_name(comparisons).values():
        ends = [one.normalised(entry, objective) for one, entry in pairs]
        areas = [one.area(entry, objective) for one, entry in pairs]
        mean = metrics.stratified(ends, np.mean)
        worth = [metrics.worth(loss, random) for loss in (mean.value, mean.high, mean.low)]
        row = _head(pairs) | {"interquartile mean": metrics.stratified(ends)}
        row["area under curve"] = metrics.stratified(areas)
        row["failures, %"] = 100 * float(np.mean(np.concatenate(ends) > 1))
        row["worth random Adam trials"] = Interval(*worth)
        rows.append(row)
    return rows


def cost_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Cell]]:
    """Returns steps and seconds to tuned Adam's loss, profiles, time and memory of each."""
    pairs, rows = _by_name(comparisons), []
    scores = metrics.profile(_steps(pairs)).mean(axis=1)
    for some, score in zip(pairs.values(), scores, strict=True):
        faster = [one.evaluation.horizon / one.steps(entry) for one, entry in some]
        times = [one.adam.microseconds / entry.microseconds for one, entry in some]
        clock = [x * time for x, time in zip(faster, times, strict=True)]
        row = _head(some) | {
            "speed-up in steps": float(np.median(np.concatenate(faster))),
            "in seconds": float(np.median(np.concatenate(clock))),
            "share of runs there": float(np.mean(np.concatenate(faster) > 0)),
            "profile score": float(score),
            "μs per step": float(np.median([e.microseconds for _, e in some])),
            "state bytes per param": float(np.median([e.state_bytes for _, e in some])),
        }
        rows.append(row)
    return rows


def worst(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns, of each entry that is no baseline, its verdicts counted and its worst tasks."""
    texts = []
    for name, pairs in _candidates(comparisons).items():
        found = [metrics.verdict(one.difference(entry, "train")[0]) for one, entry in pairs]
        losses = {one.evaluation.name: one.normalised(e, "train") for one, e in pairs}
        last = sorted(losses, key=lambda task: -losses[task].mean())[:3]
        shown = ", ".join(f"{task} ({losses[task].mean():.2f})" for task in last)
        failed = sum(bool((values > 1).any()) for values in losses.values())
        texts.append(
            f"{name} beats tuned Adam on {found.count('beats')} of {len(pairs)} tasks in training "
            f"loss, falls behind on {found.count('falls behind')}, and "
            f"{found.count('inconclusive')} are inconclusive; it ends above the start on {failed}. "
            f"Worst, by normalised loss: {shown}."
        )
    return texts


def _steps(pairs: Mapping[str, Pairs]) -> Float[np.ndarray, "contestant problem"]:
    return np.stack([np.concatenate([one.steps(e) for one, e in some]) for some in pairs.values()])


def _profiles(comparisons: Sequence[Comparison]) -> Figure:
    pairs = _by_name(comparisons, shown=True)
    shares = metrics.profile(_steps(pairs))[:, None]
    panel = {"Profiles": dict(zip(pairs, shares, strict=True))}
    about = "Share of runs that reach tuned Adam's loss within a ratio of the fewest steps."
    style: Any = {"log": False, "xlabel": "ratio of steps", "ylabel": "share"}
    return curves("profiles", panel, about, steps=metrics.RATIOS.tolist(), **style)


def _tuning(comparisons: Sequence[Comparison]) -> Figure:
    """Returns the loss that the best of k random settings of Adam has, beside what is judged."""
    random = np.stack([one.scale.random["train"] for one in comparisons])
    counts = range(1, 1 + random.shape[1])
    best = np.array([[metrics.expected_best(random, k).mean() for k in counts]])
    lines = {"Adam (best of random settings)": best}
    for name, pairs in _candidates(comparisons).items():
        lines[name] = np.mean([[one.normalised(e, "train").mean()] for one, e in pairs], axis=0)
    style: Any = {"log": "x", "xlabel": "trials", "ylabel": "normalised training loss"}
    about = "Means over tasks; dashed, what is judged."
    return curves("tuning", {"What tuning is worth": lines}, about, steps=counts, **style)


def _sweep(group: str, comparisons: Sequence[Comparison]) -> Figure:
    """Returns losses over what a sweep changes; the range of meta-training is shaded."""
    ordered = sorted(comparisons, key=lambda one: one.evaluation.place or 0)
    about = [(float(one.evaluation.place or 0), one.evaluation.trained_on) for one in ordered]
    places, shaded = [place for place, _ in about], [place for place, trained in about if trained]
    lines = {
        name: np.stack([one.normalised(entry, "train") for one, entry in pairs], axis=1)
        for name, pairs in _by_name(ordered, shown=True).items()
    }

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        if shaded:
            span = 0.9 * min(shaded), 1.1 * max(shaded)
            axes.axvspan(*span, color="#dddddd", lw=0, label="meta-training")
        said = "normalised training loss"
        bands(axes, lines, steps=places, log="x", xlabel=group, ylabel=said)

    means = {name: values.mean(axis=0).tolist() for name, values in lines.items()}
    data = {"places": places, "shaded": shaded, "means": means}
    caption = f"Sweep over {group}; shaded, trained on."
    return Figure(f"sweep_{group.replace(' ', '_')}", draw, (6.4, 4.6), caption, data)
