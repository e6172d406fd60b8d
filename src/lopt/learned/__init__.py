"""Learned optimizers: features, rules, published designs, learnable hyperparameters."""

from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.hyperparameters import Learnable, LearnableState, learnable
from lopt.learned.presets import (
    LearnableAdam,
    LearnableSGD,
    adafactor_mlp,
    inverse_time_momentum,
    momentum_sgd,
    small_mlp,
)
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.schedules import (
    AbstractSchedule,
    Cosine,
    Exponential,
    InverseTime,
    PerStep,
    Polynomial,
)
from lopt.learned.tensors import PerTensor, per_tensor

__all__ = [
    "MLP",
    "AbstractSchedule",
    "AdafactorFeatures",
    "Cosine",
    "DirectionMagnitude",
    "Exponential",
    "InverseTime",
    "Learnable",
    "LearnableAdam",
    "LearnableSGD",
    "LearnableState",
    "MomentumFeatures",
    "PerStep",
    "PerTensor",
    "Polynomial",
    "adafactor_mlp",
    "inverse_time_momentum",
    "learnable",
    "momentum_sgd",
    "per_tensor",
    "small_mlp",
]
