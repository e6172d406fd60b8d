"""Meta-training as a long job: compiled chunks of the outer unroll, a log, checkpoints, resuming.

A run is a folder: `run.json` (recipe, settings, the printed experiment), `metrics.jsonl` (a line
per outer step), `checkpoints/`, and `weights.safetensors`, the latest theta. It can be killed at
any moment; resumed, it continues as if nothing had happened, bit for bit.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lopt.core.types import Theta
from lopt.core.unroll import Step, TrainState, start, unroll
from lopt.experiment import storage
from lopt.experiment.experiment import Experiment
from lopt.experiment.files import read_json, read_lines, to_line, write_bytes, write_json
from lopt.experiment.registry import build


def create(folder: Path, recipe: str, settings: Sequence[str] = ()) -> Experiment:
    """Builds an experiment and makes the folder of a new run of it.

    Raises:
        FileExistsError: if the folder already holds a run.
        FileNotFoundError, ValueError: if the recipe or a setting is wrong; nothing is written.
    """
    if (folder / "run.json").exists():
        raise FileExistsError(
            f"{folder} already holds a run; continue it with lopt train --resume {folder}, "
            "or give another folder with --run."
        )
    experiment = build(recipe, settings)
    source = str(Path(recipe).resolve()) if recipe.endswith(".py") else recipe
    config = {
        "recipe": source,
        "settings": list(settings),
        "versions": {"jax": jax.__version__},
        "experiment": printed(experiment),
    }
    write_json(folder / "run.json", config)
    return experiment


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
    experiment = build(config["recipe"], config["settings"])
    if printed(experiment) != config["experiment"]:
        raise ValueError(
            f"The recipe {config['recipe']} no longer gives the experiment that {folder} began "
            "with (it was edited, or other data files are found now); begin a new run instead."
        )
    return experiment


def printed(experiment: Experiment) -> str:
    """Returns the experiment as text, without the addresses of functions in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(experiment))


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
    state = _latest_state(experiment, optimizer, folder)
    done = int(state.step)
    metrics = folder / "metrics.jsonl"
    # What was logged after the checkpoint will be computed, and logged, again.
    kept = [line for line in read_lines(metrics) if line["step"] < done]
    write_bytes(metrics, "".join(map(to_line, kept)).encode())
    with (
        metrics.open("a") as log,
        _progress(experiment.outer_steps, done, show_progress) as advance,
    ):
        while done < experiment.outer_steps:
            num_steps = min(experiment.steps_per_chunk, experiment.outer_steps - done)
            began = time.perf_counter()
            state, record = unroll(experiment.meta, optimizer, state, num_steps, record=_metrics)
            record = {name: np.asarray(value) for name, value in record.items()}
            seconds = (time.perf_counter() - began) / num_steps
            for i in range(num_steps):
                values = {name: float(value[i]) for name, value in record.items()}
                log.write(to_line({"step": done + i, **values, "seconds": seconds}))
            log.flush()
            done += num_steps
            storage.save_checkpoint(folder / "checkpoints", done, state)
            storage.save_weights(folder / "weights.safetensors", experiment.learned, state.params)
            skipped = int(state.opt_state.total_notfinite)
            advance(num_steps, float(np.mean(record["meta_loss"])), skipped)
    return state.params


def guarded(experiment: Experiment) -> optax.GradientTransformation:
    """Returns the outer optimizer, skipping (and counting) steps with a gradient not finite."""
    return optax.apply_if_finite(experiment.outer_optimizer, max_consecutive_errors=2**31 - 1)


def skipped_steps(folder: Path) -> int:
    """Returns how many outer steps of a run had a gradient that was not finite."""
    return sum(not line["finite"] for line in read_lines(folder / "metrics.jsonl"))


def _metrics(step: Step) -> dict[str, Float[Array, ""]]:
    norm = optax.tree.norm(step.grads)
    return {
        "meta_loss": step.loss,
        "gradient_norm": norm,
        "update_norm": optax.tree.norm(step.updates),
        "finite": jax.numpy.isfinite(norm).astype(norm.dtype),
    }


def _latest_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, folder: Path
) -> TrainState:
    def begin() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(experiment.seed))
        theta = experiment.learned.init(init_key)
        return start(experiment.meta, optimizer, theta, run_key)

    numbers = storage.checkpoints(folder / "checkpoints")
    if not numbers:
        return begin()
    like = eqx.filter_eval_shape(begin)
    return storage.load_checkpoint(folder / "checkpoints", numbers[-1], like)


class _progress:
    """A progress bar with meta-loss, speed and skipped steps; or none."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        self.bar = Progress(
            TextColumn("meta-training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not show,
        )
        self.task = self.bar.add_task("", total=total, completed=done, text="compiling")
        self.skipped = 0

    def __enter__(self) -> Any:
        self.bar.start()
        self.began = time.perf_counter()
        self.steps = 0
        return self.advance

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def advance(self, steps: int, meta_loss: float, skipped: int) -> None:
        self.steps += steps
        speed = self.steps / (time.perf_counter() - self.began)
        text = f"meta-loss {meta_loss:.3f}, {speed:.1f} steps/s"
        if skipped:
            text += f", {skipped} skipped (not finite)"
        self.bar.update(self.task, advance=steps, text=text)
