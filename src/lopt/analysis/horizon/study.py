"""One call that returns every schedule of a noisy quadratic: short, fixed and optimised.

What is compared is Figure 1 to 3 of Wu et al. 2018 (arXiv:1803.02021), with two additions: the
optimum in a stated box, and horizons between one step and all of them.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from lopt.analysis.horizon.parametric import fit_inverse_time
from lopt.analysis.horizon.precision import in_double
from lopt.analysis.horizon.quadratic import (
    NoisyQuadratic,
    Schedule,
    band_shares,
    component_losses,
    inverse_time_schedule,
)
from lopt.analysis.horizon.short import best_fixed_schedule, greedy_schedule, look_ahead_schedule
from lopt.analysis.horizon.whole import adam_schedule, optimal_schedule

HORIZONS = (1, 2, 5, 10, 25, 50, 125, 250)
FITTED_HORIZONS = (5, 10, 25, 50, 100, 150, 200, 250)


class Run(eqx.Module):
    """What a schedule does on a noisy quadratic.

    Attributes:
        schedule: a learning rate and a momentum for each step.
        losses: the expected excess loss before the first step and after each.
        bands: the same, split into groups of equally many directions, the steepest first.
        growth: the largest loss of a direction at any time, over its loss at the start.
    """

    schedule: Schedule
    losses: Float[np.ndarray, " time"]
    bands: Float[np.ndarray, "time band"]
    growth: float

    @property
    def final_loss(self) -> float:
        """The expected excess loss after the last step."""
        return float(self.losses[-1])


class Fit(eqx.Module):
    """An inverse-time schedule, fitted to a horizon and run for longer.

    Attributes:
        learning_rate, decay: a and the exponent of a / (1 + t / K)^decay.
        run: over all steps.
    """

    learning_rate: float
    decay: float
    run: Run


class Study(eqx.Module):
    """The schedules of one noisy quadratic over one horizon.

    Attributes:
        problem: the quadratic that losses are given for.
        greedy, greedy_rate: best one step ahead, with and without momentum.
        fixed, fixed_rate: the best constant pair, and the best constant rate without momentum.
        adam: the paper's recipe, Adam on the whole horizon from `fixed`.
        optimal, optimal_rate: the best in the box, with and without momentum.
        unbounded: no box at all; None where it was not asked for.
        look_ahead, look_ahead_rate: by H, pairs chosen for H steps at a time and held for them.
        fits: by H, inverse-time schedules without momentum that were fitted to H steps.
    """

    problem: NoisyQuadratic
    greedy: Run
    greedy_rate: Run
    fixed: Run
    fixed_rate: Run
    adam: Run
    optimal: Run
    optimal_rate: Run
    unbounded: Run | None
    look_ahead: dict[int, Run]
    look_ahead_rate: dict[int, Run]
    fits: dict[int, Fit]


def study(
    problem: NoisyQuadratic,
    horizon: int = 250,
    *,
    mesh: NoisyQuadratic | None = None,
    horizons: Sequence[int] = HORIZONS,
    fitted_horizons: Sequence[int] = FITTED_HORIZONS,
    learning_rates: tuple[float, float] = (0.0, 1.0),
    momenta: tuple[float, float] = (0.0, 0.99),
    unbounded_sweeps: int = 0,
    bands: int = 20,
    progress: Callable[[str], None] = lambda name: None,
) -> Study:
    """Returns every schedule of a noisy quadratic, and what it does.

    Args:
        problem: the quadratic.
        horizon: the number of steps.
        mesh: the same quadratic on fewer nodes, on which schedules are sought; `problem` itself by
            default.
        horizons: the H of look-aheads; those above `horizon` are left out.
        fitted_horizons: the H that inverse-time schedules are fitted to, likewise.
        learning_rates: the least and the largest learning rate of the optimum in a box.
        momenta: the least and the largest momentum of it.
        unbounded_sweeps: for how long to search without a box; 0 for not at all.
        bands: into how many groups of directions losses are split.
        progress: called with the name of each piece of work before it begins.

    Example:
        >>> from lopt.analysis import chebyshev_quadratic, study
        >>> found = study(chebyshev_quadratic(12), 10, horizons=(1, 5), fitted_horizons=(5, 10))
        >>> bool(found.optimal.final_loss < found.fixed.final_loss < found.greedy.losses[0])
        True
    """
    coarse = problem if mesh is None else mesh
    # Curvatures set the unit of learning rates: both parametric cap and box are for a largest of 1.
    time_constant, cap = horizon / 4, 2 / float(np.max(coarse.curvatures))

    def ran(schedule: Schedule) -> Run:
        return run_schedule(problem, schedule, bands)

    def looked_ahead(momentum: bool) -> dict[int, Run]:
        name = "with momentum" if momentum else "learning rate only"
        found = {}
        for steps in sorted({h for h in horizons if h <= horizon}):
            progress(f"look-ahead of {steps}, {name}")
            found[steps] = ran(look_ahead_schedule(coarse, horizon, steps, momentum))
        return found

    def fitted(steps: int) -> Fit:
        progress(f"inverse-time schedule fitted to {steps}")
        rate, decay = fit_inverse_time(coarse, steps, time_constant, cap)
        return Fit(rate, decay, ran(inverse_time_schedule(rate, decay, time_constant, horizon)))

    progress("greedy schedules")
    greedy = greedy_schedule(coarse, horizon)
    greedy_rate = greedy_schedule(coarse, horizon, momentum=False)
    progress("best fixed pairs")
    fixed = best_fixed_schedule(coarse, horizon)
    fixed_rate = best_fixed_schedule(coarse, horizon, momentum=False)
    look_ahead_rate, look_ahead = looked_ahead(False), looked_ahead(True)
    fits = {steps: fitted(steps) for steps in fitted_horizons if steps <= horizon}
    progress("Adam on the whole schedule")
    adam = adam_schedule(coarse, fixed)
    progress("the optimum in the box")
    # Short horizons have several local optima; these two starts lead to different ones.
    optima = [optimal_schedule(coarse, s, learning_rates, momenta) for s in (adam, greedy)]
    optimal = min(optima, key=lambda schedule: run_schedule(coarse, schedule).final_loss)
    progress("the optimum in the box, learning rate only")
    optimal_rate = optimal_schedule(coarse, fixed_rate, learning_rates, (0.0, 0.0))
    unbounded = None
    if unbounded_sweeps:
        progress("the search without a box")
        anything = (-np.inf, np.inf)
        unbounded = ran(optimal_schedule(coarse, adam, anything, anything, unbounded_sweeps))
    return Study(
        problem=problem,
        greedy=ran(greedy),
        greedy_rate=ran(greedy_rate),
        fixed=ran(fixed),
        fixed_rate=ran(fixed_rate),
        adam=ran(adam),
        optimal=ran(optimal),
        optimal_rate=ran(optimal_rate),
        unbounded=unbounded,
        look_ahead=look_ahead,
        look_ahead_rate=look_ahead_rate,
        fits=fits,
    )


def run_schedule(problem: NoisyQuadratic, schedule: Schedule, bands: int = 20) -> Run:
    """Returns what a schedule does on a noisy quadratic.

    Args:
        problem: the quadratic.
        schedule: a learning rate and a momentum for each step.
        bands: into how many groups of directions losses are split, the steepest first.
    """
    losses = _components(problem, schedule)
    with np.errstate(invalid="ignore", divide="ignore"):
        growth = np.nanmax(losses / losses[:1])
    return Run(schedule, losses.sum(1), losses @ band_shares(problem, bands), float(growth))


_components = in_double(jax.jit(component_losses))


def effective_rate_ratio(one: Run, other: Run, step: int) -> float:
    """Returns the effective learning rate of one run over another's in a step, counted from 1."""
    rates = [run.schedule.effective_rates[step - 1] for run in (one, other)]
    return float(rates[0] / rates[1])


def first_below(one: Run, other: Run) -> int:
    """Returns the first step, counted from 1, after which one run's loss is below another's."""
    below = one.losses < other.losses
    return int(np.argmax(below)) if below.any() else -1
