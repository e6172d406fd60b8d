"""Meta-training as a long job: compiled chunks of the outer unroll, a log, checkpoints, resuming.

A run's folder holds `run.json`, `metrics.jsonl` (a line per outer step), `checkpoints/`, and
`weights.safetensors`, the latest theta. It can be killed at any moment; resumed, it continues as if
nothing had happened, bit for bit.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lopt.core.types import Record, Theta
from lopt.core.unroll import Step, TrainState, start, unroll
from lopt.estimators import particle_mesh
from lopt.experiment.report import progress
from lopt.experiment.runs import files, storage
from lopt.experiment.runs.environment import release_memory
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.loggers import opened
from lopt.experiment.runs.run import Run


def train(run: Run, *, show_progress: bool = True) -> Theta:
    """Meta-trains, from the run's last checkpoint if it has one, to the end.

    Returns the trained theta; it is also saved as `weights.safetensors`. A run that another process
    trains, or whose recipe or data are no longer those that it began with, is refused.
    """
    run.check_unchanged()
    experiment, folder = run.experiment, run.folder
    metrics, kept = folder / "metrics.jsonl", folder / "checkpoints"
    weights = folder / "weights.safetensors"
    save_weights = functools.partial(storage.save_weights, weights, experiment.learned)
    optimizer, mesh = guarded(experiment), particle_mesh(experiment.meta)
    # A compiled program takes arguments placed as those it was compiled for.
    everywhere = NamedSharding(mesh, PartitionSpec())
    with files.locked(folder), jax.set_mesh(mesh):
        for torn in [*files.temporary_files(folder), *files.temporary_files(kept)]:
            torn.unlink()  # what a killed run was writing
        done, length, dropped = _resumed_from(metrics, storage.checkpoints(kept))
        begun = functools.partial(begin, experiment, optimizer)
        like = eqx.filter_eval_shape(begun)
        state = storage.load_checkpoint(kept, done, like) if done else begun()
        logged, compiled = _Log(experiment.record), 0
        metrics.touch()
        os.truncate(metrics, length)  # what comes after the checkpoint will be logged again
        with (
            metrics.open("a") as log,
            opened(run.loggers, folder, run.config["settings"]) as tell,
            progress("meta-training", experiment.outer_steps, done=done, show=show_progress) as at,
        ):
            while done < experiment.outer_steps:
                num_steps = min(experiment.steps_per_chunk, experiment.outer_steps - done)
                began = time.perf_counter()
                state = jax.device_put(state, everywhere)
                state, record = unroll(experiment.meta, optimizer, state, num_steps, record=logged)
                record = {name: np.asarray(value) for name, value in record.items()}
                skipped = int(state.opt_state.total_notfinite)
                record["finite"] = 1.0 - np.diff(record.pop("skipped"), append=skipped)
                seconds = (time.perf_counter() - began) / num_steps
                if num_steps != compiled:
                    compiled = num_steps
                    release_memory()
                for i in range(num_steps):
                    values = {name: float(value[i]) for name, value in record.items()}
                    values["seconds"] = seconds
                    log.write(files.to_line({"step": done + i, **values}))
                    tell(done + i, values)
                log.flush()
                os.fsync(log.fileno())
                done += num_steps
                # In this order: neither what has a checkpoint nor weights are computed again.
                save_weights(state.params)
                storage.save_checkpoint(kept, done, state)
                dropped += int(record["dropped"].sum())
                text = f"meta-loss {np.mean(record['meta_loss']):.3f}, {1 / seconds:.1f} steps/s"
                text += f", {dropped} particles dropped (not finite)" * bool(dropped)
                at(done, text + f", {skipped} skipped (not finite)" * bool(skipped))
        save_weights(state.params)
        return state.params


def _resumed_from(metrics: Path, saved: Sequence[int]) -> tuple[int, int, int]:
    """Returns the last checkpoint that the log has all lines of, or 0 if there is none at all.

    With it, how long the log was then, and how many particles had been dropped.
    """
    found, lines, dropped = (0, 0, 0), 0, 0
    for line, end in files.scan_lines(metrics):
        lines, dropped = lines + 1, dropped + int(max(0, files.number_in(line, "dropped")))
        if lines in saved:
            found = lines, end, dropped
    if saved and not found[0]:
        raise ValueError(
            f"{metrics} holds {lines} whole lines, and the first of the checkpoints was made after "
            f"{saved[0]} outer steps; restore it from a copy, or begin a new run."
        )
    return found


def replay(
    experiment: Experiment, num_steps: int, record: Callable[[Step], Any]
) -> Iterator[Record]:
    """Does meta-training again, bit for bit, and yields records of so many steps without end."""
    optimizer, mesh = guarded(experiment), particle_mesh(experiment.meta)
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        state = begin(experiment, optimizer)
    while True:
        with jax.set_mesh(mesh):
            state = jax.device_put(state, everywhere)
            state, records = unroll(experiment.meta, optimizer, state, num_steps, record=record)
        yield jax.device_get(records)


def kept_thetas(experiment: Experiment, folder: Path) -> dict[int, Theta]:
    """Returns the weights of a run by outer step: those it began with, and of its checkpoints."""
    like = jax.eval_shape(lambda: begin(experiment, guarded(experiment)))
    folder = folder / "checkpoints"
    saved = {n: storage.load_checkpoint(folder, n, like) for n in storage.checkpoints(folder)}
    return {0: experiment.initial_theta(), **{n: state.params for n, state in saved.items()}}


def guarded(experiment: Experiment) -> optax.GradientTransformation:
    """Returns the outer optimizer, which skips, and counts, steps that are not finite.

    Not only gradient and loss have to be: the square of a gradient of 1e20 overflows, and would
    leave an infinity in Adam's second moments, after which no step is taken any more.
    """
    inner = optax.with_extra_args_support(experiment.outer_optimizer)
    start = optax.apply_if_finite(inner, max_consecutive_errors=2**31 - 1).init

    def update(grads: Theta, state: Any, params: Theta | None = None, **extra: Any) -> Any:
        old = state.inner_state
        updates, new = inner.update(grads, old, params, **extra)
        # What was not finite to begin with, as a bound may be, need not be so afterwards.
        spoilt = jax.tree.map(lambda a, b: jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b)), old, new)
        seen = (updates, extra.get("value"), optax.tree.norm(grads))
        broken = jax.tree.map(lambda leaf: ~jnp.all(jnp.isfinite(leaf)), seen)
        bad = jnp.any(jnp.stack(jax.tree.leaves((spoilt, broken))))
        still = (optax.tree.zeros_like(updates), old)
        updates, kept = jax.tree.map(lambda a, b: jnp.where(bad, a, b), still, (updates, new))
        return updates, optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(bad, state.notfinite_count + 1, 0),
            last_finite=~bad,
            total_notfinite=state.total_notfinite + bad.astype(jnp.int32),
            inner_state=kept,
        )

    return optax.GradientTransformationExtraArgs(start, update)


class _Log(eqx.Module):
    """What is logged of each outer step. A module, as the arrays of `more` are then arguments."""

    more: Callable[[Step], Mapping[str, Float[Array, ""]]] | None

    def __call__(self, step: Step) -> dict[str, Float[Array, ""]]:
        norm = optax.tree.norm(step.grads)
        more = {} if self.more is None else self.more(step)
        return {
            **more,
            "meta_loss": step.loss,
            "gradient_norm": norm,
            "update_norm": optax.tree.norm(step.updates),
            "skipped": step.opt_state.total_notfinite,  # before this step
            "dropped": jnp.asarray(step.dropped, norm.dtype),
        }


def begin(experiment: Experiment, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state that meta-training begins with."""
    run_key = jax.random.split(jax.random.key(experiment.seed))[1]
    return start(experiment.meta, optimizer, experiment.initial_theta(), run_key)
