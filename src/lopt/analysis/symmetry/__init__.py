"""Symmetries of networks: found, checked, measured during training, and put to use.

A network has directions in which its loss cannot change. Gradients have no component along them; an
optimizer's updates may. Kunin et al. 2021 (arXiv:2012.04728), Sobotka et al. 2024
(arXiv:2312.07174).
"""

from lopt.analysis.symmetry.blind import Blind, early_translation, unreached, unseen
from lopt.analysis.symmetry.builders import (
    bias_shift,
    query_key_rescale,
    rescale,
    scale,
    translation,
)
from lopt.analysis.symmetry.check import Evidence, check_symmetry
from lopt.analysis.symmetry.continuous import continuous_law, regime
from lopt.analysis.symmetry.detector import MissingRanks, Share, attribute, missing_ranks
from lopt.analysis.symmetry.deviation import (
    Deviation,
    SymmetryProbe,
    SymmetryReading,
    deviation,
    drift,
)
from lopt.analysis.symmetry.discrete import DiscreteMap, unit_map
from lopt.analysis.symmetry.find import Symmetries, symmetries
from lopt.analysis.symmetry.flow import GradientFlow
from lopt.analysis.symmetry.foreign import ModelLoss
from lopt.analysis.symmetry.generators import AbstractGenerator, FreeGenerator, Symmetry
from lopt.analysis.symmetry.laws import HeavyBall, Ledger, LedgerProbe, exact_law
from lopt.analysis.symmetry.linear import Mixing, bias_exchange, mixing, query_key_mixing
from lopt.analysis.symmetry.places import Place, leaves_by_path
from lopt.analysis.symmetry.structure import homogeneous_degree
from lopt.analysis.symmetry.use import SymmetryPenalty, broken_component, remove_breaking

__all__ = [
    "AbstractGenerator",
    "Blind",
    "Deviation",
    "DiscreteMap",
    "Evidence",
    "FreeGenerator",
    "GradientFlow",
    "HeavyBall",
    "Ledger",
    "LedgerProbe",
    "MissingRanks",
    "Mixing",
    "ModelLoss",
    "Place",
    "Share",
    "Symmetries",
    "Symmetry",
    "SymmetryPenalty",
    "SymmetryProbe",
    "SymmetryReading",
    "attribute",
    "bias_exchange",
    "bias_shift",
    "broken_component",
    "check_symmetry",
    "continuous_law",
    "deviation",
    "drift",
    "early_translation",
    "exact_law",
    "homogeneous_degree",
    "leaves_by_path",
    "missing_ranks",
    "mixing",
    "query_key_mixing",
    "query_key_rescale",
    "regime",
    "remove_breaking",
    "rescale",
    "scale",
    "symmetries",
    "translation",
    "unit_map",
    "unreached",
    "unseen",
]
