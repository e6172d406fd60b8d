"""The ground floor: the protocol, the loop, and what is trained with them."""

from lopt.core.blocks import map_blocks
from lopt.core.coordinatewise import Coordinatewise, CoordinatewiseState
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.groups import join, split
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
from lopt.core.learned import (
    AbstractFeatures,
    AbstractLearnedOptimizer,
    AbstractRule,
)
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
    "MetaTask",
    "RampedLoss",
    "Step",
    "TrainState",
    "TransformedTask",
    "join",
    "judge",
    "loss_of",
    "map_blocks",
    "mean_loss",
    "split",
    "start",
    "take",
    "train_loss",
    "unroll",
    "validation_loss",
]
