"""Image data sets from files: the host side of `lopt.tasks.data`.

`digits` comes with scikit-learn. MNIST and Fashion-MNIST are read from their official IDX files,
which are looked for in `$LOPT_DATA_DIR` and otherwise downloaded. Files of one's own are checked
by format, so that they may be excerpts; downloads are checked by checksum.
"""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from lopt.experiment.cache import cache_folder
from lopt.tasks.data import ImageData, image_data

NAMES = ("digits", "mnist", "fashion_mnist")

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

ADDRESSES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
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
}


def load_images(name: str, size: int = 8, folder: str | os.PathLike | None = None) -> ImageData:
    """Loads a data set in four splits.

    Args:
        name: "digits", "mnist" or "fashion_mnist".
        size: the height and width that images are given.
        folder: where the four IDX files are; by default they are looked for in
            `$LOPT_DATA_DIR/<name>`, then downloaded into `$LOPT_CACHE_DIR` or the user's cache.

    Raises:
        ValueError: if the name is unknown, or a file is not what it should be.
        FileNotFoundError: if `folder`, or an incomplete `$LOPT_DATA_DIR/<name>`, lacks a file.
        ConnectionError: if a download fails.

    Example:
        >>> from lopt.experiment.datasets import load_images
        >>> load_images("digits").train.images.shape
        (1260, 8, 8, 1)
    """
    _check_name("load_images", name)
    if name == "digits":
        return _load_digits(size)
    paths = _local_paths(name, folder) or _download(name)
    train_images, train_labels = _read_pair(paths[0], paths[1])
    test_images, test_labels = _read_pair(paths[2], paths[3])
    return image_data(train_images, train_labels, test_images, test_labels, 10, size)


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
        return not _missing(Path(folder))
    return bool(_local_paths(name, None)) or not _missing(cache_folder() / name)


def _check_name(owner: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{owner}(name={name!r}) must be one of {', '.join(NAMES)}.")


def _load_digits(size: int) -> ImageData:
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


def _missing(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _local_paths(name: str, folder: str | os.PathLike | None) -> list[Path]:
    """Returns the paths of the user's own files, or nothing if there are none.

    Raises:
        FileNotFoundError: if a given folder, or one that has some of the files, lacks others.
    """
    for place in [Path(folder)] if folder is not None else _data_folder(name):
        missing = _missing(place)
        if not missing:
            return [place / file for file in FILES]
        if folder is not None or len(missing) < len(FILES):
            raise FileNotFoundError(
                f"load_images({name!r}): {place} lacks {', '.join(missing)}; put the official "
                f"files from {ADDRESSES[name]} there."
            )
    return []


def _download(name: str) -> list[Path]:
    """Returns the paths of downloaded files, from the cache if they are there already.

    Raises:
        ConnectionError: if a file cannot be had, or is not the official one.
    """
    import pooch

    folder = cache_folder() / name
    try:
        return [
            Path(pooch.retrieve(ADDRESSES[name] + file, f"md5:{checksum}", file, folder))
            for file, checksum in zip(FILES, CHECKSUMS[name], strict=True)
        ]
    # Requests raises OSErrors, pooch ValueErrors on a wrong checksum.
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"load_images({name!r}) could not download from {ADDRESSES[name]} into {folder}: "
            f"{error} Without a network, put {', '.join(FILES)} in a folder {name!r} and point "
            "the environment variable LOPT_DATA_DIR at the folder above it."
        ) from error


def _read_pair(
    images_path: Path, labels_path: Path
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int[np.ndarray, " n"]]:
    """Reads images and their labels, and checks that they belong together."""
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


def _wrong(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} has {found}, expected {expected}; replace it by the official file {path.name}."
    )
