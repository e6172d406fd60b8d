"""Learned optimizers: features, rules, published designs, learnable hyperparameters."""

from lopt.learned.averages import Averaged
from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.hyperparameters import Learnable, LearnableState, learnable
from lopt.learned.joined import Joined, Reading, seen_through
from lopt.learned.moments import LogAndSign, MomentFeatures
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
from lopt.learned.recurrent import LSTM, Multiplied
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
    "Cosine",
    "DirectionMagnitude",
    "Exponential",
    "InverseTime",
    "Joined",
    "Learnable",
    "LearnableAdam",
    "LearnableSGD",
    "LearnableState",
    "LogAndSign",
    "MomentFeatures",
    "MomentumFeatures",
    "Multiplied",
    "PerStep",
    "PerTensor",
    "PerTensorType",
    "Polynomial",
    "Reading",
    "adafactor_mlp",
    "dm",
    "inverse_time_momentum",
    "learnable",
    "momentum_sgd",
    "per_tensor",
    "rnnprop",
    "seen_through",
    "small_mlp",
    "small_rnnprop",
]
