"""Meta-training as a long job: compiled chunks of the outer unroll, a log, checkpoints, resuming.

A run is a folder: `run.json` (recipe, settings, the printed experiment), `metrics.jsonl` (a line
per outer step), `checkpoints/`, and `weights.safetensors`, the latest theta. It can be killed at
any moment; resumed, it continues as if nothing had happened, bit for bit.
"""

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

from lopt.core.types import State, Theta
from lopt.core.unroll import Step, TrainState, start, unroll
from lopt.estimators import particle_mesh
from lopt.experiment import storage
from lopt.experiment.cache import release_memory
from lopt.experiment.experiment import Experiment
from lopt.experiment.files import digest, read_json, read_lines, to_line, write_bytes, write_json
from lopt.experiment.registry import build
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
        write_json(folder / "run.json", config)
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
    experiment = build(config["recipe"], config["settings"])
    edited = source_digest(config["recipe"]) != config["recipe_sha256"]
    if edited or _squeezed(printed(experiment)) != _squeezed(config["experiment"]):
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
    for torn in [*folder.glob(".*"), *(folder / "checkpoints").glob(".*")]:
        torn.unlink()  # what a killed run was writing
    optimizer = guarded(experiment)
    mesh = particle_mesh(experiment.meta)
    # A compiled program takes arguments placed as those it was compiled for.
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        state = _latest_state(experiment, optimizer, folder)
        done = int(state.step)
        metrics = folder / "metrics.jsonl"
        # What was logged after the checkpoint will be computed, and logged, again.
        kept = [line for line in read_lines(metrics) if line["step"] < done]
        if len(kept) < done:
            raise ValueError(
                f"{metrics} holds {len(kept)} whole lines for {done} outer steps that are done; "
                "restore it from a copy, or begin a new run."
            )
        dropped = sum(int(line.get("dropped", 0)) for line in kept)
        logged, programs = _Log(experiment.record), dict[int, Any]()
        write_bytes(metrics, "".join(map(to_line, kept)).encode())
        with (
            metrics.open("a") as log,
            progress("meta-training", experiment.outer_steps, done=done, show=show_progress) as at,
        ):
            while done < experiment.outer_steps:
                num_steps = min(experiment.steps_per_chunk, experiment.outer_steps - done)
                began = time.perf_counter()
                state = jax.device_put(state, everywhere)
                if num_steps not in programs:
                    compiled: Any = unroll  # by Equinox, which mypy does not see
                    programs[num_steps] = compiled.lower(
                        experiment.meta, optimizer, state, num_steps, record=logged
                    ).compile()
                    release_memory()
                state, record = programs[num_steps](
                    experiment.meta, optimizer, state, num_steps, record=logged
                )
                record = {name: np.asarray(value) for name, value in record.items()}
                seconds = (time.perf_counter() - began) / num_steps
                for i in range(num_steps):
                    values = {name: float(value[i]) for name, value in record.items()}
                    log.write(to_line({"step": done + i, **values, "seconds": seconds}))
                log.flush()
                done += num_steps
                # In this order: neither what has a checkpoint nor weights are computed again.
                storage.save_weights(
                    folder / "weights.safetensors", experiment.learned, state.params
                )
                storage.save_checkpoint(folder / "checkpoints", done, state)
                skipped = int(state.opt_state.total_notfinite)
                dropped += int(record["dropped"].sum())
                text = f"meta-loss {np.mean(record['meta_loss']):.3f}, {1 / seconds:.1f} steps/s"
                text += f", {dropped} particles dropped (not finite)" * bool(dropped)
                at(done, text + f", {skipped} skipped (not finite)" * bool(skipped))
        storage.save_weights(folder / "weights.safetensors", experiment.learned, state.params)
        return state.params


def guarded(experiment: Experiment) -> optax.GradientTransformation:
    """Returns the outer optimizer, skipping (and counting) steps with a gradient not finite.

    A loss that is not finite counts as well: all particles were dropped then.

    A gradient whose norm overflows counts as not finite: its square would stay in Adam's second
    moments as an infinity, and no step would be taken any more.
    """
    checked = optax.apply_if_finite(experiment.outer_optimizer, max_consecutive_errors=2**31 - 1)

    def update(grads: Theta, state: State, params: Theta | None = None, **extra: Any) -> Any:
        loss = extra.get("value", jnp.zeros(()))
        healthy = jnp.isfinite(optax.tree.norm(grads)) & jnp.isfinite(loss)
        grads = jax.tree.map(lambda g: jnp.where(healthy, g, jnp.nan), grads)
        return checked.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(checked.init, update)


def skipped_steps(folder: Path) -> int:
    """Returns how many outer steps of a run had a gradient that was not finite."""
    return sum(not line["finite"] for line in read_lines(folder / "metrics.jsonl"))


def dropped_particles(folder: Path) -> int:
    """Returns how many particles of a run's outer steps were left out as not finite."""
    return sum(int(line.get("dropped", 0)) for line in read_lines(folder / "metrics.jsonl"))


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
        "finite": (jnp.isfinite(norm) & jnp.isfinite(step.loss)).astype(norm.dtype),
        "dropped": jnp.asarray(step.dropped, norm.dtype),
    }


def _latest_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, folder: Path
) -> TrainState:
    def begin() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(experiment.seed))
        theta = experiment.initial
        if theta is None:
            theta = experiment.learned.init(init_key)
        return start(experiment.meta, optimizer, theta, run_key)

    numbers = storage.checkpoints(folder / "checkpoints")
    if not numbers:
        return begin()
    like = eqx.filter_eval_shape(begin)
    return storage.load_checkpoint(folder / "checkpoints", numbers[-1], like)
