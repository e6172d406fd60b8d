"""Learned optimizers: features, rules, published designs, learnable hyperparameters."""

from lopt.learned.averages import Averaged
from lopt.learned.concat import Concat, SelectFeatures, with_features
from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.hyperparameters import Learnable, LearnableState, learnable
from lopt.learned.matrices import MatrixAxes
from lopt.learned.moments import LogAndSign, MomentFeatures
from lopt.learned.muon import MuonMLP, muon_mlp
from lopt.learned.presets import (
    LearnableAdam,
    LearnableSGD,
    adafactor_mlp,
    dm,
    inverse_time_momentum,
    momentum_sgd,
    rnnprop,
    small_mlp,
    small_rnnprop,
)
from lopt.learned.recurrent import LSTM, Scaled
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.schedules import (
    AbstractSchedule,
    Cosine,
    Exponential,
    InverseTime,
    PerStep,
    Polynomial,
)
from lopt.learned.tensor_types import PerTensorType
from lopt.learned.tensors import PerTensor, per_tensor

__all__ = [
    "LSTM",
    "MLP",
    "AbstractSchedule",
    "AdafactorFeatures",
    "Averaged",
    "Concat",
    "Cosine",
    "DirectionMagnitude",
    "Exponential",
    "InverseTime",
    "Learnable",
    "LearnableAdam",
    "LearnableSGD",
    "LearnableState",
    "LogAndSign",
    "MatrixAxes",
    "MomentFeatures",
    "MomentumFeatures",
    "MuonMLP",
    "PerStep",
    "PerTensor",
    "PerTensorType",
    "Polynomial",
    "Scaled",
    "SelectFeatures",
    "adafactor_mlp",
    "dm",
    "inverse_time_momentum",
    "learnable",
    "momentum_sgd",
    "muon_mlp",
    "per_tensor",
    "rnnprop",
    "small_mlp",
    "small_rnnprop",
    "with_features",
]
