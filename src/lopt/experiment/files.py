"""Files that are whole or not there: every write goes to a temporary file that is then renamed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


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
