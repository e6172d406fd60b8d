"""The ground floor: the protocol, the loop, and what is trained with them."""

from lopt.core.coordinatewise import Coordinatewise, CoordinatewiseState, Inputs
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import (
    Episode,
    FinalLoss,
    InnerTraining,
    MetaTask,
    RampedLoss,
    mean_loss,
    train_loss,
    validation_loss,
)
from lopt.core.learned import AbstractFeatures, AbstractLearnedOptimizer, AbstractRule
from lopt.core.task import AbstractTask, AbstractTaskFamily, TransformedTask, judge
from lopt.core.unroll import Step, TrainState, loss_of, start, take, unroll

__all__ = [
    "AbstractFeatures",
    "AbstractGradientEstimator",
    "AbstractLearnedOptimizer",
    "AbstractRule",
    "AbstractTask",
    "AbstractTaskFamily",
    "Coordinatewise",
    "CoordinatewiseState",
    "Episode",
    "Estimate",
    "FinalLoss",
    "InnerTraining",
    "Inputs",
    "MetaTask",
    "RampedLoss",
    "Step",
    "TrainState",
    "TransformedTask",
    "judge",
    "loss_of",
    "mean_loss",
    "start",
    "take",
    "train_loss",
    "unroll",
    "validation_loss",
]
