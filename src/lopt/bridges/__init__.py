"""Bridges: updates of learned optimizers as source that needs no JAX, or no lopt."""

from lopt.bridges.export import export
from lopt.bridges.translate import Program, translate

__all__ = ["Program", "export", "translate"]
