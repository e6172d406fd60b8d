"""Tables on disk: npz, and the older npy. Nothing is unpickled or evaluated.

In npz a feature is `feature.NAME`, with `[t-2]` behind it for one two steps ago; the
output is `output` and the ids are `task`, `run`, `tensor`, `coordinate` and `step`. JSON beside
them, `lopt`, lists the columns in order.
"""

import io
import json
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lopt.experiment.runs.files import write_bytes
from lopt.symbolic.expression import Variable
from lopt.symbolic.table import IDS, Table

FORMAT, VERSION = "lopt table", 1
SUFFIXES = (".npz", ".npy")

# What parsers raise for damaged bytes: of RuntimeErrors an unknown or encrypted method of zip's,
# of MemoryErrors a shape that no memory holds.
DAMAGE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, OverflowError),
    *(OSError, EOFError, RuntimeError, MemoryError, tokenize.TokenError, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Arrays = Mapping[str, np.ndarray]


def save_table(path: str | Path, table: Table) -> None:
    """Saves a table as its file's name says: .npz or .npy, whole or not at all.

    An .npy holds features and then the output of each row, in order of their lags, and neither
    names nor ids.

    Raises:
        ValueError: if the name ends in something else, or `table.about` is not made of JSON.
    """
    path = Path(path)
    check_path(path)
    arrays = {_key(column): values for column, values in table.mapping().items()}
    arrays |= {"output": table.output} | {name: getattr(table, name) for name in IDS}
    written = _to_npz if path.suffix == ".npz" else _to_npy
    write_bytes(path, written(arrays, table))


def load_table(path: str | Path, names: Sequence[str] | None = None) -> Table:
    """Loads a table.

    Args:
        path: of a file of `save_table`, or of an .npy of shape [rows, M k + 1] with k features of M
            steps, the most recent step first, features of one step side by side, then the output.
        names: of the features of one step of an .npy, which does not have them.

    Returns:
        The table. An .npy does not say where its rows come from: each then counts as a coordinate
        of its own, as `about["ids"]` says, and rows held out of it may be neighbours of those that
        are not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of another version, or lacks a column, or a value is not
            finite; names the file.
    """
    path = Path(path)
    check_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}; record one with lopt record RUN.")
    if path.suffix == ".npy":
        return _naming(path, lambda: _from_npy(path, names))
    if names is not None:
        raise ValueError(f"load_table(names={list(names)}) is for .npy; {path} has names.")
    return _naming(path, lambda: _to_table(*_read_npz(path)))


def check_path(path: Path) -> None:
    """Refuses a name from which no format follows."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"A table's file ends in {', '.join(SUFFIXES)}, not as {path.name} does.")


def _naming(path: Path, load: Callable[[], Table]) -> Table:
    """Puts the file's name in front of what is wrong with its content."""
    try:
        return load()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _key(column: Variable) -> str:
    return f"feature.{column}"


def _metadata(table: Table) -> str:
    said = {
        "format": FORMAT,
        "version": VERSION,
        "rows": len(table),
        "columns": [[column.name, column.lag] for column in table.columns],
        "scale": table.scale.tolist(),
        "about": dict(table.about),
    }
    try:
        return json.dumps(said, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save_table(table): its `about` is not made of JSON: {error}.") from error


def _to_table(arrays: Arrays, metadata: str | None) -> Table:
    """Checks what a file holds, and makes a table of it."""
    if metadata is None:
        raise ValueError("it has no `lopt` beside its columns; was it written by save_table?")
    try:
        said = json.loads(metadata)
        named, version = said["format"], said["version"]
        columns = tuple(Variable(str(name), int(lag)) for name, lag in said["columns"])
        about, rows = dict(said["about"]), said["rows"]
        if not columns or min(column.lag for column in columns) < 0:
            raise ValueError(f"columns are {said['columns']}")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"its `lopt` is damaged ({error}); record it again.") from error
    if named != FORMAT or version != VERSION:
        raise ValueError(
            f"it is a {named!r} of version {version!r}, and this lopt reads {FORMAT!r} of version "
            f"{VERSION}; record it again, or use the version of lopt that wrote it."
        )
    for key in (*map(_key, columns), "output", *IDS):
        if key not in arrays:
            raise ValueError(f"it lacks the column {key}; record it again.")
        if arrays[key].shape != (rows,):
            raise ValueError(
                f"its column {key} has shape {arrays[key].shape}, not ({rows},); record it again."
            )
        wanted = np.integer if key in IDS else np.floating
        if not np.issubdtype(arrays[key].dtype, wanted):
            raise ValueError(
                f"its column {key} holds {arrays[key].dtype}, not numbers of the kind "
                f"{wanted.__name__}."
            )
    values = [arrays[_key(column)] for column in columns]
    ids = {name: arrays[name] for name in IDS}
    return Table(columns, np.stack(values, axis=1), arrays["output"], **ids, about=about)


def _to_npz(arrays: Arrays, table: Table) -> bytes:
    buffer = io.BytesIO()
    content: dict[str, Any] = {**arrays, "lopt": np.array(_metadata(table))}
    np.savez_compressed(buffer, allow_pickle=False, **content)
    return buffer.getvalue()


def _read_npz(path: Path) -> tuple[Arrays, str | None]:
    try:
        # From memory: NumPy leaves a damaged file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except DAMAGE as error:
        raise ValueError(f"it is not a whole npz of plain arrays ({_line(error)}).") from error
    metadata = arrays.pop("lopt", None)
    return arrays, None if metadata is None else str(metadata)


def _line(error: BaseException) -> str:
    """Returns what an error says, on one line; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _to_npy(arrays: Arrays, table: Table) -> bytes:
    columns = sorted(table.columns, key=lambda column: column.lag)
    buffer = io.BytesIO()
    rows = np.stack([*(arrays[_key(column)] for column in columns), table.output], axis=1)
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def _from_npy(path: Path, names: Sequence[str] | None) -> Table:
    rows = _read_npy(path)
    width = rows.shape[1] - 1
    if names is None:
        raise ValueError(
            f"an .npy has no names for its {width} features; give those of one step, as in "
            "load_table(path, names=('gradient',))."
        )
    if not names or width < 1 or width % len(names):
        raise ValueError(
            f"it has {rows.shape[1]} columns, which is not M steps of the {len(names)} features "
            f"{', '.join(names)} and an output; give the names of the features of one step, as in "
            "load_table(path, names=('mt', 'gt'))."
        )
    columns = tuple(Variable(name, lag) for lag in range(width // len(names)) for name in names)
    zeros, numbers = np.zeros(len(rows), int), np.arange(len(rows))
    return Table(
        columns,
        rows[:, :-1],
        rows[:, -1],
        task=zeros,
        run=zeros,
        tensor=zeros,
        coordinate=numbers,
        step=zeros,
        about={"ids": "unknown: each row counts as a coordinate of its own", "source": path.name},
    )


def _read_npy(path: Path) -> Float[np.ndarray, "row column"]:
    try:
        rows = np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"it is not a whole npy of plain numbers ({_line(error)}).") from error
    if not (isinstance(rows, np.ndarray) and rows.ndim == 2):
        raise ValueError("it is not one array [rows, columns].")
    if not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(f"it holds {rows.dtype}, not floating-point numbers.")
    return rows
