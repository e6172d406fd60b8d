"""Files that are whole or not there: every write goes to a temporary file that is then renamed."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where files are not locked
    fcntl = None  # type: ignore[assignment]


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: after a crash it has its old content, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not from `tempfile`, whose files nobody but their owner may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_files(folder: Path) -> list[Path]:
    """Returns what `write_bytes` was writing to a folder when it was killed, and nothing else."""
    known = r"\.[^.].*\.(json|jsonl|safetensors|png|html|npz)\.[0-9]+"
    return [path for path in folder.glob(".*") if re.fullmatch(known, path.name) and path.is_file()]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder, whose run.json nobody writes again, against other writers.

    Raises:
        FileExistsError: if another process holds it.
    """
    if fcntl is None:
        yield
        return
    with (folder / "run.json").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{folder} is being trained by another process; wait for it, or stop it."
            ) from None
        yield


def check_writable(path: Path) -> None:
    """Refuses a file whose folder neither is there, writable, nor can be made.

    Raises:
        NotADirectoryError: if something that is no folder is in the way.
        PermissionError: if files must not be made there.
    """
    folder = next(one for one in path.absolute().parents if one.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is not yours to write to.")


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically. Numbers that are not finite become null, as JSON has none."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False, default=str)
    write_bytes(path, (text + "\n").encode())


def write_new_json(path: Path, content: Any) -> None:
    """Writes JSON to a file that must not be there yet: of two writers, one succeeds.

    Raises:
        FileExistsError: if it is there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(temporary, content)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON; names the file.
    """
    try:
        return json.loads(path.read_text())
    # Of JSON's ValueErrors, not all are JSONDecodeErrors: not that of too many digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads numbered JSON lines up to the first torn one, as a killed writer may leave it."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(content, dict) or content.get("step") != len(lines):
            break
        lines.append(content)
    return lines


def to_line(content: dict[str, Any]) -> str:
    """Returns one JSON line."""
    return json.dumps(_finite(content), allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if content - content == 0 else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content
