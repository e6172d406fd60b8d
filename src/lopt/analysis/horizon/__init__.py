"""Short-horizon bias: what is lost by choosing learning rates for the near future."""

from lopt.analysis.horizon.acceptance import Row, acceptance_rows, paper_study
from lopt.analysis.horizon.lanczos import Quadrature, lanczos
from lopt.analysis.horizon.network import (
    NetworkQuadratic,
    fit_noisy_quadratic,
    lowest_on_line,
    measured_losses,
    spectral_density,
)
from lopt.analysis.horizon.parametric import fit_inverse_time, fitted_schedule
from lopt.analysis.horizon.quadratic import (
    Moments,
    NoisyQuadratic,
    Schedule,
    advance,
    begin,
    chebyshev_quadratic,
    component_losses,
    constant_schedule,
    excess_loss,
    expected_loss,
    expected_losses,
    inverse_time_schedule,
)
from lopt.analysis.horizon.short import (
    best_fixed_schedule,
    greedy_pair,
    greedy_schedule,
    look_ahead_schedule,
)
from lopt.analysis.horizon.study import (
    Fit,
    Run,
    Study,
    effective_rate_ratio,
    first_below,
    run_schedule,
    study,
)
from lopt.analysis.horizon.twin import ExcessLoss, NoisyQuadraticTask, scheduled_momentum
from lopt.analysis.horizon.whole import ScheduleTask, adam_schedule, optimal_schedule

__all__ = [
    "ExcessLoss",
    "Fit",
    "Moments",
    "NetworkQuadratic",
    "NoisyQuadratic",
    "NoisyQuadraticTask",
    "Quadrature",
    "Row",
    "Run",
    "Schedule",
    "ScheduleTask",
    "Study",
    "acceptance_rows",
    "adam_schedule",
    "advance",
    "begin",
    "best_fixed_schedule",
    "chebyshev_quadratic",
    "component_losses",
    "constant_schedule",
    "effective_rate_ratio",
    "excess_loss",
    "expected_loss",
    "expected_losses",
    "first_below",
    "fit_inverse_time",
    "fit_noisy_quadratic",
    "fitted_schedule",
    "greedy_pair",
    "greedy_schedule",
    "inverse_time_schedule",
    "lanczos",
    "look_ahead_schedule",
    "lowest_on_line",
    "measured_losses",
    "optimal_schedule",
    "paper_study",
    "run_schedule",
    "scheduled_momentum",
    "spectral_density",
    "study",
]
