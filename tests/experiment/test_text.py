"""Texts from files: bytes, subwords, pieces of source code, and what is refused."""

import importlib.util

import numpy as np
import pytest

from lopt.experiment.data.datasets import data_loaded
from lopt.experiment.data.text import SUBWORDS, load_text, source_classification


def test_the_bundled_text_is_the_same_each_time():
    with data_loaded() as loaded:
        first, second = (load_text(length=20) for _ in range(2))
    assert [one["name"] for one in loaded] == ["bundled"]
    assert len(loaded[0]["sha256"]) == 64
    tokens = [np.asarray(data.train.arrays) for data in (first, second)]
    np.testing.assert_array_equal(*tokens)
    assert 200_000 < len(tokens[0]) < 1_000_000
    assert first.num_classes == 256
    assert "statement" in bytes(tokens[0][:2000].astype(np.uint8)).decode()


def test_own_files(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes("größe ".encode() * 20)
    with data_loaded() as loaded:
        data = load_text(str(path), length=3)
    assert bytes(np.asarray(data.train.arrays[:8]).astype(np.uint8)) == "größe ".encode()[:8]
    assert loaded[0]["length"] == 3
    path.write_bytes(b"")
    for name, length, message in [
        (str(path), 3, "is empty"),
        (str(tmp_path), 3, "There is no text"),
        ("shakespeare", 3, "tinyshakespeare or the path"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(name, length=length)
    path.write_bytes(b"a" * 99)
    with pytest.raises(ValueError, match=r"own.txt.*try length=9"):
        load_text(str(path), length=10)


def test_tiny_shakespeare_is_checked(tmp_path, monkeypatch):
    monkeypatch.delenv("LOPT_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="LOPT_DATA_DIR being unset"):
        load_text("tinyshakespeare")
    monkeypatch.setenv("LOPT_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="put the file"):
        load_text("tinyshakespeare")
    (tmp_path / "tinyshakespeare.txt").write_text("To be")
    with pytest.raises(ValueError, match="checksum"):
        load_text("tinyshakespeare")


def test_pieces_of_source_code():
    modules = ("textwrap", "bisect", "heapq")
    data = source_classification(length=16, modules=modules)
    assert data.num_classes == 3
    sources = []
    for module in modules:
        with open(importlib.util.find_spec(module).origin, "rb") as file:
            sources.append(file.read())
    seen = []
    for split in (data.train, data.valid_inner, data.valid_outer, data.test):
        tokens, labels = map(np.asarray, split.arrays)
        assert np.bincount(labels).tolist() == [len(labels) // 3] * 3
        for piece, label in zip(tokens.astype(np.uint8), labels, strict=True):
            assert bytes(piece) in sources[label]
        seen.append([sources[0].index(bytes(p)) for p in tokens[labels == 0].astype(np.uint8)])
    assert seen[0][0] == 0
    assert max(seen[0]) < max(seen[1]) < max(seen[2]) < max(seen[3])
    with pytest.raises(ValueError, match="tenth of the shortest"):
        source_classification(length=5000, modules=modules)
    with pytest.raises(ValueError, match="has no source"):
        source_classification(modules=("sys",))


def test_subwords(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "text.txt"
    text = "the cat sat on the mat; größe " * 40
    path.write_text(text, encoding="utf-8")
    first = load_text(str(path), "subwords", length=4)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=SUBWORDS, show_progress=False)
    parts = [first.train, first.valid_inner, first.valid_outer, first.test]
    ids = np.concatenate([np.asarray(part.arrays) for part in parts])
    assert tokenizer.decode(ids.tolist()) == text
    assert len(ids) < len(text) / 2
    assert first.num_classes == tokenizer.get_vocab_size()
    again = load_text(str(path), "subwords", length=4)
    np.testing.assert_array_equal(again.train.arrays, first.train.arrays)
