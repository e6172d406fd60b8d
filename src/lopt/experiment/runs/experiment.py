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
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Scalar, Theta
from lopt.core.unroll import Step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One comparison of the learned optimizer with tuned baselines.

    Attributes:
        name: a few words, the title of its plot.
        task: the task to train; any.
        horizon: inner steps.
        num_seeds: the number of initialisations, each with batches of its own; at least 5.
        trained_on: whether meta-training drew this task (with other initialisations).
    """

    name: str
    task: AbstractTask
    horizon: int
    num_seeds: int = 5
    trained_on: bool = False

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"Evaluation(horizon={self.horizon}) must be at least 1.")
        if self.num_seeds < 5:
            raise ValueError(
                f"Evaluation(num_seeds={self.num_seeds}) must be at least 5, "
                "for standard errors that mean something."
            )

        def metrics(key: Key) -> Any:
            params = self.task.init(key)
            return self.task.metrics(params, self.task.prepare(params, key), self.task.batch(key))

        found = eqx.filter_eval_shape(metrics, jax.random.key(0))
        if "loss" not in found:
            raise ValueError(
                f"Evaluation(task={type(self.task).__name__}(...)) has the metrics "
                f'{", ".join(found) or "{}"}; must have "loss", try {{"loss": ..., **metrics}}.'
            )


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
        note: a sentence or two for the report, such as why this estimator.
        record: what else to log of each outer step, by name.
        initial: the theta to begin with, for training on; by default the learned optimizer's.
        initial_digest: of the file that it was read from: a run is not resumed with another.
    """

    learned: AbstractLearnedOptimizer
    meta: AbstractGradientEstimator
    outer_optimizer: optax.GradientTransformation
    outer_steps: int
    evaluations: tuple[Evaluation, ...] = ()
    seed: int = 0
    steps_per_chunk: int = 20
    note: str = ""
    record: Callable[[Step], Mapping[str, Scalar]] | None = None
    initial: Theta | None = None
    initial_digest: str = ""

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
