"""Symbolic rules: record what a learned optimizer does, and distil it into a short equation."""

from lopt.symbolic.expression import Call, Constant, Expression, Variable, make_expression
from lopt.symbolic.rule import Output, SymbolicRule, in_place_of, symbolic_optimizer
from lopt.symbolic.table import Table

__all__ = [
    "Call",
    "Constant",
    "Expression",
    "Output",
    "SymbolicRule",
    "Table",
    "Variable",
    "in_place_of",
    "make_expression",
    "symbolic_optimizer",
]
