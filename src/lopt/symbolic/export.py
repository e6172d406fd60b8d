"""Expressions for others: text, LaTeX, SymPy, and source code for NumPy and PyTorch."""

from lopt.symbolic.algebra import from_sympy, to_sympy
from lopt.symbolic.source import to_numpy_source, to_torch_source
from lopt.symbolic.typeset import to_latex, to_text

__all__ = [
    "from_sympy",
    "to_latex",
    "to_numpy_source",
    "to_sympy",
    "to_text",
    "to_torch_source",
]
