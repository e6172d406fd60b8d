"""What a recipe returns: everything that one meta-training run consists of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import optax

from lopt.core.checks import check_integer
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, Scalar, Theta
from lopt.core.unroll import Step
from lopt.estimators.truncation import nodes
from lopt.experiment.evaluation.evaluation import Evaluation, trial
from lopt.experiment.runs.loggers import LOGGERS, Logger


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A meta-training run and its evaluation.

    Attributes:
        learned: the optimizer to be learned.
        meta: the estimator of its meta-gradient.
        outer_optimizer: what theta is trained with; steps whose gradient is not finite are skipped.
        outer_steps: how long.
        evaluations: what the result is compared on.
        seed: everything random about the run.
        steps_per_chunk: outer steps per compiled call; after each, progress and metrics are
            written and a checkpoint is made.
        record: what else to log of each outer step, by name.
        initial: the theta to begin with, for training on; by default the learned optimizer's.
        loggers: where each outer step is logged besides the run's `metrics.jsonl`, which has it as
            JSON lines: "tensorboard", "wandb", or a `loggers.Logger` of your own.
    """

    learned: AbstractLearnedOptimizer
    meta: AbstractGradientEstimator
    outer_optimizer: optax.GradientTransformation
    outer_steps: int
    evaluations: tuple[Evaluation, ...] = ()
    seed: int = 0
    steps_per_chunk: int = 20
    record: Callable[[Step], Mapping[str, Scalar]] | None = None
    initial: Theta | None = None
    loggers: tuple[str | Logger, ...] = dataclasses.field(default=(), repr=False)

    def check_evaluations(self) -> None:
        """Refuses evaluations that cannot work, before anything is trained: traces them."""
        for one in self.evaluations:

            def results(key: Key, one: Evaluation = one) -> Any:
                optimizer = self.learned.optimizer(self.initial_theta(), one.horizon)
                return trial(one.task, optimizer, jax.random.split(key, 1), one.horizon)

            try:
                eqx.filter_eval_shape(results, jax.random.key(0))
            except Exception as error:
                raise ValueError(f"The evaluation {one.name!r} cannot work: {error}") from error

    def initial_theta(self) -> Theta:
        """Returns the weights that meta-training begins with."""
        if self.initial is not None:
            return self.initial
        return self.learned.init(jax.random.split(jax.random.key(self.seed))[0])

    def inner_training(self) -> InnerTraining:
        """Returns the first inner training in the estimator; a ValueError if it has none."""
        if found := nodes(self.meta, InnerTraining):
            return found[0]
        raise ValueError(f"The estimator, {type(self.meta).__name__}, has no InnerTraining.")

    def __post_init__(self) -> None:
        limits = {"outer_steps": (1, 2**31), "steps_per_chunk": (1, 2**31), "seed": (0, 2**32)}
        for name, (least, limit) in limits.items():
            check_integer("Experiment", name, getattr(self, name), least, limit - 1)
        for one in self.loggers:
            if isinstance(one, str) and one not in LOGGERS:
                raise ValueError(
                    f"Experiment(loggers) has {one!r}, which is none of {', '.join(LOGGERS)}; give "
                    "one of these, or a function."
                )
