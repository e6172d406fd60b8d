"""Learned optimizers: features, rules, published designs, learnable hyperparameters."""

from lopt.learned.celo import AdamDirection, Celo2, LearnedSchedule
from lopt.learned.concat import Averaged, Concat, SelectFeatures, with_features
from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.hierarchical import Hierarchical, NNAdam
from lopt.learned.hypernetwork import AbstractController, TensorLSTM, Tensorwise
from lopt.learned.hyperparameters import Learnable, LearnableState, learnable
from lopt.learned.imitation import Guided, Imitation
from lopt.learned.matrices import MatrixAxes
from lopt.learned.moments import LogAndSign, MomentFeatures
from lopt.learned.muon import MuonMLP, muon_mlp
from lopt.learned.nominal import NominalRule, Normalised
from lopt.learned.presets import (
    LearnableAdam,
    LearnableSGD,
    adafactor_mlp,
    aggmo,
    celo,
    celo2,
    celo_adam,
    dm,
    hierarchical,
    inverse_time_momentum,
    momentum_sgd,
    nn_adam,
    nominal_mlp,
    rnn_mlp,
    rnnprop,
    sinv6,
    small_mlp,
    small_rnnprop,
    velo,
    velo_small,
)
from lopt.learned.recurrent import LSTM, Scaled
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.safeguards import Chain, FallBack, Nominal, Odd
from lopt.learned.schedules import (
    AbstractSchedule,
    Cosine,
    Exponential,
    InverseTime,
    PerStep,
    PerTensor,
    Polynomial,
    per_tensor,
)
from lopt.learned.velo import VeLO, VeLOFeatures
from lopt.learned.widths import PerTensorType, scale_by_width, width_multipliers

__all__ = [
    "LSTM",
    "MLP",
    "AbstractController",
    "AbstractSchedule",
    "AdafactorFeatures",
    "AdamDirection",
    "Averaged",
    "Celo2",
    "Chain",
    "Concat",
    "Cosine",
    "DirectionMagnitude",
    "Exponential",
    "FallBack",
    "Guided",
    "Hierarchical",
    "Imitation",
    "InverseTime",
    "Learnable",
    "LearnableAdam",
    "LearnableSGD",
    "LearnableState",
    "LearnedSchedule",
    "LogAndSign",
    "MatrixAxes",
    "MomentFeatures",
    "MomentumFeatures",
    "MuonMLP",
    "NNAdam",
    "Nominal",
    "NominalRule",
    "Normalised",
    "Odd",
    "PerStep",
    "PerTensor",
    "PerTensorType",
    "Polynomial",
    "Scaled",
    "SelectFeatures",
    "TensorLSTM",
    "Tensorwise",
    "VeLO",
    "VeLOFeatures",
    "adafactor_mlp",
    "aggmo",
    "celo",
    "celo2",
    "celo_adam",
    "dm",
    "hierarchical",
    "inverse_time_momentum",
    "learnable",
    "momentum_sgd",
    "muon_mlp",
    "nn_adam",
    "nominal_mlp",
    "per_tensor",
    "rnn_mlp",
    "rnnprop",
    "scale_by_width",
    "sinv6",
    "small_mlp",
    "small_rnnprop",
    "velo",
    "velo_small",
    "width_multipliers",
    "with_features",
]
