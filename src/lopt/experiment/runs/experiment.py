"""What a recipe returns: everything that one meta-training run consists of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import optax

from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, Scalar, Theta
from lopt.core.unroll import Step
from lopt.experiment.evaluation.evaluation import Evaluation


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

    def check_evaluations(self) -> None:
        """Refuses evaluations that cannot work, before anything is trained: traces them.

        Raises:
            ValueError: if the learned optimizer cannot train a task for its horizon.
        """
        for one in self.evaluations:

            def results(key: Key, one: Evaluation = one) -> Any:
                theta = self.learned.init(key) if self.initial is None else self.initial
                optimizer = self.learned.optimizer(theta, one.horizon)
                return one.trained(optimizer, jax.random.split(key, 1))

            try:
                eqx.filter_eval_shape(results, jax.random.key(0))
            except Exception as error:
                raise ValueError(f"The evaluation {one.name!r} cannot work: {error}") from error

    def inner_training(self) -> InnerTraining | None:
        """Returns the first inner training in the estimator, or None if it has none."""
        nodes = jax.tree.leaves(self.meta, is_leaf=lambda node: isinstance(node, InnerTraining))
        return next((node for node in nodes if isinstance(node, InnerTraining)), None)

    def __post_init__(self) -> None:
        for name in ("outer_steps", "steps_per_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Experiment({name}={value!r}) must be a positive integer; try 20."
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Experiment(seed={self.seed}) must be between 0 and {2**32 - 1}.")
