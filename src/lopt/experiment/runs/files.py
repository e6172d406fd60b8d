"""Files that are whole or not there, and JSON of which nothing hostile comes back.

Every write goes to a temporary file that is then renamed. What is read has finite numbers only,
integers of 64 bits, and text that can be printed.
"""

import array
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

try:
    import fcntl
except ImportError:  # not on Windows, where files are not locked
    fcntl = None  # type: ignore[assignment]

# Far more bytes than a line of a log has, so that a damaged one does not fill the memory.
LONGEST_LINE = 2**22


def write_bytes(path: Path, content: bytes, *, new: bool = False) -> None:
    """Writes a file atomically: after a crash it has its old content, or the new one.

    If it is to be `new` and is there, a FileExistsError: of two writers, one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not from `tempfile`, whose files nobody but their owner may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        (os.link if new else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def free_folder(base: Path, taken: Callable[[Path], bool]) -> Path:
    """Returns a folder, or the first of BASE-2, BASE-3, ... that is not taken."""
    numbered = (base.with_name(f"{base.name}-{n}") for n in itertools.count(2))
    return next(one for one in itertools.chain([base], numbered) if not taken(one))


def tidy(folder: Path) -> None:
    """Removes what `write_bytes` was writing to a folder when it was killed, and nothing else."""
    known = r"\.[^.].*\.(json|jsonl|safetensors|png|html|npz)\.[0-9]+"
    for path in folder.glob(".*"):
        if re.fullmatch(known, path.name) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder against other writers; a FileExistsError if another process holds it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise FileExistsError(
            f"{folder} is being trained by another process; wait for it, or stop it."
        ) from None
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Refuses a file whose folder neither is there, writable, nor can be made: an OSError."""
    folder = next(one for one in path.absolute().parents if one.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is not yours to write to.")


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error: BaseException) -> str:
    """Returns what an error says, on one line of a bearable length; its kind if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def write_json(path: Path, content: Any, *, new: bool = False, sealed: bool = False) -> None:
    """Writes JSON as `write_bytes` does; NaN becomes null, and an infinite number "Infinity".

    If it is to be sealed, a checksum is added to it, a dictionary.
    """
    if sealed:
        content = content | {"sha256": _seal(content)}
    text = json.dumps(_finite(content, "Infinity"), indent=2, allow_nan=False, default=str)
    write_bytes(path, (text + "\n").encode(), new=new)


def _seal(content: Any) -> str:
    text = json.dumps(_finite(content, "Infinity"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path, *, sealed: bool = False) -> Any:
    """Reads JSON that `write_json` wrote; a ValueError names a file that is not as it was written.

    Numbers must be finite, integers have 64 bits; a sealed file must have the right checksum.
    """
    try:
        content = _parsed(path.read_bytes())
        if sealed and (type(content) is not dict or content.pop("sha256", "") != _seal(content)):
            raise ValueError("its checksum is another: it is damaged, or of another lopt")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({one_line(error)}); restore it from a copy."
        ) from error
    return content


def _parsed(text: bytes) -> Any:
    def integer(digits: str) -> int:
        # The length first: Python refuses, or takes long for, thousands of digits.
        if len(digits) > 20 or abs(int(digits)) >= 2**63:
            raise ValueError(f"the integer {digits[:20]}... needs more than 64 bits")
        return int(digits)

    content = json.loads(text.decode(), parse_int=integer)
    # Refuses NaN, 1e999, which is read as infinity, and half a surrogate, which cannot be printed.
    json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
    return content


def scan_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields the lines of a log one by one, each with how long the log is up to its end.

    It ends before the first line that is not whole: torn, as a killed writer may leave it, wrongly
    numbered, or of anything but finite numbers, None and lists of them. There may be no log yet.
    """
    step = end = 0
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        while _is_whole(line := file.readline(LONGEST_LINE), step):
            step, end = step + 1, end + len(line)
            yield line, end


def number_in(line: bytes, name: str) -> float:
    """Returns a number of a line of a log; NaN if it is None there, or not there."""
    found = re.search(rb'"%s"\s*:\s*([-+.eE\d]+)' % name.encode(), line)
    return float(found[1]) if found else math.nan


def read_columns(path: Path, names: Sequence[str]) -> Float[np.ndarray, "name line"]:
    """Reads some numbers of each whole line of a log, in little memory; NaN where there is none."""
    numbers = array.array("d")
    for line, _ in scan_lines(path):
        numbers.extend([number_in(line, name) for name in names])
    return np.array(numbers).reshape(-1, len(names)).T


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a log, as far as they are whole; see `scan_lines`."""
    return [json.loads(line) for line, _ in scan_lines(path)]


def to_line(content: dict[str, Any]) -> str:
    """Returns one JSON line."""
    return json.dumps(_finite(content), allow_nan=False) + "\n"


def _finite(content: Any, infinite: str | None = None) -> Any:
    """Returns content with None for NaN, and a text, signed, or None for infinite numbers."""
    if isinstance(content, float) and not math.isfinite(content):
        return infinite and "-" * (content < 0) + infinite if content == content else None
    if isinstance(content, dict):
        return {key: _finite(value, infinite) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value, infinite) for value in content]
    return content


# A line of numbers only, and the usual sizes: seen thrice as fast as JSON is read.
_PLAIN = re.compile(
    rb'\{"step": (\d+)(?:, "\w++": -?(?:0|[1-9]\d{0,17}+)(?:\.\d++)?+(?:e[-+]\d\d)?+)*+\}\n'
)


def _is_whole(line: bytes, step: int) -> bool:
    if plain := _PLAIN.fullmatch(line):
        return plain[1] == b"%d" % step
    try:
        content = _parsed(line)
        numeric = all(map(_is_numeric, content.values()))
    except (ValueError, RecursionError, AttributeError):
        return False
    return numeric and line.endswith(b"\n") and content.get("step") == step


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return value is None or type(value) in (int, float)
