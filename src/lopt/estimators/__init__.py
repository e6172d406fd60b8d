"""Meta-gradients: estimators of the gradient of a meta-loss."""

from lopt.estimators.blackbox import Evosax, PolicyGradient, RandomSearch
from lopt.estimators.combine import Clipped, InverseVariance, Part, Scheduled, Sum
from lopt.estimators.evolution import ES, RankedES, Reparameterized, TruncatedES
from lopt.estimators.forward import ForwardMode, OnlineForwardMode
from lopt.estimators.look_ahead import LookAhead
from lopt.estimators.mean import Mean, particle_mesh
from lopt.estimators.persistent import GPES, NRES, PES, ESSingle
from lopt.estimators.resume import Resume
from lopt.estimators.truncated import TruncatedBackprop, log_of_sum
from lopt.estimators.truncation import (
    AbstractHorizonSchedule,
    ConstantHorizon,
    LogUniformHorizon,
    RampedHorizon,
)

__all__ = [
    "ES",
    "GPES",
    "NRES",
    "PES",
    "AbstractHorizonSchedule",
    "Clipped",
    "ConstantHorizon",
    "ESSingle",
    "Evosax",
    "ForwardMode",
    "InverseVariance",
    "LogUniformHorizon",
    "LookAhead",
    "Mean",
    "OnlineForwardMode",
    "Part",
    "PolicyGradient",
    "RampedHorizon",
    "RandomSearch",
    "RankedES",
    "Reparameterized",
    "Resume",
    "Scheduled",
    "Sum",
    "TruncatedBackprop",
    "TruncatedES",
    "log_of_sum",
    "particle_mesh",
]
