"""The official file formats of image data sets: IDX (MNIST) and the binary CIFAR-10.

Everything is checked by format and nothing by length, so that files may be excerpts.
"""

import gzip
import math
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int, UInt8

CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

_ROW = 1 + 3 * 32 * 32  # a label, then 32 x 32 pixels of red, green and blue


def read_pair(
    images_path: Path, labels_path: Path
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int[np.ndarray, " n"]]:
    """Reads IDX files of images and of their labels, and checks that they belong together.

    Raises:
        ValueError: if a file is not what it should be.
    """
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        found = " x ".join(str(length) for length in images.shape[1:])
        raise _wrong(images_path, f"images of {found} pixels", "28 x 28 pixels")
    if len(images) != len(labels):
        raise _wrong(labels_path, f"{len(labels)} labels", f"one for each of {len(images)} images")
    if labels.size and labels.max() > 9:
        raise _wrong(labels_path, f"a label {labels.max()}", "labels from 0 to 9")
    return images[..., None], labels.astype(np.int32)


def _read_idx(path: Path, rank: int) -> UInt8[np.ndarray, "..."]:
    """Reads an IDX file: two zeros, a type code, the rank, big-endian lengths, then bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise _wrong(path, f"no readable gzip file ({error})", "a gzip file") from error
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, 8, rank]):
        raise _wrong(
            path,
            f"the magic number {list(content[:4])}",
            f"[0, 0, 8, {rank}], which stands for bytes of rank {rank}",
        )
    shape = tuple(np.frombuffer(content, ">i4", rank, offset=4).tolist())
    # A negative length would cancel another one in the product.
    if min(shape) < 0 or len(content) - header != math.prod(shape):
        raise _wrong(
            path, f"{len(content) - header} bytes of data", f"{math.prod(shape)}, of shape {shape}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(
    paths: list[Path],
) -> tuple[
    UInt8[np.ndarray, "n 32 32 3"],
    Int[np.ndarray, " n"],
    UInt8[np.ndarray, "m 32 32 3"],
    Int[np.ndarray, " m"],
]:
    """Reads CIFAR-10 from its archive, or from the six files that it holds.

    Args:
        paths: the archive alone, or the files in the order of `CIFAR_FILES`.

    Returns:
        Images and labels of the training set, then of the test set.

    Raises:
        ValueError: if a file is not what it should be.
    """
    contents = {path: path.read_bytes() for path in paths} if len(paths) > 1 else _unpack(paths[0])
    rows = [_cifar_rows(path, content) for path, content in contents.items()]
    train, test = np.concatenate(rows[:-1]), rows[-1]
    return *_cifar_images(train), *_cifar_images(test)


def _unpack(path: Path) -> dict[Path, bytes]:
    """Returns the contents of the six files in an archive, by their paths within it."""
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)  # none, if it is a folder
                if file is not None:
                    contents[PurePosixPath(member.name).name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise _wrong(path, f"no readable tar.gz file ({error})", "a tar.gz file") from error
    missing = [name for name in CIFAR_FILES if name not in contents]
    if missing:
        raise _wrong(path, f"no {', '.join(missing)}", f"{len(CIFAR_FILES)} files of images")
    return {path / name: contents[name] for name in CIFAR_FILES}


def _cifar_rows(path: Path, content: bytes) -> UInt8[np.ndarray, "n 3073"]:
    """Returns the rows of a file, one for each image, its labels checked."""
    if len(content) % _ROW:
        raise _wrong(path, f"{len(content)} bytes", f"a multiple of {_ROW}, the length of a row")
    rows = np.frombuffer(content, np.uint8).reshape(-1, _ROW)
    if rows.size and rows[:, 0].max() > 9:
        raise _wrong(path, f"a label {rows[:, 0].max()}", "labels from 0 to 9")
    return rows


def _cifar_images(
    rows: UInt8[np.ndarray, "n 3073"],
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, " n"]]:
    """Parts rows into images, whose channels are put last, and labels."""
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, rows[:, 0].astype(np.int32)


def _wrong(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} has {found}, expected {expected}; replace it by the official file {path.name}."
    )
