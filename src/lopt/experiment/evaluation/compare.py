"""Optimizers side by side on one evaluation, and the verdict on each that is not a baseline."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.experiment.baselines import BASELINES, Contestant
from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.evaluation import Evaluation
from lopt.experiment.evaluation.trials import Entry, Trials
from lopt.experiment.report import Cell, Figure, Interval, curves, measured

Seeds = Float[np.ndarray, " seed"]
SAID = {"train": "training loss", "held_out": "held-out loss"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all optimizers achieve on one evaluation."""

    evaluation: Evaluation
    entries: tuple[Entry, ...]  # of every optimizer, one for each of its numbers of trials
    scale: metrics.Scale

    def of(self, name: str) -> Entry:
        """Returns the entry of an optimizer with the most trials."""
        return [entry for entry in self.entries if entry.contestant.name == name][-1]

    @property
    def adam(self) -> Entry:
        """Tuned Adam, which others are compared with."""
        return self.of("Adam")

    def judged(self) -> list[Entry]:
        """Returns the entries that are no baselines."""
        return [entry for entry in self.entries if not entry.contestant.is_baseline]

    def shown(self) -> list[Entry]:
        """Returns the entries that plots show: of baselines only those with the most trials."""
        judged = self.judged()
        return [e for e in self.entries if e in judged or e is self.of(e.contestant.name)]

    def final(self, entry: Entry, objective: str = "train") -> Seeds:
        """Returns the losses after training; NaN where any on the way was not finite."""
        found = entry.found[objective]
        kept = np.isfinite(found.losses).all(axis=1)
        return np.where(kept, getattr(found, objective)[:, -1], np.nan)

    def normalised(self, entry: Entry, objective: str) -> Seeds:
        """Returns the normalised losses after training."""
        return self.scale.normalised(self.final(entry, objective)[:, None], objective)[:, 0]

    def area(self, entry: Entry, objective: str) -> Seeds:
        """Returns the means over the run of the normalised losses."""
        found = entry.found[objective]
        values = found.losses if objective == "train" else found.held_out[:, 1:]
        return self.scale.normalised(values, objective).mean(axis=1)

    def steps(self, entry: Entry) -> Seeds:
        """Returns the steps until the training loss is where tuned Adam's ends; may be infinite."""
        level = float(metrics.final_level(self.adam.found["train"].losses).mean())
        return metrics.steps_to(entry.found["train"].losses, level, self.evaluation.horizon)

    def difference(
        self, entry: Entry, objective: str, adam: Entry | None = None
    ) -> tuple[Interval, str]:
        """Returns by how much log losses are above tuned Adam's, paired by seed, and their kind.

        Where losses are negative they have no logarithms, and normalised losses are compared.
        """
        both, kind = (entry, adam or self.adam), "log losses"
        sides: list[Any] = [self.scale.logs(self.final(e, objective), objective) for e in both]
        if any(side is None for side in sides):
            sides = [self.normalised(one, objective) for one in both]
            kind = "normalised losses"
        return metrics.paired(np.asarray(sides[0] - sides[1])), kind

    def verdicts(self) -> list[dict[str, Cell]]:
        """Returns, of each entry that is no baseline, what is to be said of it against Adam."""
        rows: list[dict[str, Cell]] = []
        for entry in self.judged():
            row: dict[str, Cell] = {"task": self.evaluation.name, "optimizer": entry.name}
            for objective, said in SAID.items():
                found, row["differences of"] = self.difference(entry, objective)
                row |= {said: metrics.verdict(found), f"{said}, difference": found}
            adams = [e for e in self.entries if e.contestant is self.adam.contestant]
            alike = next(e for e in reversed(adams) if e.budget <= entry.budget)
            equal = metrics.verdict(self.difference(entry, "train", alike)[0])
            rows.append(row | {"training loss, at equal trials": equal})
        return rows

    def rows(self) -> list[dict[str, Cell]]:
        """Returns a row of numbers for each entry."""
        metric = "accuracy" if "accuracy" in self.adam.found["train"].metrics else "loss"
        rows: list[dict[str, Cell]] = []
        for entry in self.entries:
            steps, tuned = self.steps(entry), entry.tuned["train"]
            reached = steps[np.isfinite(steps)]
            level = float(metrics.final_level(entry.found["train"].losses).mean())
            rows.append(
                {
                    "optimizer": entry.contestant.name,
                    "trials": tuned.trials,
                    "rate": tuned.values[0],
                    "final loss": measured(self.final(entry)),
                    "normalised": float(self.normalised(entry, "train").mean()),
                    f"test {metric}": measured(entry.found["held_out"].metrics[metric]),
                    "steps to tuned Adam": measured(reached) if reached.size else None,
                    "by seeds": len(reached),
                    "Adam steps to its loss": self.scale.adam_steps(level),
                }
            )
        return rows

    def over_seeds(self) -> dict[str, Cell]:
        """Returns what optimizers of several seeds of meta-training, as they are, achieve."""
        ones = [entry for entry in self.judged() if entry.budget == 1]
        row: dict[str, Cell] = {"task": self.evaluation.name}
        for objective, said in SAID.items():
            row[said] = measured(np.array([self.final(one, objective).mean() for one in ones]))
            row[f"{said}, tuned Adam"] = measured(self.final(self.adam, objective))
        return row

    def summary(self) -> dict[str, Any]:
        """Returns what the JSON has besides the tables."""
        names = ("name", "group", "place", "horizon", "num_seeds", "trained_on")
        return {
            **{name: getattr(self.evaluation, name) for name in names},
            "scale": {"best": self.scale.best, "init": self.scale.init},
            "rows": [
                {
                    "optimizer": entry.contestant.name,
                    "budget": entry.budget,
                    "chosen": {name: one._asdict() for name, one in entry.tuned.items()},
                    "final_losses": self.final(entry).tolist(),
                    "held_out_losses": self.final(entry, "held_out").tolist(),
                    "test": {k: v.tolist() for k, v in entry.found["held_out"].metrics.items()},
                    "microseconds_per_step": entry.microseconds,
                    "state_bytes_per_param": entry.state_bytes,
                }
                for entry in self.entries
            ],
        }


def compare(evaluation: Evaluation, contestants: Sequence[Contestant], seed: int = 0) -> Comparison:
    """Tunes optimizers on an evaluation and trains them on fresh seeds; Adam is always there.

    What is on disk already is not trained again.
    """
    adam = BASELINES["Adam"]
    every = [*contestants] if adam in contestants else [*contestants, adam]
    names = [contestant.name for contestant in every]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"There are two optimizers {twice[0]!r}; give one of them another name.")
    trials = Trials(evaluation, seed)
    trials.compile(every)
    scale = trials.scale()
    entries = tuple(entry for one in every for entry in trials.entries(one))
    return Comparison(evaluation, entries, scale)


def curves_of(
    name: str, comparisons: Sequence[Comparison], most: int | None = None, *, seeds: bool = False
) -> Figure:
    """Returns a figure of the training losses of all optimizers, tuned ones for baselines.

    With `seeds`, those that were judged are one, the band of which is over meta-training's seeds.
    """
    panels = {}
    for one in comparisons:
        horizon, panel = one.evaluation.horizon, {}
        shown = {entry.name: entry.found["train"].losses for entry in one.shown()}
        if seeds:
            means = [e.found["train"].losses.mean(axis=0) for e in one.judged() if e.budget == 1]
            shown = {"learned": np.stack(means), "Adam": one.adam.found["train"].losses}
        for label, losses in shown.items():
            every = np.repeat(losses, max(1, horizon // losses.shape[1]), axis=1)
            panel[label] = np.pad(every, ((0, 0), (horizon - every.shape[1], 0)), "edge")
        panels[one.evaluation.name] = panel
    style: Any = {"most": most, "xlabel": "inner step", "ylabel": "training loss"}
    return curves(name, panels, "Training losses, mean and standard error over seeds.", **style)
