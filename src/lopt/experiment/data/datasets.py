"""Image data sets from files: the host side of `lopt.tasks.data`.

`digits` comes with scikit-learn. MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are read from their
official files, IDX and binary, which are looked for in `$LOPT_DATA_DIR` and otherwise downloaded.
Everything is checked by format and nothing by length, so that one's own files may be excerpts;
downloads are checked by checksum. Compressed files are read to their end, where theirs is.
"""

import contextlib
import gzip
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.files import digest, one_line
from lopt.tasks.data import Data, image_data

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

# The files of each, of which the last is that of tests.
CIFAR_FILES = {
    "cifar10": (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    "cifar100": ("train.bin", "test.bin"),
}
# An archive, and the folder in it.
CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-binary.tar.gz", "cifar-100-binary"),
}

ADDRESSES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    **dict.fromkeys(CIFAR, "https://www.cs.toronto.edu/~kriz/"),
}

# SHA-256, in the order of FILES.
CHECKSUMS = {
    "mnist": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion_mnist": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    "cifar10": ("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",),
    "cifar100": ("58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",),
}

NUM_CLASSES = {"cifar100": 100}

# The most bytes that are unpacked of a file; the largest official one has 184 million.
LIMIT = 2**28

_PIXELS = 3 * 32 * 32  # of red, of green and of blue, after one label or, of CIFAR-100, two

_Labelled = tuple[UInt8[np.ndarray, "_ _ _ _"], Int[np.ndarray, " _"]]


def load_images(name: str, size: int = 8, folder: str | os.PathLike | None = None) -> Data:
    """Loads a data set in four splits.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10" or "cifar100", with its 100 fine labels.
        size: the height and width that images are given; 32 is that of CIFAR-10, 28 of MNIST.
        folder: where the official files are: four IDX files, or the binary version of CIFAR as an
            archive, unpacked in a folder `cifar-10-batches-bin`, or as its files. By default
            they are looked for in `$LOPT_DATA_DIR/<name>`, then downloaded into `$LOPT_CACHE_DIR`
            or the user's cache.

    Raises:
        ValueError: if the name is unknown, or a file is not what it should be.
        FileNotFoundError: if `folder`, or an incomplete `$LOPT_DATA_DIR/<name>`, lacks a file.
        ConnectionError: if a download fails.

    Example:
        >>> from lopt.experiment.data.datasets import load_images
        >>> load_images("digits").train.arrays.images.shape
        (1260, 8, 8, 1)
    """
    _check_name("load_images", name)
    paths = [] if name == "digits" else _local_paths(name, folder) or _download(name)
    checksum = sha256("".join(map(digest, paths)).encode()).hexdigest()
    note_loaded({"name": name, "size": size, "sha256": checksum})
    test: tuple[Any, Any] = None, None
    if name == "digits":
        # scikit-learn takes a second to import, and only digits need it.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    elif name in CIFAR:
        (images, labels), test = read_cifar(name, paths)
    else:
        (images, labels), test = map(read_pair, paths[::2], paths[1::2])
    return image_data(images, labels, *test, NUM_CLASSES.get(name, 10), size)


def available(name: str, folder: str | os.PathLike | None = None) -> bool:
    """Returns whether a data set can be loaded without a network."""
    _check_name("available", name)
    if name == "digits" or (folder is None and _local_paths(name, None)):
        return True
    return not _closest(name, cache_folder() / name if folder is None else Path(folder))[1]


def mnist_or_digits() -> str:
    """Returns "mnist" if it can be loaded without a network, else "digits"."""
    return "mnist" if available("mnist") else "digits"


@contextlib.contextmanager
def data_loaded() -> Iterator[list[dict[str, Any]]]:
    """Yields what is loaded meanwhile: name, how it was asked for, and the checksum of files."""
    token = _LOADED.set([])
    try:
        yield _LOADED.get()
    finally:
        _LOADED.reset(token)


def note_loaded(found: dict[str, Any]) -> None:
    """Adds a data set to those that `data_loaded` tells of."""
    if found not in _LOADED.get():
        _LOADED.get().append(found)


_LOADED: ContextVar[list[dict[str, Any]]] = ContextVar("loaded", default=[])  # noqa: B039


def _check_name(owner: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{owner}(name={name!r}) must be one of {', '.join(NAMES)}.")


def _closest(name: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the first whole set of files in a folder, else the closest, and what it lacks."""
    sets = [[folder / file for file in FILES]]
    if name in CIFAR:
        archive, inside = CIFAR[name]
        unpacked = [[at / file for file in CIFAR_FILES[name]] for at in (folder / inside, folder)]
        sets = [[folder / archive], *unpacked]
    found = [(paths, [path.name for path in paths if not path.is_file()]) for paths in sets]
    return max(found, key=lambda one: len(one[0]) - len(one[1]) if one[1] else math.inf)


def _local_paths(name: str, folder: str | os.PathLike | None) -> list[Path]:
    """Returns the paths of the user's own files, or nothing if there are none."""
    root = os.environ.get("LOPT_DATA_DIR")
    if folder is None and not root:
        return []
    if folder is None and not Path(str(root)).is_dir():
        raise FileNotFoundError(
            f"LOPT_DATA_DIR={root} is not a folder; point it at the folder that holds "
            f"{', '.join(NAMES[1:])}, or unset it."
        )
    paths, missing = _closest(name, Path(str(root), name) if folder is None else Path(folder))
    if missing and (folder is not None or len(missing) < len(paths)):
        raise FileNotFoundError(
            f"load_images({name!r}): {paths[0].parent} lacks {', '.join(missing)}; put the "
            f"official files from {ADDRESSES[name]} there."
        )
    return [] if missing else paths


def _download(name: str) -> list[Path]:
    """Returns the paths of downloaded files, from the cache if they are there already."""
    import pooch

    folder = cache_folder() / name
    files = CIFAR[name][:1] if name in CIFAR else FILES
    try:
        return [
            Path(pooch.retrieve(ADDRESSES[name] + file, f"sha256:{checksum}", file, folder))
            for file, checksum in zip(files, CHECKSUMS[name], strict=True)
        ]
    # Requests raises OSErrors, pooch ValueErrors on a wrong checksum.
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"load_images({name!r}) could not download from {ADDRESSES[name]} into {folder}: "
            f"{error} Without a network, put {', '.join(files)} in a folder {name!r} and point "
            "the environment variable LOPT_DATA_DIR at the folder above it."
        ) from error


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
