"""Texts from files, as bytes or subwords: the host side of `lopt.tasks.text_data`.

"bundled" needs no file: the reference documentation of the language that every installation of
Python has in `pydoc_data.topics`, about 465,000 characters, the same for one version of Python.
"tinyshakespeare" is looked for in `$LOPT_DATA_DIR`. Any other name is the path of a text file.
"""

import importlib.util
import itertools
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int

from lopt.experiment.data.datasets import note_loaded
from lopt.tasks.data import Data, Examples, text_data

Tokens: TypeAlias = Literal["bytes", "subwords"]

TINY_SHAKESPEARE = "tinyshakespeare"
# SHA-256 of its 1,115,394 bytes.
CHECKSUM = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ADDRESS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)

# Modules of the standard library with about 100,000 bytes of source and more.
MODULES = ("argparse", "doctest", "inspect", "pickletools", "pydoc", "tarfile", "turtle", "typing")

SUBWORDS = 8192


def load_text(name: str = "bundled", tokens: Tokens = "bytes", length: int = 64) -> Data:
    """Loads a text in four contiguous splits, see `lopt.tasks.text_data`.

    Args:
        name: "bundled", "tinyshakespeare" or the path of a file.
        tokens: "bytes", of which there are 256, or "subwords": at most 8192, found in the text
            itself by byte pair encoding. These need the extra `text`.
        length: tokens in an example.

    Raises:
        ValueError: if the text is too short, not what it should be, or there is none of the name.
        FileNotFoundError: if `$LOPT_DATA_DIR/tinyshakespeare.txt` is not there.
        ImportError: if the extra `text` is not installed.

    Example:
        >>> from lopt.experiment.data.text import load_text
        >>> load_text("bundled", length=32).num_classes
        256
    """
    content = _read(name)
    found, vocabulary = _tokenize([content], tokens)
    checksum = sha256(content).hexdigest()
    note_loaded({"name": name, "tokens": tokens, "length": length, "sha256": checksum})
    try:
        return text_data(found[0], length, vocabulary)
    except ValueError as error:
        raise ValueError(f"load_text({name!r}): {error}") from None


def source_classification(
    tokens: Tokens = "bytes", length: int = 64, modules: Sequence[str] = MODULES
) -> Data:
    """Asks which module of Python's standard library a piece of source code is from.

    Each source is parted into contiguous splits 70 : 10 : 10 : 10, and these into pieces which do
    not overlap. Every module has equally many.

    Args:
        tokens: "bytes" or "subwords", see `load_text`.
        length: tokens in a piece.
        modules: their names, which are the classes, in order.

    Returns:
        Pairs of tokens, of shape (n, length), and labels.

    Raises:
        ValueError: if a module has no source or too little.
        ImportError: if the extra `text` is not installed.
    """
    contents = [_source(module) for module in modules]
    checksum = sha256("".join(sha256(one).hexdigest() for one in contents).encode()).hexdigest()
    found, _ = _tokenize(contents, tokens)
    note_loaded(
        {"name": "source_classification", "tokens": tokens, "length": length, "sha256": checksum}
    )
    shortest = min(map(len, found))
    if not 0 < length <= shortest // 10:
        raise ValueError(
            f"source_classification(length={length}) must be between 1 and a tenth of the shortest "
            f"source, of {shortest} tokens; try length={max(1, min(64, shortest // 10))}."
        )
    tenth = shortest // 10
    ends = [0, shortest - 3 * tenth, shortest - 2 * tenth, shortest - tenth, shortest]
    splits = []
    for first, last in itertools.pairwise(ends):
        count = (last - first) // length
        pieces = [one[first : first + count * length].reshape(count, length) for one in found]
        labels = np.repeat(np.arange(len(modules), dtype=np.int32), count)
        splits.append(Examples((np.concatenate(pieces), labels)))
    train, valid_inner, valid_outer, test = splits
    return Data(train, valid_inner, valid_outer, test, len(modules))


def _read(name: str) -> bytes:
    if name == "bundled":
        from pydoc_data.topics import topics

        return "\n".join(topics[topic] for topic in sorted(topics)).encode()
    path = Path(name)
    if name == TINY_SHAKESPEARE:
        root = os.environ.get("LOPT_DATA_DIR")
        path = Path(root or "", f"{name}.txt")
        if not root or not path.is_file():
            raise FileNotFoundError(
                f"load_text({name!r}) needs $LOPT_DATA_DIR/{name}.txt, LOPT_DATA_DIR being "
                f'{root or "unset"}; put the file from {ADDRESS} there, or try "bundled".'
            )
    elif not path.is_file():
        raise ValueError(
            f"There is no text {name!r}: it is bundled, {TINY_SHAKESPEARE} or the path of a file."
        )
    if not (content := path.read_bytes()):
        raise ValueError(f"{path} is empty; try a text of at least ten times an example's length.")
    if name == TINY_SHAKESPEARE and sha256(content).hexdigest() != CHECKSUM:
        raise ValueError(f"{path} has another checksum than {CHECKSUM}; get it from {ADDRESS}.")
    return content


def _source(module: str) -> bytes:
    """Returns the source code of a module, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise ValueError(
            f"source_classification(module {module!r}) has no source; try modules={MODULES[:2]}."
        )
    return Path(spec.origin).read_bytes()


def _tokenize(contents: list[bytes], tokens: Tokens) -> tuple[list[Int[np.ndarray, " _"]], int]:
    """Returns texts as tokens, and how many tokens there are."""
    if tokens == "bytes":
        return [np.frombuffer(content, np.uint8).astype(np.int32) for content in contents], 256
    if tokens != "subwords":
        raise ValueError(f'load_text(tokens={tokens!r}) must be "bytes" or "subwords".')
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise ImportError(
            'Subwords need the extra "text"; try pip install "lopt[text]", or tokens="bytes".'
        ) from error
    texts = [content.decode(errors="replace") for content in contents]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=SUBWORDS, show_progress=False)
    found = [np.array(tokenizer.encode(text).ids, np.int32) for text in texts]
    return found, tokenizer.get_vocab_size()
