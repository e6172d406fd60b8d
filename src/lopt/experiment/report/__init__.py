"""Reports: tables, figures and sentences that are declared once and shown everywhere."""

from lopt.experiment.report.bars import progress, stages
from lopt.experiment.report.kit import Equation, Figure, Report, Table, Text, curves, tell
from lopt.experiment.report.plots import (
    bands,
    color_of,
    finish,
    grid_size,
    log_axis,
    new_figure,
    panels,
    png,
)
from lopt.experiment.report.statistics import (
    Cell,
    Measured,
    cell_text,
    mean_and_error,
    measured,
    number,
    running_mean,
    shown_steps,
)

__all__ = [
    "Cell",
    "Equation",
    "Figure",
    "Measured",
    "Report",
    "Table",
    "Text",
    "bands",
    "cell_text",
    "color_of",
    "curves",
    "finish",
    "grid_size",
    "log_axis",
    "mean_and_error",
    "measured",
    "new_figure",
    "number",
    "panels",
    "png",
    "progress",
    "running_mean",
    "shown_steps",
    "stages",
    "tell",
]
