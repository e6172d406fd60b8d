"""Weights and states on disk: safetensors for arrays, JSON for structure. Nothing is unpickled."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.runs.description import describe, restore
from lopt.experiment.runs.files import digest, one_line, read_json, write_bytes

KEEP = 3
# The weights that come with lopt.
PRETRAINED = Path(__file__).parents[2] / "weights"


def save(path: str | Path, learned: AbstractLearnedOptimizer, theta: Theta) -> None:
    """Saves a learned optimizer, configuration, weights and their checksum, in a safetensors file.

    Raises:
        TypeError: if a part of `learned` is neither lopt's nor registered with `lopt.register`.
        ValueError: if `theta` is not of its shape.
    """
    described = describe(learned)
    _fill(eqx.filter_eval_shape(learned.init, jax.random.key(0)), _arrays(theta), "save(theta)")
    _write(Path(path), described, theta)


def save_weights(path: Path, learned: AbstractLearnedOptimizer, theta: Theta) -> None:
    """Saves weights also of an optimizer with parts from elsewhere, without its configuration."""
    try:
        save(path, learned, theta)
    except TypeError:
        _write(path, {}, theta)


@jax.ensure_compile_time_eval()  # also where a program is traced
def load(
    path: str | Path, learned: AbstractLearnedOptimizer | None = None
) -> tuple[AbstractLearnedOptimizer, Theta]:
    """Loads what `save` saved.

    Args:
        path: of the file, or of a run's folder, which holds its latest weights; or a name of
            `lopt.pretrained_names`.
        learned: the learned optimizer, for weights of one with parts that are not registered;
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
            f"There is no file {path}, and no optimizer of that name comes with lopt; give a file "
            "of lopt.save, the folder of a run, or a name that lopt pretrained lists."
        )
    arrays, described = _read(path)
    if learned is None and not described:
        raise ValueError(
            f"{path} describes no optimizer (lopt.save did not write it, or its optimizer has "
            "parts that are not registered); give it, as in load(path, learned)."
        )
    try:
        learned = restore(described) if learned is None else learned
        if not isinstance(learned, AbstractLearnedOptimizer):
            raise TypeError(f"{learned} is not a learned optimizer")
        like = eqx.filter_eval_shape(learned.init, jax.random.key(0))
    except Exception as error:  # what a file describes may fail anyhow
        raise ValueError(
            f"{path} describes an optimizer that does not fit this version of lopt "
            f"({one_line(error)}); give it, as in load(path, learned)."
        ) from error
    theta = _fill(like, arrays, path)
    if broken := [name for name, array in _arrays(theta).items() if not np.isfinite(array).all()]:
        raise ValueError(
            f"{path} has weights that are not finite, in {', '.join(broken[:3])}; its "
            "meta-training diverged: use an earlier checkpoint, or train again."
        )
    return learned, theta


def weights_file(path: Path) -> Path:
    """Returns the file of weights that a path names: itself, a run's, or one that lopt ships."""
    if not path.exists() and str(path) in pretrained_names():
        return pretrained_file(str(path))
    return path / "weights.safetensors" if path.is_dir() else path


def pretrained_names() -> tuple[str, ...]:
    """Returns the names of the optimizers that come with lopt, see `lopt.pretrained`."""
    return tuple(sorted(path.stem for path in PRETRAINED.glob("*.json")))


def pretrained_file(name: str) -> Path:
    """Returns the file of an optimizer that comes with lopt, whose card is JSON beside it.

    Raises:
        ValueError: if there is none of that name, or its weights are others than the card says.
    """
    path, names = PRETRAINED / f"{name}.safetensors", pretrained_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.0)
        remedy = f"try {near[0]!r}" if near else "this lopt comes without any"
        raise ValueError(f"There is no pretrained optimizer {name!r}; {remedy}.")
    if digest(path) != read_json(path.with_suffix(".json")).get("sha256"):
        raise ValueError(
            f"{path} has another SHA-256 than its card says; install lopt again, as by "
            "pip install --force-reinstall --no-deps lopt."
        )
    return path


def load_optimizer(
    path: str | Path,
    learned: AbstractLearnedOptimizer | None = None,
    num_steps: int | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Loads saved weights, as `load` does, as an Optax optimizer, to be used wherever Optax is.

    Designs that use the length of a run are told it by `num_steps`. Options are those of
    `learned.optimizer`: learning_rate, weight_decay and mask.
    """
    learned, theta = load(path, learned)
    return learned.optimizer(theta, num_steps, **options)


def save_checkpoint(
    folder: Path, step: int, state: Any, gather: Callable[[str], list[str]] = lambda own: [own]
) -> None:
    """Saves a training state as checkpoint number `step`, and drops all but the last few.

    Of processes that share the state, each writes the rows that it has; the file of the first,
    written last, names those of the others. `gather` returns what each of them says.
    """
    described, number = {"step": step}, jax.process_index()
    own = ""
    if number:
        rows = jax.tree.map(lambda leaf: leaf if _in_parts(leaf) else None, state)
        own = _write(_checkpoint(folder, step, number), described, rows)
    every = gather(own)
    if number == 0:
        parts_of = {"parts": every[1:]} if every[1:] else {}
        _write(_checkpoint(folder, step), described | parts_of, state)
        for old in checkpoints(folder)[:-KEEP]:
            for path in folder.glob(f"{old:08d}*.safetensors"):
                path.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[int]:
    """Returns the numbers of the checkpoints in a folder, in order."""
    stems = [path.stem for path in folder.glob("*.safetensors")]
    return sorted(int(stem) for stem in stems if re.fullmatch("[0-9]{8,}", stem))


def load_checkpoint(folder: Path, step: int, like: Any) -> Any:
    """Loads checkpoint number `step` into the structure of `like`, a state or its shapes."""
    path = _checkpoint(folder, step)
    try:
        arrays, described = _read(path)
        parts = described.pop("parts", [])
        if described != {"step": step}:
            raise ValueError("it is that of another step")
        rows = [_read(_checkpoint(folder, step, i + 1), sum_) for i, sum_ in enumerate(parts)]
        for name in rows[0][0] if rows else ():
            arrays[name] = np.concatenate([arrays[name], *(part[name] for part, _ in rows)])
    except (ValueError, FileNotFoundError, KeyError) as error:
        others = [number for number in checkpoints(folder) if number < step]
        remedy = f"to resume from step {others[-1]}" if others else "to start again"
        raise ValueError(
            f"The checkpoint {path} is damaged ({one_line(error)}); delete it {remedy}."
        ) from error
    return _fill(like, arrays, path, exact=True)


def _checkpoint(folder: Path, step: int, process: int = 0) -> Path:
    return folder / f"{step:08d}{f'-{process}' * bool(process)}.safetensors"


def _write(path: Path, described: dict[str, Any], tree: Any) -> str:
    """Writes the arrays of a tree, and returns their checksum."""
    arrays = _arrays(tree)
    checksum = _checksum(described, arrays)
    described = described | {"checksum": checksum}
    # One key, as safetensors writes several in any order, and equal weights are equal files.
    write_bytes(path, safetensors.numpy.save(arrays, {"lopt": json.dumps(described)}))
    return checksum


def _read(path: Path, wanted: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a file, perhaps with a known checksum, and what it says of them."""
    content = path.read_bytes()
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        described = json.loads(header.get("__metadata__", {}).get("lopt", "{}"))
        checksum, expected = described.pop("checksum", None), _checksum(described, arrays)
    except Exception as error:  # such as a KeyError, of a dtype that NumPy lacks
        raise ValueError(
            f"{path} is not a whole safetensors file ({one_line(error)}); restore it from a copy."
        ) from error
    if checksum not in (None, expected) or wanted not in (None, expected):  # old files have none
        raise ValueError(f"{path} is damaged: its checksum is another; restore it from a copy.")
    return arrays, described


def _checksum(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of a description, and of names, dtypes, shapes and numbers of arrays."""
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "value"


def is_key(leaf: Any) -> bool:
    """Whether an array is one of keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    return {
        # safetensors 0.8.0 scrambles arrays that are not contiguous, without a word.
        _name(path): np.asarray(
            _rows(jax.random.key_data(leaf) if is_key(leaf) else leaf), order="C"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _in_parts(leaf: Any) -> bool:
    """Whether an array's rows are with several processes."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def _rows(leaf: Any) -> Any:
    """Returns an array, or those of its rows that are with this process."""
    if not _in_parts(leaf):
        return leaf
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _fill(
    like: Any, arrays: dict[str, np.ndarray], source: str | Path, *, exact: bool = False
) -> Any:
    """Puts arrays into the structure of `like`, by name; unless exact, in floats of any size."""

    def misfit(what: str) -> ValueError:
        return ValueError(
            f"{source} does not fit: {what}; was it written with another configuration?"
        )

    def fill(path: Any, leaf: Any) -> Any:
        array = arrays[_name(path)]
        wanted = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        floats = all(jnp.issubdtype(one.dtype, jnp.floating) for one in (array, wanted))
        fits = array.dtype == wanted.dtype or (floats and not exact)
        if array.shape != wanted.shape or not fits:
            found, expected = (f"{one.dtype}{list(one.shape)}" for one in (array, wanted))
            raise misfit(f"{_name(path)} is {found}, expected {expected}")
        with np.errstate(over="ignore"):  # `load` refuses what is infinite then
            put = jnp.asarray(array, wanted.dtype)
        return jax.random.wrap_key_data(put) if is_key(leaf) else put

    names = {_name(path) for path, _ in jax.tree.leaves_with_path(like)}
    missing, unknown = sorted(names - arrays.keys())[:3], sorted(arrays.keys() - names)[:3]
    if missing or unknown:
        raise misfit(f"it lacks {missing} and has the unknown {unknown}")
    return jax.tree.map_with_path(fill, like)
