"""Tables on disk: npz, and the older npy. Nothing is unpickled or evaluated.

In npz a feature is `feature.NAME`, with `[t-2]` behind it for one two steps ago; the
output is `output` and the ids are `task`, `run`, `tensor`, `coordinate` and `step`. JSON beside
them, `lopt`, lists the columns in order.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopt.experiment.runs.files import one_line, write_bytes
from lopt.symbolic.expression import Variable
from lopt.symbolic.table import IDS, Table

FORMAT, VERSION = "lopt table", 1
SUFFIXES = (".npz", ".npy")


def save_table(path: str | Path, table: Table) -> None:
    """Saves a table as its file's name says: .npz or .npy, whole or not at all.

    An .npy holds features and then the output of each row, in order of their lags, and neither
    names nor ids.
    """
    path, buffer = Path(path), io.BytesIO()
    check_path(path)
    if path.suffix == ".npy":
        by_lag = sorted(table.columns, key=lambda column: column.lag)
        rows = np.stack([*map(table.column, by_lag), table.output], axis=1)
        np.save(buffer, rows, allow_pickle=False)
    else:
        arrays = {f"feature.{column}": values for column, values in table.mapping().items()}
        arrays |= {"output": table.output} | {name: getattr(table, name) for name in IDS}
        columns = [[column.name, column.lag] for column in table.columns]
        content = {"format": FORMAT, "version": VERSION, "rows": len(table), "columns": columns}
        content |= {"scale": table.scale.tolist(), "about": dict(table.about)}
        try:
            arrays["lopt"] = np.array(json.dumps(content, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"save_table(table): its `about` is not made of JSON: {error}."
            ) from error
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def load_table(path: str | Path, names: Sequence[str] | None = None) -> Table:
    """Loads a table; a ValueError names what is damaged, of another version, or not finite.

    A file is of `save_table`, or an .npy of shape [rows, M k + 1] with k features of M steps, the
    most recent step first, features of one step side by side, then the output; `names` are of those
    k. An .npy does not say where its rows come from: each then counts as a coordinate of its own,
    as `about["ids"]` says: give `lopt.symbolic.distill` a split of your own.
    """
    path = Path(path)
    check_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}; record one with lopt record RUN.")
    try:
        return _from_npz(path, names) if path.suffix == ".npz" else _from_npy(path, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_path(path: Path) -> None:
    """Refuses a name from which no format follows."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"A table's file ends in {', '.join(SUFFIXES)}, not as {path.name} does.")


def _read(path: Path) -> Any:
    """Returns the array of an npy, or arrays by name."""
    try:
        # From memory: NumPy leaves a damaged file open.
        content = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        return content if path.suffix == ".npy" else {name: content[name] for name in content.files}
    except Exception as error:  # of seventeen kinds, as parsers of zip, NumPy and Python raise them
        said = f"it is not a whole {path.suffix[1:]} of plain arrays ({one_line(error)})."
        raise ValueError(said) from error


def _from_npz(path: Path, names: Sequence[str] | None) -> Table:
    if names is not None:
        raise ValueError(f"names={list(names)} are for .npy; this file has names.")
    arrays = _read(path)
    if "lopt" not in arrays:
        raise ValueError("it has no `lopt` beside its columns; was it written by save_table?")
    try:
        content = json.loads(str(arrays["lopt"]))
        kind = content["format"], content["version"]
        columns = tuple(Variable(str(name), int(lag)) for name, lag in content["columns"])
        about, rows = dict(content["about"]), content["rows"]
        if not columns or min(column.lag for column in columns) < 0:
            raise ValueError(f"columns are {content['columns']}")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"its `lopt` is damaged ({error}); record it again.") from error
    if kind != (FORMAT, VERSION):
        raise ValueError(
            f"it is a {kind[0]!r} of version {kind[1]!r}, and this lopt reads {FORMAT!r} of "
            f"version {VERSION}; record it again, or use the version of lopt that wrote it."
        )
    features = [f"feature.{column}" for column in columns]
    for key in (*features, "output", *IDS):
        if key not in arrays:
            raise ValueError(f"it lacks the column {key}; record it again.")
        found, wanted = arrays[key], np.integer if key in IDS else np.floating
        if found.shape != (rows,) or not np.issubdtype(found.dtype, wanted):
            raise ValueError(
                f"its column {key} holds {found.dtype} of shape {found.shape}, not "
                f"{wanted.__name__} numbers of shape ({rows},); record it again."
            )
    values = np.stack([arrays[key] for key in features], axis=1)
    ids = {name: arrays[name] for name in IDS}
    return Table(columns, values, arrays["output"], **ids, about=about)


def _from_npy(path: Path, names: Sequence[str] | None) -> Table:
    rows = _read(path)
    if not (isinstance(rows, np.ndarray) and rows.ndim == 2):
        raise ValueError("it is not one array [rows, columns].")
    if not np.issubdtype(rows.dtype, np.floating):
        raise ValueError(f"it holds {rows.dtype}, not floating-point numbers.")
    width, zeros = rows.shape[1] - 1, np.zeros(len(rows), int)
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
    about = {"ids": "unknown: each row counts as a coordinate of its own", "source": path.name}
    ids = (zeros, zeros, zeros, np.arange(len(rows)), zeros)
    return Table(columns, rows[:, :-1], rows[:, -1], *ids, about=about)
