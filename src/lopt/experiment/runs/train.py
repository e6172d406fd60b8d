"""Meta-training as a long job: compiled chunks of the outer unroll, a log, checkpoints, resuming.

A run is a folder: `run.json` (recipe, settings, the printed experiment), `metrics.jsonl` (a line
per outer step), `checkpoints/`, and `weights.safetensors`, the latest theta. It can be killed at
any moment; resumed, it continues as if nothing had happened, bit for bit.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lopt.core.types import Theta
from lopt.core.unroll import Step, TrainState, start, unroll
from lopt.estimators import particle_mesh
from lopt.experiment.runs import storage
from lopt.experiment.runs.environment import release_memory
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.files import (
    digest,
    locked,
    number_in,
    read_json,
    read_columns,
    scan_lines,
    temporary_files,
    to_line,
    write_json,
)
from lopt.experiment.runs.registry import build
from lopt.experiment.report import progress


def create(folder: Path, recipe: str, settings: Sequence[str] = ()) -> Experiment:
    """Builds an experiment and makes the folder of a new run of it.

    Raises:
        FileExistsError: if the folder already holds a run.
        FileNotFoundError, ValueError: if the recipe or a setting is wrong; nothing is written.
    """
    if holds_run(folder):
        raise FileExistsError(
            f"{folder} already holds a run; continue it with lopt train --resume {folder}, "
            "or give another folder with --run."
        )
    experiment = build(recipe, settings)
    config = {
        "recipe": str(Path(recipe).resolve()) if recipe.endswith(".py") else recipe,
        "recipe_sha256": source_digest(recipe),
        "settings": list(settings),
        "versions": {name: version(name) for name in ("lopt", "jax", "equinox", "optax")},
        "experiment": printed(experiment),
    }
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", config, new=True)
    except FileExistsError:
        raise FileExistsError(f"{folder} was taken by another run at this moment.") from None
    except OSError as error:
        raise type(error)(f"The folder {folder} cannot be made ({error}); try another.") from error
    return experiment


def holds_run(folder: Path) -> bool:
    """Returns whether anything of a run is in a folder."""
    names = ("run.json", "metrics.jsonl", "weights.safetensors")
    return any((folder / name).exists() for name in names) or bool(
        storage.checkpoints(folder / "checkpoints")
    )


def reopen(folder: Path) -> Experiment:
    """Builds the experiment of an existing run again.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the recipe no longer gives the experiment that the run began with.
    """
    if not (folder / "run.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no run (it has no run.json); begin one with "
            f"lopt train RECIPE --run {folder}."
        )
    config = read_json(folder / "run.json")
    fields = ("recipe", "recipe_sha256", "settings", "experiment")
    if not (isinstance(config, dict) and all(field in config for field in fields)):
        raise ValueError(
            f"{folder / 'run.json'} is not that of a run: it lacks one of {', '.join(fields)}; "
            "restore it from a copy, or begin a new run in another folder."
        )
    # A file of code that is not the recorded one is not executed.
    edited = source_digest(config["recipe"]) != config["recipe_sha256"]
    experiment = None if edited else build(config["recipe"], config["settings"])
    if experiment is None or _squeezed(printed(experiment)) != _squeezed(config["experiment"]):
        raise ValueError(
            f"The recipe {config['recipe']} no longer gives the experiment that {folder} began "
            "with (it was edited, or other data files are found now); begin a new run instead."
        )
    return experiment


def source_digest(recipe: str) -> str | None:
    """Returns the checksum of a recipe file; None for recipes that come with lopt."""
    if not recipe.endswith(".py"):
        return None
    return digest(Path(recipe))


def printed(experiment: Experiment) -> str:
    """Returns the experiment as text, without the addresses of functions in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(experiment))


def _squeezed(text: str) -> str:
    """Returns text without its layout, nor a word that tells whether functions are type-checked."""
    return re.sub(r"\s+|wrapped ", "", text)


def train(experiment: Experiment, folder: Path, *, show_progress: bool = True) -> Theta:
    """Meta-trains, from the run's last checkpoint if it has one, to the end.

    Args:
        experiment: what to train.
        folder: the run's folder.
        show_progress: whether to draw a progress bar.

    Returns:
        The trained theta; it is also saved as `weights.safetensors`.

    Raises:
        ValueError: if the last checkpoint is damaged or does not fit.
    """
    optimizer = guarded(experiment)
    mesh = particle_mesh(experiment.meta)
    # A compiled program takes arguments placed as those it was compiled for.
    everywhere = NamedSharding(mesh, PartitionSpec())
    with locked(folder), jax.set_mesh(mesh):
        for torn in [*temporary_files(folder), *temporary_files(folder / "checkpoints")]:
            torn.unlink()  # what a killed run was writing
        metrics = folder / "metrics.jsonl"
        # Where each checkpoint was made: how long the log was, and particles dropped until then.
        saved, until = storage.checkpoints(folder / "checkpoints"), {0: (0, 0)}
        logged = dropped = 0
        for line, end in scan_lines(metrics):
            logged, dropped = logged + 1, dropped + int(max(0, number_in(line, "dropped")))
            if logged in saved:
                until[logged] = end, dropped
        state = _latest_state(experiment, optimizer, folder, logged)
        done = int(state.step)
        length, dropped = until[done]
        record_of, programs = _Log(experiment.record), dict[int, Any]()
        with (
            metrics.open("a") as log,
            progress("meta-training", experiment.outer_steps, done=done, show=show_progress) as at,
        ):
            # What was logged after the checkpoint will be computed, and logged, again.
            log.truncate(length)
            while done < experiment.outer_steps:
                num_steps = min(experiment.steps_per_chunk, experiment.outer_steps - done)
                began = time.perf_counter()
                state = jax.device_put(state, everywhere)
                if num_steps not in programs:
                    compiled: Any = unroll  # by Equinox, which mypy does not see
                    programs[num_steps] = compiled.lower(
                        experiment.meta, optimizer, state, num_steps, record=record_of
                    ).compile()
                    release_memory()
                state, record = programs[num_steps](
                    experiment.meta, optimizer, state, num_steps, record=record_of
                )
                record = {name: np.asarray(value) for name, value in record.items()}
                skipped = int(state.opt_state.total_notfinite)
                record["finite"] = 1.0 - np.diff(record.pop("skipped"), append=skipped)
                seconds = (time.perf_counter() - began) / num_steps
                for i in range(num_steps):
                    values = {name: float(value[i]) for name, value in record.items()}
                    log.write(to_line({"step": done + i, **values, "seconds": seconds}))
                log.flush()
                os.fsync(log.fileno())
                done += num_steps
                # In this order: neither what has a checkpoint nor weights are computed again.
                storage.save_weights(
                    folder / "weights.safetensors", experiment.learned, state.params
                )
                storage.save_checkpoint(folder / "checkpoints", done, state)
                dropped += int(record["dropped"].sum())
                text = f"meta-loss {np.mean(record['meta_loss']):.3f}, {1 / seconds:.1f} steps/s"
                text += f", {dropped} particles dropped (not finite)" * bool(dropped)
                at(done, text + f", {skipped} skipped (not finite)" * bool(skipped))
        storage.save_weights(folder / "weights.safetensors", experiment.learned, state.params)
        return state.params


def guarded(experiment: Experiment) -> optax.GradientTransformation:
    """Returns the outer optimizer, which skips, and counts, steps that are not finite.

    Not only gradient and loss have to be: the square of a gradient of 1e20 overflows, and would
    leave an infinity in Adam's second moments, after which no step is taken any more. A gradient
    whose norm overflows is skipped whatever the optimizer.
    """
    inner = optax.with_extra_args_support(experiment.outer_optimizer)
    start = optax.apply_if_finite(inner, max_consecutive_errors=2**31 - 1).init

    def update(grads: Theta, state: Any, params: Theta | None = None, **extra: Any) -> Any:
        old = state.inner_state
        updates, new = inner.update(grads, old, params, **extra)
        loss = extra.get("value", jnp.zeros(()))
        # What was not finite to begin with, as a bound may be, need not be so afterwards.
        spoilt = jax.tree.map(lambda a, b: jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b)), old, new)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((updates, loss))]
        finite.append(jnp.isfinite(optax.tree.norm(grads)))
        fine = jnp.all(jnp.stack(finite)) & ~jnp.any(jnp.stack([*jax.tree.leaves(spoilt), False]))
        updates = jax.tree.map(lambda u: jnp.where(fine, u, jnp.zeros_like(u)), updates)
        kept = jax.tree.map(lambda a, b: jnp.where(fine, b, a), old, new)
        bad = (~fine).astype(jnp.int32)
        return updates, optax.ApplyIfFiniteState(
            notfinite_count=bad * (state.notfinite_count + 1),
            last_finite=fine,
            total_notfinite=state.total_notfinite + bad,
            inner_state=kept,
        )

    return optax.GradientTransformationExtraArgs(start, update)


def skipped_steps(folder: Path) -> int:
    """Returns how many outer steps of a run had a gradient that was not finite."""
    return int(np.sum(read_columns(folder / "metrics.jsonl", ["finite"]) == 0))


def dropped_particles(folder: Path) -> int:
    """Returns how many particles of a run's outer steps were left out as not finite."""
    return int(np.nansum(read_columns(folder / "metrics.jsonl", ["dropped"])))


class _Log(eqx.Module):
    """What is logged of each outer step. A module, as the arrays of `more` are then arguments."""

    more: Callable[[Step], Mapping[str, Float[Array, ""]]] | None

    def __call__(self, step: Step) -> dict[str, Float[Array, ""]]:
        more = {} if self.more is None else self.more(step)
        return {**more, **_metrics(step)}


def _metrics(step: Step) -> dict[str, Float[Array, ""]]:
    norm = optax.tree.norm(step.grads)
    return {
        "meta_loss": step.loss,
        "gradient_norm": norm,
        "update_norm": optax.tree.norm(step.updates),
        "skipped": step.opt_state.total_notfinite,  # before this step
        "dropped": jnp.asarray(step.dropped, norm.dtype),
    }


def initial_theta(experiment: Experiment) -> Theta:
    """Returns the weights that meta-training begins with."""
    if experiment.initial is not None:
        return experiment.initial
    return experiment.learned.init(jax.random.split(jax.random.key(experiment.seed))[0])


def begin(experiment: Experiment, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state that meta-training begins with."""
    run_key = jax.random.split(jax.random.key(experiment.seed))[1]
    return start(experiment.meta, optimizer, initial_theta(experiment), run_key)


def _latest_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, folder: Path, logged: int
) -> TrainState:
    """Returns the state of the last checkpoint that the log has all lines of, or the first."""
    saved = storage.checkpoints(folder / "checkpoints")
    numbers = [number for number in saved if number <= logged]
    if saved and not numbers:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} holds {logged} whole lines, and the first of the "
            f"checkpoints was made after {saved[0]} outer steps; restore it from a copy, or begin "
            "a new run."
        )
    if not numbers:
        return begin(experiment, optimizer)
    like = eqx.filter_eval_shape(lambda: begin(experiment, optimizer))
    return storage.load_checkpoint(folder / "checkpoints", numbers[-1], like)
