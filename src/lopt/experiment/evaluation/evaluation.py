"""One comparison of a learned optimizer with baselines: a task, how long, how often."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float

from lopt.core.task import AbstractTask, judge
from lopt.core.types import Key, Scalar, Split
from lopt.core.unroll import TrainState
from lopt.experiment.trainings import Keys, trainings

Results = tuple[Float[Array, "seed step"], Float[Array, " seed"], dict[str, Float[Array, " seed"]]]


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
        for name, least in (("horizon", 1), ("num_seeds", 5)):
            if getattr(self, name) < least:
                given = f"{name}={getattr(self, name)}"
                raise ValueError(f"Evaluation({given}) must be at least {least}.")

        def metrics(key: Key) -> Any:
            params = self.task.init(key)
            return self.task.metrics(params, self.task.prepare(params, key), self.task.batch(key))

        found = eqx.filter_eval_shape(metrics, jax.random.key(0))
        if "loss" not in found:
            raise ValueError(
                f"Evaluation(task={type(self.task).__name__}(...)) has the metrics "
                f'{", ".join(found) or "{}"}; must have "loss", try {{"loss": ..., **metrics}}.'
            )

    def trained(self, optimizer: optax.GradientTransformation, keys: Keys) -> Results:
        """Returns training losses, final losses and metrics of the test split, by seed."""
        return _trained(self.task, optimizer, self.horizon, keys)


@eqx.filter_jit
def _trained(
    task: AbstractTask, optimizer: optax.GradientTransformation, horizon: int, keys: Keys
) -> Results:
    states, losses = trainings(task, optimizer, keys, horizon)

    def judged(state: TrainState, split: Split) -> dict[str, Scalar]:
        key = jax.random.fold_in(state.key, 2**32 - 2)  # none of the run's own keys
        return judge(task, state.params, state.estimator_state, key, split)

    final = jax.vmap(lambda state: judged(state, "train"))(states)
    return losses, final["loss"], jax.vmap(lambda state: judged(state, "test"))(states)
