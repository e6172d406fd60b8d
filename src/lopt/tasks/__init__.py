"""Tasks: what optimizers are asked to do, and families to draw them from."""

from lopt.tasks.augment import (
    DataSubset,
    DelayedGradients,
    GradientNoise,
    InitialScale,
    InputNoise,
    InputScale,
    LossScale,
    LowPrecision,
    RandomDirections,
    RandomLabels,
    ReducedBatch,
    Reparameterization,
    warm_start,
)
from lopt.tasks.autoencoding import mlp_autoencoder, variational_autoencoder
from lopt.tasks.batch_norm import batch_norm_classification
from lopt.tasks.classification import MultilayerPerceptron, classification, mlp_classification
from lopt.tasks.convolutional import conv_classification
from lopt.tasks.data import (
    Data,
    Examples,
    Labelled,
    Rows,
    array_data,
    image_data,
    resize,
    text_data,
)
from lopt.tasks.flows import normalising_flow
from lopt.tasks.landscapes import (
    Ackley,
    Beale,
    Branin,
    LogSumExp,
    Matyas,
    Michalewicz,
    Rosenbrock,
    StyblinskiTang,
)
from lopt.tasks.language import Transformer, char_transformer, language_model, rnn_language_model
from lopt.tasks.memory import associative_recall, copying
from lopt.tasks.mixture import Mixture
from lopt.tasks.network_task import AbstractNetwork, Build, EquinoxNetwork, InitApply, NetworkTask
from lopt.tasks.objectives import (
    AdamSteps,
    MetricObjective,
    NormalizedLoss,
    best_loss,
    own_objective,
)
from lopt.tasks.perceptrons import MLPFamily
from lopt.tasks.quadratics import LeastSquares, LeastSquaresFamily, Quadratic, QuadraticFamily
from lopt.tasks.recurrent import RecurrentNetwork
from lopt.tasks.resnet import resnet_classification
from lopt.tasks.streaming import streamed_data
from lopt.tasks.validation import WithValidation
from lopt.tasks.vision import vit_classification
from lopt.tasks.wrapped import WithBestLoss, WithObjective

__all__ = [
    "AbstractNetwork",
    "Ackley",
    "AdamSteps",
    "Beale",
    "Branin",
    "Build",
    "Data",
    "DataSubset",
    "DelayedGradients",
    "EquinoxNetwork",
    "Examples",
    "GradientNoise",
    "InitApply",
    "InitialScale",
    "InputNoise",
    "InputScale",
    "Labelled",
    "LeastSquares",
    "LeastSquaresFamily",
    "LogSumExp",
    "LossScale",
    "LowPrecision",
    "MLPFamily",
    "Matyas",
    "MetricObjective",
    "Michalewicz",
    "Mixture",
    "MultilayerPerceptron",
    "NetworkTask",
    "NormalizedLoss",
    "Quadratic",
    "QuadraticFamily",
    "RandomDirections",
    "RandomLabels",
    "RecurrentNetwork",
    "ReducedBatch",
    "Reparameterization",
    "Rosenbrock",
    "Rows",
    "StyblinskiTang",
    "Transformer",
    "WithBestLoss",
    "WithObjective",
    "WithValidation",
    "array_data",
    "associative_recall",
    "batch_norm_classification",
    "best_loss",
    "char_transformer",
    "classification",
    "conv_classification",
    "copying",
    "image_data",
    "language_model",
    "mlp_autoencoder",
    "mlp_classification",
    "normalising_flow",
    "own_objective",
    "resize",
    "resnet_classification",
    "rnn_language_model",
    "streamed_data",
    "text_data",
    "variational_autoencoder",
    "vit_classification",
    "warm_start",
]
