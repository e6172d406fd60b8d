"""Weights and states on disk: safetensors for arrays, JSON for structure. Nothing is unpickled."""

import hashlib
import json
import re
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
from lopt.experiment.runs.files import one_line, read_json, write_bytes, write_json

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
    _save(Path(path), described, theta)


def save_weights(path: Path, learned: AbstractLearnedOptimizer, theta: Theta) -> None:
    """Saves weights also of an optimizer that has parts from elsewhere.

    Its configuration is then not in the file: `load` needs to be given the learned optimizer.
    """
    try:
        save(path, learned, theta)
    except TypeError:
        _save(path, {}, theta)


def _save(path: Path, described: dict[str, Any], theta: Theta) -> None:
    described = described | {"checksum": _checksum(described, _arrays(theta))}
    # One key, as safetensors writes several in any order, and equal weights are equal files.
    write_bytes(path, safetensors.numpy.save(_arrays(theta), {"lopt": json.dumps(described)}))


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
    if not path.exists():
        raise FileNotFoundError(
            f"There is no file {path}; give a file of lopt.save, or the folder of a run."
        )
    arrays, metadata = _from_bytes(path.read_bytes(), path)
    try:
        described = json.loads(metadata.get("lopt", "{}"))
        # Files of earlier versions have no checksum.
        checksum = described.pop("checksum", None)
        whole = checksum in (None, _checksum(described, arrays))
    except (ValueError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is damaged: its checksum is another, or its description not a dictionary; "
            "restore it from a copy."
        )
    if learned is None and not described:
        raise ValueError(
            f"{path} describes no optimizer (lopt.save did not write it, or its optimizer has "
            "parts from outside of lopt); give it, as in load(path, learned)."
        )
    try:
        learned = restore(described) if learned is None else learned
        if not isinstance(learned, AbstractLearnedOptimizer):
            raise TypeError(f"{learned} is not a learned optimizer.")
        like = eqx.filter_eval_shape(learned.init, jax.random.key(0))
    # What a file describes may fail anyhow.
    except Exception as error:
        raise ValueError(
            f"{path} describes an optimizer that cannot be made: {one_line(error)} Give it, as in "
            "load(path, learned)."
        ) from error
    theta = _fill(like, arrays, path, exact=False)
    if broken := [name for name, array in _arrays(theta).items() if not np.isfinite(array).all()]:
        raise ValueError(
            f"{path} has weights that are not finite, in {', '.join(broken[:3])}; its "
            "meta-training diverged: use an earlier checkpoint, or train again."
        )
    return learned, theta


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
        path: as for `load`, which says also what is refused.
        learned: as for `load`.
        num_steps: the length of the run, for designs that use it.
    """
    learned, theta = load(path, learned)
    return learned.optimizer(theta, num_steps)


def save_checkpoint(folder: Path, step: int, state: Any) -> None:
    """Saves a training state as checkpoint number `step`, and drops all but the last few.

    The arrays are written first; the JSON beside them, with their checksum, makes them count.
    """
    content = safetensors.numpy.save(_arrays(state))
    write_bytes(folder / f"{step:08d}.safetensors", content)
    write_json(folder / f"{step:08d}.json", _about(step, content))
    for old in checkpoints(folder)[:-KEEP]:
        (folder / f"{old:08d}.json").unlink(missing_ok=True)
        (folder / f"{old:08d}.safetensors").unlink(missing_ok=True)


def _about(step: int, content: bytes) -> dict[str, Any]:
    return {"step": step, "sha256": hashlib.sha256(content).hexdigest()}


def checkpoints(folder: Path) -> list[int]:
    """Returns the numbers of the checkpoints in a folder, in order."""
    stems = [path.stem for path in folder.glob("*.json")]
    return sorted(int(stem) for stem in stems if re.fullmatch("[0-9]{8,}", stem))


def load_checkpoint(folder: Path, step: int, like: Any) -> Any:
    """Loads checkpoint number `step` into the structure of `like`, a state or its shapes.

    Raises:
        ValueError: if it is damaged or does not fit.
    """
    path = folder / f"{step:08d}.safetensors"
    content = path.read_bytes() if path.exists() else b""
    try:
        whole = read_json(path.with_suffix(".json")) == _about(step, content)
    except ValueError:
        whole = False
    if not whole:
        others = [number for number in checkpoints(folder) if number < step]
        remedy = f"to resume from step {others[-1]}" if others else "to start again"
        raise ValueError(
            f"The checkpoint {path} is damaged: {path.with_suffix('.json').name} does not give "
            f"its checksum; delete both files {remedy}."
        )
    return _fill(like, _from_bytes(content, path)[0], path, exact=True)


def _named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Returns the leaves of a tree with their names, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "value", leaf) for path, leaf in leaves], structure


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by name."""
    return {
        # safetensors 0.8.0 scrambles arrays that are not contiguous, without a word.
        name: np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")
        for name, leaf in _named_leaves(tree)[0]
    }


def _checksum(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of a description, and of names, dtypes, shapes and numbers of arrays."""
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def _from_bytes(content: bytes, path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays and the metadata of a safetensors file."""
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    # Of a dtype that NumPy lacks, a KeyError.
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({one_line(error)}); restore it from a copy."
        ) from error
    return arrays, header.get("__metadata__", {})


def _fill(like: Any, arrays: dict[str, np.ndarray], path: Path, *, exact: bool) -> Any:
    """Puts arrays into the structure of `like`, by name; unless exact, in floats of any size."""
    named, structure = _named_leaves(like)
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
        wanted = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        floats = all(jnp.issubdtype(one.dtype, jnp.floating) for one in (array, wanted))
        fits = array.dtype == wanted.dtype or (floats and not exact)
        if array.shape != wanted.shape or not fits:
            raise ValueError(
                f"{path} does not fit: {name} is {array.dtype}{list(array.shape)}, expected "
                f"{wanted.dtype}{list(wanted.shape)}; was it written with another configuration?"
            )
        with np.errstate(over="ignore"):  # `load` refuses what is infinite then
            put = jnp.asarray(array, wanted.dtype)
        leaves.append(jax.random.wrap_key_data(put) if _is_key(leaf) else put)
    return jax.tree.unflatten(structure, leaves)
