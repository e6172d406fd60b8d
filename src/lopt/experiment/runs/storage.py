"""Weights and states on disk: safetensors for arrays, JSON for structure. Nothing is unpickled."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.runs.description import describe, restore
from lopt.experiment.runs.files import read_json, write_bytes, write_json

KEEP = 3


def save(path: str | Path, learned: AbstractLearnedOptimizer, theta: Theta) -> None:
    """Saves a learned optimizer, configuration, weights and their checksum, in a safetensors file.

    Raises:
        TypeError: if `learned` is not made of parts of lopt.
        ValueError: if `theta` is not of its shape.
    """
    described = describe(learned)
    like = eqx.filter_eval_shape(learned.init, jax.random.key(0))
    expected, found = (
        {name: leaf.shape for name, leaf in _named_leaves(tree)[0]} for tree in (like, theta)
    )
    if expected != found:
        raise ValueError(f"save(theta) is {found}, which does not fit {learned}: {expected}.")
    # One key, as safetensors writes several in any order, and equal weights are equal files.
    metadata = {"lopt": json.dumps(described | {"sha256": _digest(_arrays(theta))})}
    write_bytes(Path(path), _to_bytes(theta, metadata))


def save_weights(path: Path, learned: AbstractLearnedOptimizer, theta: Theta) -> None:
    """Saves weights also of an optimizer that has parts from elsewhere.

    Its configuration is then not in the file: `load` needs to be given the learned optimizer.
    """
    try:
        save(path, learned, theta)
    except TypeError:
        write_bytes(path, _to_bytes(theta, {"sha256": _digest(_arrays(theta))}))


def load(
    path: str | Path, learned: AbstractLearnedOptimizer | None = None
) -> tuple[AbstractLearnedOptimizer, Theta]:
    """Loads what `save` saved.

    Args:
        path: of the file, or of a run's folder, which holds its latest weights.
        learned: the learned optimizer, for weights of one that has parts from outside of lopt;
            by default it is made as the file describes.

    Returns:
        The learned optimizer and its theta; `learned.optimizer(theta)` is an Optax optimizer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, its weights are not finite, or do not fit its
            configuration.
    """
    path = weights_file(Path(path))
    arrays, metadata = _read(path)
    if learned is None and "lopt" not in metadata:
        raise ValueError(
            f"{path} describes no optimizer (lopt.save did not write it, or its optimizer has "
            "parts from outside of lopt); give it, as in load(path, learned)."
        )
    checksum = metadata.get("sha256")
    if "lopt" in metadata:
        try:
            description = json.loads(metadata["lopt"])
            if isinstance(description, dict):
                checksum = description.get("sha256")
            learned = restore(description) if learned is None else learned
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} describes an optimizer that cannot be made: {error} Give it, as in "
                "load(path, learned)."
            ) from error
    if not isinstance(learned, AbstractLearnedOptimizer):
        raise ValueError(f"{path} describes {learned}, which is not a learned optimizer.")
    if checksum is not None and checksum != _digest(arrays):
        raise ValueError(f"{path} is damaged: its checksum is another; restore it from a copy.")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(
            f"{path} has weights that are not finite, in {', '.join(broken[:3])}; its "
            "meta-training diverged: use an earlier checkpoint, or train again."
        )
    like = eqx.filter_eval_shape(learned.init, jax.random.key(0))
    return learned, _fill(like, arrays, path, check_dtypes=False)


def weights_file(path: Path) -> Path:
    """Returns the file of weights that a path names: itself, or that of a run's folder."""
    return path / "weights.safetensors" if path.is_dir() else path


def load_optimizer(
    path: str | Path,
    learned: AbstractLearnedOptimizer | None = None,
    num_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Loads saved weights as an Optax optimizer, to be used wherever Optax is used.

    Args:
        path: as for `load`.
        learned: as for `load`.
        num_steps: the length of the run, for designs that use it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or its weights do not fit.
    """
    learned, theta = load(path, learned)
    return learned.optimizer(theta, num_steps)


def save_checkpoint(folder: Path, step: int, state: Any) -> None:
    """Saves a training state as checkpoint number `step`, and drops all but the last few.

    The arrays are written first; the JSON beside them, with their checksum, makes them count.
    """
    content = _to_bytes(state, {})
    write_bytes(folder / f"{step:08d}.safetensors", content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(folder / f"{step:08d}.json", {"step": step, "sha256": digest})
    for old in checkpoints(folder)[:-KEEP]:
        (folder / f"{old:08d}.json").unlink(missing_ok=True)
        (folder / f"{old:08d}.safetensors").unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[int]:
    """Returns the numbers of the checkpoints in a folder, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def load_checkpoint(folder: Path, step: int, like: Any) -> Any:
    """Loads checkpoint number `step` into the structure of `like`, a state or its shapes.

    Raises:
        ValueError: if it is damaged or does not fit.
    """
    path = folder / f"{step:08d}.safetensors"
    try:
        digest = read_json(path.with_suffix(".json"))["sha256"]
    except (ValueError, TypeError, KeyError):
        digest = None
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        others = [number for number in checkpoints(folder) if number < step]
        remedy = f"to resume from step {others[-1]}" if others else "to start again"
        raise ValueError(
            f"The checkpoint {path} is damaged: {path.with_suffix('.json').name} does not give "
            f"its checksum; delete both files {remedy}."
        )
    arrays, _ = _read(path)
    return _fill(like, arrays, path, check_dtypes=True)


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path) or "value", leaf) for path, leaf in leaves]
    return named, lambda new: jax.tree.unflatten(structure, new)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_bytes(tree: Any, metadata: dict[str, str]) -> bytes:
    return safetensors.numpy.save(_arrays(tree), metadata)


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by name."""
    named, _ = _named_leaves(tree)
    return {
        # safetensors 0.8.0 scrambles arrays that are not contiguous, without a word.
        name: np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")
        for name, leaf in named
    }


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and numbers of arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(
            f"There is no file {path}; give a file of lopt.save, or the folder of a run."
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); restore it from a copy."
        ) from error


def _fill(like: Any, arrays: dict[str, np.ndarray], path: Path, *, check_dtypes: bool) -> Any:
    """Puts arrays into the structure of `like`, by name."""
    named, unflatten = _named_leaves(like)
    missing = [name for name, _ in named if name not in arrays]
    extra = sorted(set(arrays) - {name for name, _ in named})
    if missing or extra:
        raise ValueError(
            f"{path} does not fit: it lacks {missing[:3]} and has the unknown {extra[:3]}; "
            "was it written with another configuration?"
        )
    leaves = []
    for name, leaf in named:
        array = arrays[name]
        if _is_key(leaf):
            leaves.append(jax.random.wrap_key_data(jnp.asarray(array)))
            continue
        if array.shape != leaf.shape or (check_dtypes and array.dtype != leaf.dtype):
            raise ValueError(
                f"{path} does not fit: {name} is {array.dtype}{list(array.shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}; was it written with another configuration?"
            )
        leaves.append(jnp.asarray(array, leaf.dtype))
    return unflatten(leaves)
