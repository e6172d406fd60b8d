"""What evaluations measure: normalised losses, intervals, profiles, and what tuning is worth.

Normalised losses are those of Metz et al. 2020, arXiv:2009.11243; interquartile means with
stratified intervals those of Agarwal et al. 2021, arXiv:2108.13264; profiles those of Dolan and
More 2002, integrated as AlgoPerf does (Dahl et al. 2023, arXiv:2306.07179).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from lopt.experiment.report import Interval, running_mean

# Where losses are worse than all that is told apart, and the share of a run that is its end.
CLIP, END = 2.0, 0.05
# Losses below this share of the initial one are as good as zero.
ZERO = 1e-8
LEVEL = 0.95
# Of costs, over which profiles are drawn and their scores are means.
RATIOS = np.linspace(1, 4, 301)
# The interquartile mean: that of the middle half.
iqm = functools.partial(stats.trim_mean, proportiontocut=0.25, axis=-1)

Seeds = Float[np.ndarray, " seed"]


def normalised(losses: ArrayLike, best: float, init: float) -> Float[np.ndarray, "..."]:
    """Returns n(l) = clip((l - best) / (init - best), -2, 2); 2 where a loss is not finite.

    From the first such loss on, along the last axis, it stays at 2: the run has diverged.
    """
    values = np.asarray(losses, float)
    gone = ~np.isfinite(values)
    gone = np.logical_or.accumulate(gone, axis=-1) if values.ndim else gone
    span = max(init - best, np.finfo(float).tiny)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(gone, CLIP, np.clip((values - best) / span, -CLIP, CLIP))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of a task's losses, by objective: what Adam in many configurations made of them."""

    best: dict[str, float]  # the least of all, a mean over seeds
    init: dict[str, float]
    envelope: Float[np.ndarray, " window"]  # the least so far, at whichever rate
    steps: Float[np.ndarray, " window"]  # at which windows end
    random: dict[str, Float[np.ndarray, " setting"]]  # normalised, at the end, of random settings

    @classmethod
    def of(cls, rates: Sequence[Any], others: Sequence[Any], horizon: int) -> "Scale":
        """Returns the scale from trials of Adam at rates, and at other settings."""
        best, init, random = {}, {}, {}
        for name in ("train", "held_out"):
            means = np.stack([getattr(one, name).mean(axis=0) for one in (*rates, *others)])
            seen = np.isfinite(means)
            best[name] = float(np.min(means, where=seen, initial=np.inf))
            init[name] = float(means[0, 0])
            ends = means[len(rates) :, -1:]
            random[name] = normalised(ends, best[name], init[name])[:, 0]
        curves = np.stack([one.losses.mean(axis=0) for one in rates])
        smooth = running_mean(np.where(np.isfinite(curves), curves, np.inf), _width(curves))
        envelope = np.minimum.accumulate(smooth.min(axis=0))
        return cls(best, init, envelope, ends_of_windows(curves.shape[1], horizon), random)

    def normalised(self, losses: ArrayLike, objective: str) -> Float[np.ndarray, "..."]:
        """Returns normalised losses; see the function of this name."""
        return normalised(losses, self.best[objective], self.init[objective])

    def logs(self, losses: Seeds, objective: str) -> Seeds | None:
        """Returns log losses, of diverged runs of the clip value; None if any is negative."""
        best, init = self.best[objective], self.init[objective]
        worst = best + CLIP * (init - best)
        kept = np.where(np.isfinite(losses), np.minimum(losses, worst), worst)
        if kept.min() < 0 or init <= 0:
            return None
        return np.log(np.maximum(kept, ZERO * init))

    def adam_steps(self, loss: float) -> float:
        """Returns after how many steps Adam at its best rate has this loss; infinite if never."""
        reached = np.flatnonzero(self.envelope <= loss)
        if not reached.size:
            return np.inf
        last = reached[0]
        first = last - 1 if last and np.isfinite(self.envelope[last - 1]) else last
        return float(np.interp(loss, self.envelope[[last, first]], self.steps[[last, first]]))


def ends_of_windows(count: int, horizon: int) -> Float[np.ndarray, " window"]:
    """Returns the steps at which windows of training losses end."""
    width = max(1, horizon // count)
    return horizon - width * np.arange(count, dtype=float)[::-1]


def _width(losses: Float[np.ndarray, "... window"]) -> int:
    return max(1, round(END * losses.shape[-1]))


def final_level(losses: Float[np.ndarray, "... window"]) -> Float[np.ndarray, "..."]:
    """Returns the mean training loss over the last twentieth of a run."""
    return losses[..., -_width(losses) :].mean(axis=-1)


def steps_to(
    losses: Float[np.ndarray, "seed window"], level: float, horizon: int
) -> Float[np.ndarray, " seed"]:
    """Returns the steps until the mean over a twentieth of a run is at a level, or infinity."""
    width, steps = _width(losses), ends_of_windows(losses.shape[1], horizon)
    gone = np.logical_or.accumulate(~np.isfinite(losses), axis=1)
    smooth = running_mean(np.where(gone, np.inf, losses), width)
    hits = smooth[:, width - 1 :] <= level
    return np.where(hits.any(axis=1), steps[width - 1 :][hits.argmax(axis=1)], np.inf)


def paired(differences: Seeds) -> Interval:
    """Returns the mean of paired differences with a bootstrap interval for few seeds.

    Percentiles are taken further out, so that the interval has the width of Student's where it
    should, and 95 % in it are not 80 with five seeds (Hesterberg 2015, arXiv:1411.5279, 4.4).
    """
    count = len(differences)
    student = stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.sqrt(count / (count - 1))
    return _bootstrapped((differences,), np.mean, float(1 - 2 * stats.norm.sf(student)))


def verdict(difference: Interval) -> str:
    """Returns "beats", "falls behind" or "inconclusive": of losses, where lower is better."""
    if difference.high < 0:
        return "beats"
    return "falls behind" if difference.low > 0 else "inconclusive"


def stratified(samples: Sequence[Seeds], statistic: Callable[..., Any] = iqm) -> Interval:
    """Returns a statistic of all samples, with an interval from resampling seeds within tasks."""

    def joined(*parts: Any, axis: int = -1) -> Any:
        return statistic(np.concatenate(parts, axis=axis), axis=axis)

    return _bootstrapped(samples, joined, LEVEL)


def _bootstrapped(samples: Sequence[Seeds], statistic: Any, level: float) -> Interval:
    options: Any = {"method": "percentile", "vectorized": True, "rng": np.random.default_rng(0)}
    options |= {"confidence_level": level, "n_resamples": 9999 if len(samples) == 1 else 2000}
    low, high = stats.bootstrap(samples, statistic, **options).confidence_interval
    return Interval(float(statistic(*samples, axis=-1)), float(low), float(high))


def profile(
    costs: Float[np.ndarray, "contestant problem"], ratios: Float[np.ndarray, " ratio"] = RATIOS
) -> Float[np.ndarray, "contestant ratio"]:
    """Returns the share of problems that each solves within a ratio of the least cost.

    Problems that nobody solves count against all. The mean of a profile is its score.
    """
    with np.errstate(invalid="ignore"):
        relative = np.where(np.isfinite(costs), costs / costs.min(axis=0), np.inf)
    return (relative[:, :, None] <= ratios).mean(axis=1)


def expected_best(
    losses: Float[np.ndarray, "task setting"], trials: int
) -> Float[np.ndarray, " task"]:
    """Returns the least loss expected of so many settings, drawn from these with replacement.

    sum_i l_(i) ((N - i + 1)^k - (N - i)^k) / N^k, of sorted losses l_(1) <= ... <= l_(N).
    """
    count = losses.shape[-1]
    above = (np.arange(count, -1, -1) / count) ** trials
    return np.sort(losses, axis=-1) @ (above[:-1] - above[1:])


def worth(loss: float, losses: Float[np.ndarray, "task setting"]) -> float:
    """Returns how many random settings have to be tried until their best mean loss is this low.

    Infinite if more than there are would be needed.
    """
    counts = range(1, losses.shape[1] + 1)
    return next((float(k) for k in counts if expected_best(losses, k).mean() <= loss), np.inf)
