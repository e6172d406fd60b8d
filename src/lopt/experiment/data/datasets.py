"""Image data sets from files: the host side of `lopt.tasks.data`.

`digits` comes with scikit-learn. MNIST, Fashion-MNIST and CIFAR-10 are read from their official
files, which are looked for in `$LOPT_DATA_DIR` and otherwise downloaded. Files of one's own are
checked by format, so that they may be excerpts; downloads are checked by checksum.
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lopt.experiment.data.image_files import CIFAR_FILES, read_cifar, read_pair
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.files import digest
from lopt.tasks.data import Data, image_data

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"

ADDRESSES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}

CHECKSUMS = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "cifar10": ("c32a1d4ab5d03f1284b67883e8d87530",),
}


def load_images(name: str, size: int = 8, folder: str | os.PathLike | None = None) -> Data:
    """Loads a data set in four splits.

    Args:
        name: "digits", "mnist", "fashion_mnist" or "cifar10".
        size: the height and width that images are given; 32 is that of CIFAR-10, 28 of MNIST.
        folder: where the official files are: four IDX files, or the binary version of CIFAR-10 as
            an archive, unpacked in a folder `cifar-10-batches-bin`, or as six files. By default
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
    if name == "digits":
        _loaded(name, size, [])
        return _load_digits(size)
    paths = _local_paths(name, folder) or _download(name)
    _loaded(name, size, paths)
    if name == "cifar10":
        return image_data(*read_cifar(paths), 10, size)
    return image_data(*read_pair(paths[0], paths[1]), *read_pair(paths[2], paths[3]), 10, size)


def available(name: str, folder: str | os.PathLike | None = None) -> bool:
    """Returns whether a data set can be loaded without a network.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if `$LOPT_DATA_DIR` is no folder, or only some of the files are there.
    """
    _check_name("available", name)
    if name == "digits":
        return True
    if folder is not None:
        return bool(_complete(name, Path(folder)))
    return bool(_local_paths(name, None) or _complete(name, cache_folder() / name))


def mnist_or_digits() -> str:
    """Returns "mnist" if it can be loaded without a network, else "digits"."""
    return "mnist" if available("mnist") else "digits"


@contextlib.contextmanager
def data_loaded() -> Iterator[list[dict[str, Any]]]:
    """Yields what `load_images` loads meanwhile: name, size, and the checksum of its files."""
    token = _LOADED.set([])
    try:
        yield _LOADED.get()
    finally:
        _LOADED.reset(token)


_LOADED: ContextVar[list[dict[str, Any]]] = ContextVar("loaded", default=[])  # noqa: B039


def _loaded(name: str, size: int, paths: list[Path]) -> None:
    checksums = "".join(digest(path) for path in paths)
    found = {"name": name, "size": size, "sha256": sha256(checksums.encode()).hexdigest()}
    if found not in _LOADED.get():
        _LOADED.get().append(found)


def _check_name(owner: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{owner}(name={name!r}) must be one of {', '.join(NAMES)}.")


def _load_digits(size: int) -> Data:
    # scikit-learn takes a second to import, and only digits need it.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return image_data(images, labels, None, None, 10, size)


def _data_folder(name: str) -> list[Path]:
    """Returns `$LOPT_DATA_DIR/<name>`, or nothing if it is not set."""
    root = os.environ.get("LOPT_DATA_DIR")
    if root and not Path(root).is_dir():
        raise FileNotFoundError(
            f"LOPT_DATA_DIR={root} is not a folder; point it at the folder that holds "
            f"{', '.join(NAMES[1:])}, or unset it."
        )
    return [Path(root) / name] if root else []


def _choices(name: str, folder: Path) -> list[list[Path]]:
    """Returns the sets of files that a data set can be read from, what is downloaded first."""
    if name != "cifar10":
        return [[folder / file for file in FILES]]
    unpacked = [folder / "cifar-10-batches-bin", folder]
    return [
        [folder / CIFAR_ARCHIVE],
        *([place / file for file in CIFAR_FILES] for place in unpacked),
    ]


def _complete(name: str, folder: Path) -> list[Path]:
    """Returns the first set of files that is there, or nothing."""
    whole = (paths for paths in _choices(name, folder) if all(path.is_file() for path in paths))
    return next(whole, [])


def _local_paths(name: str, folder: str | os.PathLike | None) -> list[Path]:
    """Returns the paths of the user's own files, or nothing if there are none.

    Raises:
        FileNotFoundError: if a given folder, or one that has some of the files, lacks others.
    """
    for place in [Path(folder)] if folder is not None else _data_folder(name):
        if paths := _complete(name, place):
            return paths
        closest = max(_choices(name, place), key=lambda paths: sum(map(Path.is_file, paths)))
        missing = [path.name for path in closest if not path.is_file()]
        if folder is not None or len(missing) < len(closest):
            raise FileNotFoundError(
                f"load_images({name!r}): {closest[0].parent} lacks {', '.join(missing)}; put the "
                f"official files from {ADDRESSES[name]} there."
            )
    return []


def _download(name: str) -> list[Path]:
    """Returns the paths of downloaded files, from the cache if they are there already.

    Raises:
        ConnectionError: if a file cannot be had, or is not the official one.
    """
    import pooch

    folder = cache_folder() / name
    files = [path.name for path in _choices(name, folder)[0]]
    try:
        return [
            Path(pooch.retrieve(ADDRESSES[name] + file, f"md5:{checksum}", file, folder))
            for file, checksum in zip(files, CHECKSUMS[name], strict=True)
        ]
    # Requests raises OSErrors, pooch ValueErrors on a wrong checksum.
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"load_images({name!r}) could not download from {ADDRESSES[name]} into {folder}: "
            f"{error} Without a network, put {', '.join(files)} in a folder {name!r} and point "
            "the environment variable LOPT_DATA_DIR at the folder above it."
        ) from error
