"""Data for tasks by name: the data set itself where its files are at hand, else a substitute.

Nothing is downloaded. What stands for what depends on the names alone and on what is at hand, and
is noted for `data_loaded`. What is loaded is kept, so that tasks share arrays.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import jax.numpy as jnp

from lopt.experiment.data.datasets import NAMES, available, data_loaded, load_images, note_loaded
from lopt.experiment.data.text import TINY_SHAKESPEARE, load_text, source_classification
from lopt.tasks.data import Data, Examples, Labelled
from lopt.tasks.taskset.config import known
from lopt.tasks.taskset.images import DATA_SETS
from lopt.tasks.taskset.text_families import CORPORA

GREY = ("mnist", "fashion_mnist")
# Images of a substitute that a split has at most: in three channels of 32 x 32, 150 MB.
MOST = 12_000


def at_hand() -> tuple[str, ...]:
    """Returns the data sets and texts that need no download."""
    text = Path(os.environ.get("LOPT_DATA_DIR") or "", f"{TINY_SHAKESPEARE}.txt").is_file()
    return (*filter(available, NAMES), "bundled", *[TINY_SHAKESPEARE] * text)


def load(name: str, tokens: str | None = None, length: int = 64) -> Data:
    """Loads a data set or text that TaskSet names, or what stands for it; for `Config.build`.

    Images of a substitute have the published height, width and number of channels. Texts are read
    as tokens, "bytes" or "subwords", so many in an example; for "classes" `source_classification`
    gives either, with labels.
    """
    found = at_hand()
    if tokens == "classes":
        unit = "bytes" if name.endswith("/bytes") else "subwords"
        return kept(source_classification, unit, length, instead_of=name)
    if tokens is not None:
        known("text", name, CORPORA)
        source = _chosen(name, [one for one in ("bundled", TINY_SHAKESPEARE) if one in found])
        return kept(load_text, source, tokens, length, instead_of=name)
    known("data set", name, DATA_SETS)
    size = 28 if name in GREY else 16 if name.endswith("16x16") else 32
    if name in found:
        return kept(load_images, name, size)
    source = _chosen(name, [one for one in ("digits", *GREY) if one in found])
    return kept(_in_channels, source, size, 1 if name in GREY else 3, instead_of=name)


def kept(function: Callable[..., Data], *arguments: Any, instead_of: str = "") -> Data:
    """Returns what a loader returns, loaded once, and notes it each time."""
    data, found = _kept(function, arguments, os.environ.get("LOPT_DATA_DIR"))
    for one in found:
        note_loaded({**one, "instead_of": instead_of} if instead_of else one)
    return data


@functools.cache
def _kept(
    function: Callable[..., Data], arguments: tuple[Any, ...], folder: str | None
) -> tuple[Data, list[dict[str, Any]]]:
    with data_loaded() as found:
        return function(*arguments), found


def _chosen(name: str, options: list[str]) -> str:
    return options[crc32(name.encode()) % len(options)]


def _in_channels(name: str, size: int, channels: int) -> Data:
    """Returns grey images in equal channels, as many as there is memory for."""

    def repeated(examples: Examples) -> Examples:
        images, labels = examples.arrays
        images = jnp.repeat(images[:MOST], channels, axis=3)
        return Examples(Labelled(images, labels[:MOST]))

    data = load_images(name, size)
    train, valid = repeated(data.train), repeated(data.valid_inner)
    return Data(train, valid, repeated(data.valid_outer), repeated(data.test), data.num_classes)
