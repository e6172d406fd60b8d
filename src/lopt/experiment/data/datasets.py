"""Image data sets from files: the host side of `lopt.tasks.data`.

`digits` comes with scikit-learn. MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are read from their
official files, which are looked for in `$LOPT_DATA_DIR` and otherwise downloaded. Files of one's
own are checked by format, so that they may be excerpts; downloads are checked by checksum.
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lopt.experiment.data.image_files import CIFAR_FILES, NUM_CLASSES, read_cifar, read_pair
from lopt.experiment.runs.environment import cache_folder
from lopt.experiment.runs.files import digest
from lopt.tasks.data import Data, image_data

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

# An archive, and the folder in it.
CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-binary.tar.gz", "cifar-100-binary"),
}

ADDRESSES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
    "cifar100": "https://www.cs.toronto.edu/~kriz/",
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
    lacking = [[path.name for path in paths if not path.is_file()] for paths in sets]
    found = list(zip(sets, lacking, strict=True))
    whole = [one for one in found if not one[1]]
    return whole[0] if whole else max(found, key=lambda one: len(one[0]) - len(one[1]))


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
