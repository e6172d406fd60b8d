"""Meta-training as a long job: compiled chunks of the outer unroll, a log, checkpoints, resuming.

A run's folder holds `run.json`, `metrics.jsonl` (a line per outer step), `checkpoints/`, and
`weights.safetensors`, the latest theta. It can be killed at any moment; resumed, it continues as if
nothing had happened, bit for bit.
"""

import abc
import contextlib
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
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.devices import is_spread, place, replicate
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.types import Key, Record, Theta
from lopt.core.unroll import Step, TrainState, start, unroll
from lopt.estimators import particle_mesh
from lopt.experiment.report import progress
from lopt.experiment.runs import files, storage
from lopt.experiment.runs.distributed import is_first, tell_each_other, together
from lopt.experiment.runs.environment import release_memory
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.loggers import Log, opened
from lopt.experiment.runs.run import Run, without_addresses


class AbstractEngine(abc.ABC):
    """How outer steps are taken, for one run or several at a time."""

    # What is seen of it in the progress.
    status = ""

    @abc.abstractmethod
    def begin(self) -> TrainState:
        """Returns the state before the first outer step."""

    @abc.abstractmethod
    def restore(self, begun: TrainState, states: list[TrainState]) -> TrainState:
        """Returns the state whose `states` these are; `begun` is that of `begin`."""

    @abc.abstractmethod
    def advance(self, state: TrainState, num_steps: int) -> tuple[TrainState, Record]:
        """Takes outer steps; returns the next state, and what is logged of each."""

    def states(self, state: TrainState) -> list[TrainState]:
        """Returns the state of each of the runs."""
        return [state]

    def records(self, record: Record) -> list[Record]:
        """Returns the record of each of the runs."""
        return [record]


def train(
    run: Run,
    *,
    show_progress: bool = True,
    engine: AbstractEngine | None = None,
    stop: Callable[[], int] = lambda: 0,
) -> Theta:
    """Meta-trains, from the run's last checkpoint if it has one, to the end.

    Returns the trained theta; it is also saved as `weights.safetensors`. A run that another process
    trains, or whose recipe or data are no longer those that it began with, is refused. Once `stop`
    returns the number of a signal, a KeyboardInterrupt has it, after the next checkpoint.
    """
    return train_together([run], engine or OneProgram(run.experiment), show_progress, stop)[0]


def train_together(
    runs: Sequence[Run],
    engine: AbstractEngine,
    show_progress: bool = True,
    stop: Callable[[], int] = lambda: 0,
) -> list[Theta]:
    """Meta-trains runs that one engine takes the steps of, as `train` does one."""
    for run in runs:
        together(run.check_unchanged)
    journals = [Journal(run) for run in runs]
    steps, at_once = runs[0].experiment.outer_steps, runs[0].experiment.steps_per_chunk
    with contextlib.ExitStack() as stack:
        for one in journals:
            together(functools.partial(stack.enter_context, one.held()))
        each = [set(together(one.points)) for one in journals]
        points = set.intersection(*each)
        if not points and max(map(max, filter(None, each)), default=0) > at_once:
            # More than what a killed process was writing would be lost.
            raise ValueError(
                "These runs have no checkpoint of the same outer step; train each alone, as by "
                f"lopt train --resume {runs[0].folder}."
            )
        done = int(tell_each_other(str(max(points, default=0)))[0])
        state = engine.begin()
        if done:
            load, like = storage.load_checkpoint, shapes(runs[0].experiment)
            saved = [together(functools.partial(load, j.kept, done, like)) for j in journals]
            state = engine.restore(state, saved)
        for one in journals:
            stack.enter_context(one.opened(done))
        shown = progress("meta-training", steps, done=done, show=show_progress and is_first())
        at, compiled = stack.enter_context(shown), 0
        while done < steps:
            num_steps, began = min(at_once, steps - done), time.perf_counter()
            state, record = engine.advance(state, num_steps)
            records, states = engine.records(jax.device_get(record)), engine.states(state)
            skipped = [int(each.opt_state.total_notfinite) for each in states]
            for each, last in zip(records, skipped, strict=True):
                each["finite"] = 1.0 - np.diff(each.pop("skipped"), append=last)
            seconds = (time.perf_counter() - began) / num_steps
            if num_steps != compiled:
                compiled = num_steps
                release_memory()
            for journal, each, its in zip(journals, records, states, strict=True):
                journal.write(done, each, seconds, its)
            done += num_steps
            losses = [each["meta_loss"] for each in records]
            text = f"meta-loss {np.mean(losses):.3f}, {1 / seconds:.1f} steps/s{engine.status}"
            dropped = sum(one.dropped for one in journals)
            text += f", {dropped} particles dropped (not finite)" * bool(dropped)
            at(done, text + f", {sum(skipped)} skipped (not finite)" * any(skipped))
            if number := max(map(int, tell_each_other(str(stop())))):
                raise KeyboardInterrupt(number)
        states = engine.states(state)
        for journal, its in zip(journals, states, strict=True):
            journal.save_weights(its)
        return [its.params for its in states]


class Journal:
    """What a run in training writes, so that it can be killed at any moment and goes on.

    Of several processes that train it the first has the log and the weights.
    """

    def __init__(self, run: Run) -> None:
        self.run, self._learned = run, run.experiment.learned
        self._metrics = run.folder / "metrics.jsonl"
        self.kept = run.folder / "checkpoints"
        self._tell: Log
        self.dropped = 0  # particles, of all that is logged

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder against other processes, and tidies what a killed one was writing."""
        if not is_first():
            yield
            return
        with files.locked(self.run.folder):
            files.tidy(self.run.folder)
            files.tidy(self.kept)
            yield

    def points(self) -> list[int]:
        """Returns the checkpoints that the log has all lines of: from there the run can go on."""
        saved = storage.checkpoints(self.kept)
        lines = sum(1 for _ in files.scan_lines(self._metrics))
        found = [step for step in saved if step <= lines]
        if saved and not found:
            raise ValueError(
                f"{self._metrics} holds {lines} whole lines, and the first of the checkpoints was "
                f"made after {saved[0]} outer steps; restore it from a copy, or begin a new run."
            )
        return found

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Opens the log after so many steps: what comes after them will be logged again."""
        length = 0
        for number, (line, end) in enumerate(files.scan_lines(self._metrics)):
            if number == step:
                break
            length = end
            self.dropped += int(max(0, files.number_in(line, "dropped")))
        if not is_first():
            yield
            return
        self._metrics.touch()
        os.truncate(self._metrics, length)
        loggers, settings = self.run.loggers, self.run.config["settings"]
        with (
            self._metrics.open("a") as self._log,
            opened(loggers, self.run.folder, settings) as self._tell,
        ):
            yield

    def write(
        self, first: int, record: Mapping[str, np.ndarray], seconds: float, state: TrainState
    ) -> None:
        """Writes the lines of some outer steps, the weights and a checkpoint after them."""
        done = first + len(record["meta_loss"])
        self.dropped += int(record["dropped"].sum())
        if is_first():
            for i in range(done - first):
                values = {name: float(value[i]) for name, value in record.items()}
                values["seconds"] = seconds
                self._log.write(files.to_line({"step": first + i, **values}))
                self._tell(first + i, values)
            self._log.flush()
            os.fsync(self._log.fileno())
        self.save_weights(state)
        # Last: what has a checkpoint is not computed again.
        storage.save_checkpoint(self.kept, done, state, tell_each_other)

    def save_weights(self, state: TrainState) -> None:
        """Writes the weights of a state."""
        if is_first():
            path = self.run.folder / "weights.safetensors"
            storage.save_weights(path, self._learned, state.params)


class OneProgram(AbstractEngine):
    """Outer steps as one compiled program, on all devices that its particles divide among.

    Those of other processes are among them, if this one was joined to others.
    """

    def __init__(self, experiment: Experiment, record: Callable[[Step], Any] | None = None) -> None:
        self._experiment, self._record = experiment, record or StepLog(experiment.record)
        self._optimizer, self._mesh = guarded(experiment), particle_mesh(experiment.meta)
        self._meta = replicate(experiment.meta, self._mesh)

    @override
    def begin(self) -> TrainState:
        with jax.set_mesh(self._mesh):
            begun = replicate(beginning(self._experiment), self._mesh)
            return self._settled(start(self._meta, self._optimizer, *begun))

    @override
    def restore(self, begun: TrainState, states: list[TrainState]) -> TrainState:
        return jax.tree.map(lambda leaf, old: place(leaf, old.sharding), states[0], begun)

    @override
    def advance(self, state: TrainState, num_steps: int) -> tuple[TrainState, Record]:
        with jax.set_mesh(self._mesh):
            state, record = unroll(
                self._meta, self._optimizer, state, num_steps, record=self._record
            )
            return self._settled(state), record

    def _settled(self, state: TrainState) -> TrainState:
        # A compiled program takes arguments placed as those it was compiled for.
        return jax.tree.map(lambda x: x if is_spread(x) else replicate(x, self._mesh), state)


def kept_thetas(experiment: Experiment, folder: Path) -> dict[int, Theta]:
    """Returns the weights of a run by outer step: those it began with, and of its checkpoints."""
    like, folder = shapes(experiment), folder / "checkpoints"
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


class StepLog(eqx.Module):
    """What is logged of each outer step. A module, as the arrays of `more` are then arguments."""

    more: Callable[[Step], Mapping[str, Float[Array, ""]]] | None

    def __call__(self, step: Step) -> dict[str, Float[Array, ""]]:
        """Returns numbers by name."""
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


def shapes(experiment: Experiment) -> TrainState:
    """Returns the shapes of the state of meta-training."""
    optimizer = guarded(experiment)
    return jax.eval_shape(lambda: start(experiment.meta, optimizer, *beginning(experiment)))


def program(experiment: Experiment) -> tuple[str, list[Any]]:
    """Returns the program of an outer step, traced only: as text, and the arrays that it encloses.

    Whatever is wrong with the step is raised here, before anything is compiled.
    """
    outer = guarded(experiment)

    def step(meta: AbstractGradientEstimator, theta: Theta, key: Key) -> Any:
        state = start(meta, outer, theta, key)
        return unroll(meta, outer, state, 1, record=StepLog(experiment.record))

    with jax.set_mesh(particle_mesh(experiment.meta)):
        found = eqx.filter_make_jaxpr(step)(experiment.meta, *beginning(experiment))[0]
    return without_addresses(f"{found.jaxpr}"), found.consts


def beginning(experiment: Experiment) -> tuple[Theta, Key]:
    """Returns the weights and the key that meta-training begins with."""
    run_key = jax.random.split(jax.random.key(experiment.seed))[1]
    return experiment.initial_theta(), run_key
