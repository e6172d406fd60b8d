"""Learned optimizers: features, rules, published designs, learnable hyperparameters."""

from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.hyperparameters import Learnable, learnable
from lopt.learned.presets import LearnableAdam, LearnableSGD, adafactor_mlp, small_mlp
from lopt.learned.rules import MLP, DirectionMagnitude

__all__ = [
    "MLP",
    "AdafactorFeatures",
    "DirectionMagnitude",
    "Learnable",
    "LearnableAdam",
    "LearnableSGD",
    "MomentumFeatures",
    "adafactor_mlp",
    "learnable",
    "small_mlp",
]
