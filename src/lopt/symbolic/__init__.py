"""Symbolic rules: record what a learned optimizer does, and distil it into a short equation."""

from lopt.symbolic.algebra import to_sympy
from lopt.symbolic.distill import Distillation, distill
from lopt.symbolic.expression import Call, Constant, Expression, Variable, make_expression
from lopt.symbolic.metrics import Perception, perception_of_expression, perception_of_network
from lopt.symbolic.mixture import distill_mixture, mixture_to_text
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.pysr_search import PysrSearch
from lopt.symbolic.record import Recorder, record_episode
from lopt.symbolic.refit import refit
from lopt.symbolic.response import partial_dependence, response
from lopt.symbolic.rule import Output, SymbolicRule, in_place_of, symbolic_optimizer
from lopt.symbolic.score import ablate, ceiling, scores
from lopt.symbolic.search import AbstractSearch, Candidate, Complexity, Front
from lopt.symbolic.select import r_squared, select
from lopt.symbolic.serial import from_json, to_json
from lopt.symbolic.series import make_table, to_series
from lopt.symbolic.simplify import is_odd, rounded, simplify
from lopt.symbolic.source import to_numpy_source, to_torch_source
from lopt.symbolic.split import Splits, split_table
from lopt.symbolic.table import Table
from lopt.symbolic.template import TemplateSearch
from lopt.symbolic.typeset import to_latex, to_text

__all__ = [
    "AbstractSearch",
    "Call",
    "Candidate",
    "Complexity",
    "Constant",
    "Distillation",
    "Expression",
    "Front",
    "OperonSearch",
    "Output",
    "Perception",
    "PysrSearch",
    "Recorder",
    "Splits",
    "SymbolicRule",
    "Table",
    "TemplateSearch",
    "Variable",
    "ablate",
    "ceiling",
    "distill",
    "distill_mixture",
    "from_json",
    "in_place_of",
    "is_odd",
    "make_expression",
    "make_table",
    "mixture_to_text",
    "partial_dependence",
    "perception_of_expression",
    "perception_of_network",
    "r_squared",
    "record_episode",
    "refit",
    "response",
    "rounded",
    "scores",
    "select",
    "simplify",
    "split_table",
    "symbolic_optimizer",
    "to_json",
    "to_latex",
    "to_numpy_source",
    "to_series",
    "to_sympy",
    "to_text",
    "to_torch_source",
]
