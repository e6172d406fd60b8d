"""The official file formats of image data sets: IDX (MNIST) and the binary CIFAR-10 and 100.

Everything is checked by format and nothing by length, so that files may be excerpts. Compressed
files are read to their end, where their checksum is.
"""

import gzip
import io
import math
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int, UInt8

from lopt.experiment.runs.files import one_line

# The files of each, of which the last is that of tests.
CIFAR_FILES = {
    "cifar10": (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    "cifar100": ("train.bin", "test.bin"),
}
NUM_CLASSES = {"cifar100": 100}

# The most bytes that are unpacked of a file; the largest official one has 184 million.
LIMIT = 2**28

_PIXELS = 3 * 32 * 32  # of red, of green and of blue, after one label or, of CIFAR-100, two

_Labelled = tuple[UInt8[np.ndarray, "_ _ _ _"], Int[np.ndarray, " _"]]


def read_pair(images_path: Path, labels_path: Path) -> _Labelled:
    """Reads IDX files of images and of their labels, and checks that they belong together."""
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28) or not len(images):
        found = " x ".join(map(str, images.shape))
        raise _wrong(images_path, f"images of {found} pixels", "images of 28 x 28 pixels")
    if len(images) != len(labels):
        raise _wrong(labels_path, f"{len(labels)} labels", f"one for each of {len(images)} images")
    return images[..., None], _checked(labels_path, labels)


def _checked(
    path: Path, labels: UInt8[np.ndarray, " _"], num_classes: int = 10
) -> Int[np.ndarray, " _"]:
    if labels.max() >= num_classes:
        raise _wrong(path, f"a label {labels.max()}", f"labels from 0 to {num_classes - 1}")
    return labels.astype(np.int32)


def _read_idx(path: Path, rank: int) -> UInt8[np.ndarray, "..."]:
    """Reads an IDX file: two zeros, a type code, the rank, big-endian lengths, then bytes."""
    start = 4 + 4 * rank
    header = _gunzip(path, start)
    if len(header) < start or header[:4] != bytes([0, 0, 8, rank]):
        expected = f"[0, 0, 8, {rank}], which stands for bytes of rank {rank}"
        raise _wrong(path, f"the magic number {list(header[:4])}", expected)
    shape = tuple(np.frombuffer(header, ">i4", rank, offset=4).tolist())
    size = math.prod(shape)
    # A negative length would cancel another one in the product.
    if min(shape) < 0 or size > LIMIT:
        raise _wrong(path, f"the shape {shape}", f"one of at most {LIMIT} bytes")
    content = _gunzip(path, start + size + 1)
    if len(content) != start + size:
        more = "more than " * (len(content) > start + size)
        found = f"{more}{min(len(content) - start, size)} bytes of data"
        raise _wrong(path, found, f"{size}, of shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _gunzip(path: Path, size: int) -> bytes:
    """Returns the first bytes of a gzip file; where they are all, its checksum is compared."""
    try:
        with gzip.open(path) as file:
            return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise _wrong(path, f"no readable gzip file ({one_line(error)})", "a gzip file") from error


def read_cifar(name: str, paths: list[Path]) -> tuple[_Labelled, _Labelled]:
    """Reads CIFAR-10 or 100, to train and to test, from its archive or from its `CIFAR_FILES`."""
    files = CIFAR_FILES[name]
    contents = {path: _read(path) for path in paths} if paths[1:] else _unpack(paths[0], files)
    *parts, test = (_cifar_images(name, path, content) for path, content in contents.items())
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (images, labels), test


def _read(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(file.read(LIMIT + 1))


def _unpack(path: Path, files: tuple[str, ...]) -> dict[Path, memoryview]:
    """Returns the contents of files in an archive, by their paths within it."""
    unpacked = _gunzip(path, LIMIT + 1)
    contents: dict[str, memoryview] = {}
    try:
        if len(unpacked) > LIMIT:
            raise tarfile.ReadError(f"it unpacks to more than {LIMIT} bytes")
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            for member in archive:
                name, begin = PurePosixPath(member.name).name, member.offset_data
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse
                # Before the next is looked for: a negative size would lead back to this one.
                if member.size < 0 or name in contents or not (plain or member.isdir()):
                    raise tarfile.ReadError(f"{name!r} is there twice, or is a link or device")
                if plain:
                    contents[name] = memoryview(unpacked)[begin : begin + member.size]
    except Exception as error:  # damaged headers may be anything to tarfile, also a recursion
        found = f"no readable tar.gz file ({one_line(error)})"
        raise _wrong(path, found, "a tar.gz file") from error
    missing = [name for name in files if name not in contents]
    if missing:
        raise _wrong(path, f"no {', '.join(missing)}", f"{len(files)} files of images")
    return {path / name: contents[name] for name in files}


def _cifar_images(name: str, path: Path, content: memoryview) -> _Labelled:
    """Returns images, whose channels are put last, and labels, the fine ones of CIFAR-100."""
    classes = NUM_CLASSES.get(name, 10)
    labels = 1 if classes == 10 else 2
    row = labels + _PIXELS
    if len(content) % row or not 0 < len(content) <= LIMIT:
        expected = f"a multiple of {row}, the length of a row, up to {LIMIT}"
        raise _wrong(path, f"{len(content)} bytes", expected)
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, _checked(path, rows[:, labels - 1], classes)


def _wrong(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} has {found}, expected {expected}; replace it by the official file {path.name}."
    )
