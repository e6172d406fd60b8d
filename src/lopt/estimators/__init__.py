"""Meta-gradients: estimators of the gradient of a meta-loss."""

from lopt.estimators.combine import Mean, particle_mesh
from lopt.estimators.evolution import ES
from lopt.estimators.persistent import PES
from lopt.estimators.truncated import TruncatedBackprop

__all__ = ["ES", "PES", "Mean", "TruncatedBackprop", "particle_mesh"]
