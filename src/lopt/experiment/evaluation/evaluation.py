"""One comparison of optimizers: a task, how long, how often; and one trial on it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTaskFamily, judge
from lopt.core.types import Key, Scalar, Split
from lopt.core.unroll import TrainState
from lopt.experiment.trainings import Keys, begin, drawn, trainings

CHUNKS, WINDOWS = 10, 100
# Of a task without whole splits, for each judgement.
BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One comparison of learned optimizers with tuned baselines.

    Attributes:
        name: a few words, the title of its plot; unlike those of other evaluations.
        task: the task to train, any, or a family that each seed draws its own from.
        horizon: inner steps.
        num_seeds: the number of initialisations, each with batches of its own; at least 5.
        trained_on: whether meta-training drew this task (with other initialisations).
        group: what it is an example of, such as "width"; reports have a summary of each group.
        place: in a sweep, the number that changes within the group.
    """

    name: str
    task: AbstractTaskFamily
    horizon: int
    num_seeds: int = 5
    trained_on: bool = False
    group: str = ""
    place: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("num_seeds", 5)):
            check_integer("Evaluation", name, getattr(self, name), least)

        def metrics(key: Key) -> Any:
            task = drawn(self.task, key)
            params = task.init(key)
            return task.metrics(params, task.prepare(params, key), task.batch(key))

        found = eqx.filter_eval_shape(metrics, jax.random.key(0))
        if "loss" not in found:
            raise ValueError(
                f"Evaluation(task={type(self.task).__name__}(...)) has the metrics "
                f'{", ".join(found) or "{}"}; must have "loss", try {{"loss": ..., **metrics}}.'
            )


class Trial(eqx.Module):
    """What one optimizer achieves on a task, by seed; losses of splits are in inference mode."""

    losses: Float[Any, "seed window"]  # of batches, means over at most a hundredth of the run
    train: Float[Any, "seed 2"]  # over the training split, before and after training
    held_out: Float[Any, "seed point"]  # over the test split, before and after each tenth
    choice: Float[Any, " seed"]  # over `valid_outer`, on which choices are made, at the end
    metrics: dict[str, Float[Any, " seed"]]  # over the test split, at the end


def trial(
    tasks: AbstractTaskFamily,
    optimizer: optax.GradientTransformation,
    keys: Keys,
    num_steps: int,
    params_of: Callable[[Any, Any], Any] = lambda state, params: params,
) -> Trial:
    """Trains a task for each key, in chunks, and judges it after each; see `Trial`."""
    size, rest = divmod(num_steps, chunks := min(CHUNKS, num_steps))

    def judged(states: TrainState, split: Split) -> dict[str, Any]:
        def one(run: Key, state: TrainState) -> dict[str, Scalar]:
            key = jax.random.fold_in(state.key, 2**32 - 2)  # none of the run's own keys
            params = params_of(state.opt_state, state.params)
            task = drawn(tasks, run)
            return judge(task, params, state.estimator_state, key, split, batches=BATCHES)

        return jax.vmap(one)(keys, states)

    def advance(states: TrainState, _: None) -> tuple[TrainState, Any]:
        states, losses = trainings(tasks, optimizer, keys, size, states=states)
        return states, (losses, judged(states, "test"))

    states = jax.vmap(lambda key: begin(tasks, optimizer, key))(keys)
    before = [judged(states, split)["loss"] for split in ("train", "test")]
    parts = []
    if rest:
        states, losses = trainings(tasks, optimizer, keys, rest, states=states)
        parts.append(losses)
    states, (losses, tests) = jax.lax.scan(advance, states, length=chunks)
    parts.append(jnp.moveaxis(losses, 0, 1))
    every = jnp.concatenate([part.reshape(len(keys), -1) for part in parts], axis=1)
    width = max(1, num_steps // WINDOWS)
    windows = every[:, num_steps % width :].reshape(len(keys), -1, width).mean(axis=-1)
    after = judged(states, "train")["loss"]
    return Trial(
        losses=windows,
        train=jnp.stack([before[0], after], axis=1),
        held_out=jnp.concatenate([before[1][:, None], tests["loss"].T], axis=1),
        choice=judged(states, "valid_outer")["loss"],
        metrics=jax.tree.map(lambda leaf: leaf[-1], tests),
    )
