"""Learned optimizers: features, rules, published designs, learnable hyperparameters."""

from lopt.learned.averages import Averaged
from lopt.learned.celo import AdamDirection, Celo2, Scheduled
from lopt.learned.concat import Concat, SelectFeatures, with_features
from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.hypernetwork import AbstractController, TensorLSTM, Tensorwise
from lopt.learned.hyperparameters import Learnable, LearnableState, learnable
from lopt.learned.moments import LogAndSign, MomentFeatures
from lopt.learned.presets import (
    LearnableAdam,
    LearnableSGD,
    adafactor_mlp,
    celo,
    celo2,
    celo_adam,
    dm,
    inverse_time_momentum,
    momentum_sgd,
    rnnprop,
    sinv6,
    small_mlp,
    small_rnnprop,
    velo,
    velo_small,
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
from lopt.learned.velo import VeLO, VeLOFeatures

__all__ = [
    "LSTM",
    "MLP",
    "AbstractController",
    "AbstractSchedule",
    "AdafactorFeatures",
    "AdamDirection",
    "Averaged",
    "Celo2",
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
    "MomentFeatures",
    "MomentumFeatures",
    "PerStep",
    "PerTensor",
    "PerTensorType",
    "Polynomial",
    "Scaled",
    "Scheduled",
    "SelectFeatures",
    "TensorLSTM",
    "Tensorwise",
    "VeLO",
    "VeLOFeatures",
    "adafactor_mlp",
    "celo",
    "celo2",
    "celo_adam",
    "dm",
    "inverse_time_momentum",
    "learnable",
    "momentum_sgd",
    "per_tensor",
    "rnnprop",
    "sinv6",
    "small_mlp",
    "small_rnnprop",
    "velo",
    "velo_small",
    "with_features",
]
