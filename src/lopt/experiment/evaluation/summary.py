"""The report of evaluations: tables over all tasks, verdicts, profiles, sweeps, and each task."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.compare import Comparison, curves_of
from lopt.experiment.evaluation.trials import OBJECTIVES, Entry
from lopt.experiment.report import Cell, Figure, Interval, Report, bands, curves
from lopt.experiment.report.plots import color_of, finish, running_mean

# Evaluations whose tables the terminal shows; those of more are on the page.
SHOWN, PANELS = 6, 12
RATIOS = np.linspace(1, metrics.LARGEST_RATIO, 61)


def evaluation_report(
    name: str,
    comparisons: Sequence[Comparison],
    log: Mapping[str, Float[np.ndarray, " outer"]] | None = None,
) -> Report:
    """Returns the report: over all tasks and groups, each task, and meta-training with its log."""
    data = {"evaluations": [comparison.summary() for comparison in comparisons]}
    report, many = Report(f"Evaluation of {name}", data=data), len(comparisons) > SHOWN
    for comparison in comparisons:
        about = comparison.evaluation
        title = f"{about.name} ({about.horizon} steps, {about.num_seeds} seeds)"
        report.table(title, comparison.rows(), detail=many)
        for entry in comparison.judged():
            report.text(comparison.sentence(entry), detail=many)
        if edge := [entry.name for entry in comparison.entries if entry.at_edge]:
            report.text(f"Still at the edge of what was tried: {', '.join(edge)}.", detail=many)
    groups = dict.fromkeys(one.evaluation.group for one in comparisons)
    for group in groups if len(groups) > 1 else ():
        some = [one for one in comparisons if one.evaluation.group == group]
        report.table(f"Group: {group or 'others'} ({len(some)} tasks)", summary_rows(some))
    report.table(f"All {len(comparisons)} tasks: losses", summary_rows(comparisons))
    report.table(f"All {len(comparisons)} tasks: cost", cost_rows(comparisons))
    report.table(
        "Against tuned Adam: differences of log losses, paired by seed, 95 % intervals",
        [row for comparison in comparisons for row in comparison.verdicts()],
    )
    for text in worst(comparisons):
        report.text(text)
    report.add(curves_of("curves", comparisons, PANELS))
    report.add(_profiles(comparisons))
    report.add(_tuning(comparisons))
    for group in groups:
        some = [one for one in comparisons if one.evaluation.group == group]
        if all(one.evaluation.place is not None for one in some) and len(some) > 1:
            report.add(_sweep(group, some))
    if log is not None:
        _add_log(report, log)
    return report


def _by_name(comparisons: Sequence[Comparison]) -> dict[str, list[tuple[Comparison, Entry]]]:
    """Returns, by name, the entries of optimizers that were judged on all of these."""
    found: dict[str, list[tuple[Comparison, Entry]]] = {}
    for comparison in comparisons:
        for entry in comparison.entries:
            found.setdefault(entry.name, []).append((comparison, entry))
    return {name: pairs for name, pairs in found.items() if len(pairs) == len(comparisons)}


def summary_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Cell]]:
    """Returns losses of each optimizer over tasks: interquartile means with 95 % intervals."""
    random = {k: np.stack([one.random[k] for one in comparisons]) for k in OBJECTIVES}
    rows = []
    for name, pairs in _by_name(comparisons).items():
        row: dict[str, Cell] = {"optimizer": name}
        for objective, said in zip(OBJECTIVES, ("train", "held out"), strict=True):
            ends = [one.normalised(entry, objective) for one, entry in pairs]
            areas = [one.area(entry, objective) for one, entry in pairs]
            row[f"{said}, final"] = metrics.stratified(ends)
            row[f"{said}, area"] = metrics.stratified(areas)
            mean = metrics.stratified(ends, np.mean)
            found = [metrics.worth(x, random[objective]) for x in (mean.value, mean.high, mean.low)]
            if objective == "train":
                row["failures, %"] = 100 * float(np.mean(np.concatenate(ends) > 1))
                row["worth random Adam trials"] = Interval(*found)
        rows.append(row)
    return rows


def cost_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Cell]]:
    """Returns steps and seconds to tuned Adam's loss, profiles, time and memory of each."""
    pairs = _by_name(comparisons)
    scores = metrics.profile_scores(_steps(pairs))
    rows: list[dict[str, Cell]] = []
    for (name, some), score in zip(pairs.items(), scores, strict=True):
        faster, times = [], []
        for one, entry in some:
            faster.append(one.evaluation.horizon / one.steps(entry))
            times.append(one.adam.microseconds / entry.microseconds)
        clock = np.concatenate([x * time for x, time in zip(faster, times, strict=True)])
        rows.append(
            {
                "optimizer": name,
                "speed-up in steps": float(np.median(np.concatenate(faster))),
                "in seconds": float(np.median(clock)),
                "share of runs there": float(np.mean(np.concatenate(faster) > 0)),
                "profile score": float(score),
                "microseconds per step": float(np.median([e.microseconds for _, e in some])),
                "state bytes per param": float(np.median([e.state_bytes for _, e in some])),
            }
        )
    return rows


def worst(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns, of each entry that is no baseline, its verdicts counted and its worst tasks."""
    texts, names = [], [entry.name for entry in comparisons[0].judged()]
    for name, pairs in _by_name(comparisons).items():
        if name not in names:
            continue
        counts = {"beats": 0, "falls behind": 0, "is inconclusive against": 0}
        losses = {}
        for one, entry in pairs:
            counts[metrics.verdict(one.difference(entry, one.adam, "train")[0])] += 1
            losses[one.evaluation.name] = one.normalised(entry, "train")
        said = ", ".join(f"{verb} tuned Adam on {count}" for verb, count in counts.items())
        last = sorted(losses, key=lambda task: -losses[task].mean())[:3]
        shown = ", ".join(f"{task} ({losses[task].mean():.2f})" for task in last)
        failed = sum(int((values > 1).any()) for values in losses.values())
        texts.append(
            f"{name}: {said} of {len(pairs)} tasks in training loss; worse than the start on "
            f"{failed}. Worst, by normalised loss: {shown}."
        )
    return texts


def _steps(pairs: Mapping[str, Any]) -> Float[np.ndarray, "contestant problem"]:
    return np.stack([np.concatenate([one.steps(e) for one, e in some]) for some in pairs.values()])


def _profiles(comparisons: Sequence[Comparison]) -> Figure:
    pairs = _by_name(comparisons)
    shares = metrics.profile(_steps(pairs), RATIOS)
    lines = {name: share[None] for name, share in zip(pairs, shares, strict=True)}
    caption = "Share of tasks and seeds that reach tuned Adam's loss within a ratio of the fewest "
    style: Any = {"log": False, "xlabel": "ratio of steps", "ylabel": "share"}
    panels = {"Performance profile (Dolan and More)": lines}
    return curves("profiles", panels, caption + "steps.", steps=RATIOS.tolist(), **style)


def _tuning(comparisons: Sequence[Comparison]) -> Figure:
    """Returns the loss that the best of k random settings of Adam has, beside what is judged."""
    random = np.stack([one.random["train"] for one in comparisons])
    counts = range(1, random.shape[1] + 1)
    best = np.array([metrics.expected_best(random, k).mean() for k in counts])
    lines: dict[str, Any] = {"Adam (best of random settings)": best[None]}
    for name, pairs in _by_name(comparisons).items():
        if pairs[0][1] in pairs[0][0].judged():
            lines[name] = np.array([one.normalised(e, "train").mean() for one, e in pairs])
    style: Any = {"log": "x", "xlabel": "trials", "ylabel": "normalised loss"}
    caption = "Mean normalised training loss over tasks; dashed, what is judged."
    return curves("tuning", {"Worth of trials": lines}, caption, steps=list(counts), **style)


def _sweep(group: str, comparisons: Sequence[Comparison]) -> Figure:
    """Returns losses over what a sweep changes; the range of meta-training is shaded."""
    ordered = sorted(comparisons, key=lambda one: one.evaluation.place or 0)
    places = [float(one.evaluation.place or 0) for one in ordered]
    trained = [p for p, one in zip(places, ordered, strict=True) if one.evaluation.trained_on]
    pairs = _by_name(ordered)
    last = {one.name for one in ordered[0].judged()}
    last |= {ordered[0].of(one.contestant.name).name for one in ordered[0].entries}
    lines = {
        name: np.stack([one.normalised(entry, "train") for one, entry in pairs[name]], axis=1)
        for name in pairs
        if name in last
    }

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        if trained:
            span = 0.9 * min(trained), 1.1 * max(trained)
            axes.axvspan(*span, color="#dddddd", lw=0, label="meta-training")
        style: Any = {"log": "x", "xlabel": group, "ylabel": "normalised training loss"}
        bands(axes, lines, steps=places, **style)

    means = {name: values.mean(axis=0).tolist() for name, values in lines.items()}
    data = {"places": places, "trained_on": trained, "means": means}
    name = f"sweep_{group.replace(' ', '_')}"
    return Figure(name, draw, caption=f"Sweep over {group}, mean and standard error.", data=data)


def _add_log(report: Report, log: Mapping[str, Float[np.ndarray, " outer"]]) -> None:
    report.data["outer_steps"] = len(log["seconds"])
    report.data["seconds_of_meta_training"] = float(np.nansum(log["seconds"]))
    if skipped := int(np.sum(log["finite"] == 0)):
        report.text(f"Skipped outer steps: {skipped}.")
    if dropped := int(np.nansum(log["dropped"])):
        report.text(f"Dropped particles: {dropped}.")
    report.figure("meta_training", functools.partial(_draw_meta_losses, losses=log["meta_loss"]))


def _draw_meta_losses(figure: Any, losses: Float[np.ndarray, " outer"]) -> None:
    axes = figure.add_subplot()
    axes.plot(losses, color="#bbbbbb", lw=0.6, label="each outer step")
    width = max(1, losses.size // 50)
    if losses.size > width:
        seen = np.isfinite(losses)
        share = running_mean(seen.astype(float), width)
        mean = running_mean(np.where(seen, losses, 0), width) / np.where(share > 0, share, np.nan)
        axes.plot(mean, color=color_of("learned"), lw=1.8, label=f"mean of {width}")
    finish(axes, xlabel="outer step", ylabel="meta-loss", title="Meta-training")
