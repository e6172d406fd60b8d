"""Reports: tables, figures and sentences that are declared once and shown everywhere."""

from lopt.experiment.report.bars import progress, stages
from lopt.experiment.report.kit import Cell, Equation, Figure, Measured, Report, Table, curves, tell
from lopt.experiment.report.plots import bands, color_of, finish, new_figure, panels, png
from lopt.experiment.report.statistics import Interval, measured, number, running_mean, shown_steps
