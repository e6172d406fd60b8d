"""Optimizers side by side on one evaluation, and the verdict on each that is not a baseline."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.experiment.baselines import BASELINES, Contestant
from lopt.experiment.evaluation import metrics
from lopt.experiment.evaluation.evaluation import Evaluation
from lopt.experiment.evaluation.trials import OBJECTIVES, Entry, Trials
from lopt.experiment.report import Cell, Figure, Interval, curves, measured

Seeds = Float[np.ndarray, " seed"]
SAID = {"train": "training loss", "held_out": "held-out loss"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all optimizers achieve on one evaluation.

    Attributes:
        entries: of every optimizer, one for each of its numbers of trials.
        scale: of losses.
    """

    evaluation: Evaluation
    entries: tuple[Entry, ...]
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
        known = (*BASELINES, "OptList")
        return [entry for entry in self.entries if entry.contestant.name not in known]

    def shown(self) -> list[Entry]:
        """Returns the entries that plots show: of baselines only those with the most trials."""
        judged = self.judged()
        return [e for e in self.entries if e in judged or e is self.of(e.contestant.name)]

    def final(self, entry: Entry, objective: str = "train") -> Seeds:
        """Returns the losses after training, of what was chosen for the objective."""
        return getattr(entry.found[objective], objective)[:, -1]

    def normalised(self, entry: Entry, objective: str) -> Seeds:
        """Returns the normalised losses after training."""
        ends = np.where(self.diverged(entry, objective), np.nan, self.final(entry, objective))
        return self.scale.normalised(ends[:, None], objective)[:, 0]

    def area(self, entry: Entry, objective: str) -> Seeds:
        """Returns the means over the run of the normalised losses."""
        found = entry.found[objective]
        values = found.losses if objective == "train" else found.held_out[:, 1:]
        return self.scale.normalised(values, objective).mean(axis=1)

    def diverged(self, entry: Entry, objective: str) -> Any:
        """Returns whether a loss was not finite, by seed."""
        found = entry.found[objective]
        every = np.concatenate([found.losses, self.final(entry, objective)[:, None]], axis=1)
        return ~np.isfinite(every).all(axis=1)

    def steps(self, entry: Entry) -> Seeds:
        """Returns the steps until the training loss is where tuned Adam's ends; may be infinite."""
        level = float(metrics.final_level(self.adam.found["train"].losses).mean())
        return metrics.steps_to(entry.found["train"].losses, level, self.evaluation.horizon)

    def difference(self, entry: Entry, other: Entry, objective: str) -> tuple[Interval, str]:
        """Returns by how much log losses are above another's, paired by seed, and what they are.

        Where losses are negative they have no logarithms, and normalised losses are compared.
        """
        sides: list[Any] = []
        kind = "log losses"
        for one in (entry, other):
            gone, ends = self.diverged(one, objective), self.final(one, objective)
            sides.append(self.scale.logs(np.where(gone, np.nan, ends), objective))
        if any(side is None for side in sides):
            sides = [self.normalised(one, objective) for one in (entry, other)]
            kind = "normalised losses"
        return metrics.paired(np.asarray(sides[0] - sides[1])), kind

    def verdicts(self) -> list[dict[str, Cell]]:
        """Returns, of each entry that is no baseline, what is to be said of it against Adam."""
        rows: list[dict[str, Cell]] = []
        for entry in self.judged():
            row: dict[str, Cell] = {"task": self.evaluation.name, "optimizer": entry.name}
            for objective in OBJECTIVES:
                found, kind = self.difference(entry, self.adam, objective)
                row[SAID[objective]] = f"{metrics.verdict(found)} tuned Adam"
                row[f"{SAID[objective]}, difference"] = found
                row[f"{SAID[objective]}, of"] = kind
            rows.append(row)
        return rows

    def sentence(self, entry: Entry) -> str:
        """Returns the verdict on an entry in words, against tuned Adam and Adam at its default."""
        default = next(one for one in self.entries if one.contestant.name == "Adam")
        sides = (self.adam, "tuned Adam"), (self.adam, "tuned Adam"), (default, "untuned Adam")
        parts = []
        for (other, said), objective in zip(sides, (*OBJECTIVES, "train"), strict=True):
            found, kind = self.difference(entry, other, objective)
            parts.append(f"{metrics.verdict(found)} {said} in {SAID[objective]} ({found})")
        return (
            f"{entry.name} {parts[0]}, {parts[1]}, and {parts[2]}: differences of {kind}, paired "
            "by seed, with 95 % intervals."
        )

    def rows(self) -> list[dict[str, Cell]]:
        """Returns a row of numbers for each entry."""
        metric = "accuracy" if "accuracy" in self.adam.found["train"].metrics else "loss"
        rows: list[dict[str, Cell]] = []
        for entry in self.entries:
            steps = self.steps(entry)
            reached = steps[np.isfinite(steps)]
            level = float(metrics.final_level(entry.found["train"].losses).mean())
            rows.append(
                {
                    "optimizer": entry.contestant.name,
                    "trials": entry.tuned["train"].trials,
                    "rate": entry.tuned["train"].values[0],
                    "final loss": measured(self.final(entry)),
                    "normalised": float(self.normalised(entry, "train").mean()),
                    f"test {metric}": measured(entry.found["held_out"].metrics[metric]),
                    "steps to tuned Adam": measured(reached) if reached.size else None,
                    "by seeds": len(reached),
                    "Adam steps to its loss": self.scale.adam_steps(level),
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """Returns what the JSON has besides the table."""
        names = ("name", "group", "place", "horizon", "num_seeds", "trained_on")
        return {
            **{name: getattr(self.evaluation, name) for name in names},
            "scale": {"best": self.scale.best, "init": self.scale.init},
            "rows": [
                {
                    "optimizer": entry.contestant.name,
                    "budget": entry.budget,
                    "trials": entry.tuned["train"].trials,
                    "learning_rate_at_edge_of_grid": any(
                        one.at_edge for one in entry.tuned.values()
                    ),
                    "chosen": {name: one.values for name, one in entry.tuned.items()},
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
    names = [contestant.name for contestant in contestants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"There are two optimizers {twice[0]!r}; give one of them another name.")
    every = [*contestants] if "Adam" in names else [*contestants, BASELINES["Adam"]]
    trials = Trials(evaluation, seed)
    trials.compile(every)
    scale = trials.scale()
    entries = tuple(entry for one in every for entry in trials.entries(one))
    return Comparison(evaluation, entries, scale)


def curves_of(name: str, comparisons: Sequence[Comparison], most: int | None = None) -> Figure:
    """Returns a figure of the training losses of all optimizers, tuned ones for baselines."""
    panels = {}
    for one in comparisons:
        horizon, panel = one.evaluation.horizon, {}
        for entry in one.shown():
            losses = entry.found["train"].losses
            every = np.repeat(losses, max(1, horizon // losses.shape[1]), axis=1)
            first = np.repeat(every[:, :1], horizon - every.shape[1], axis=1)
            panel[entry.name] = np.concatenate([first, every], axis=1)
        panels[one.evaluation.name] = panel
    style: Any = {"most": most, "xlabel": "inner step", "ylabel": "training loss"}
    return curves(name, panels, "Training losses, mean and standard error over seeds.", **style)
