"""Data sets: real files, initial losses on them, and every way in which a file can be wrong."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from lopt.core.types import SPLITS
from lopt.experiment.data import datasets
from lopt.experiment.data.datasets import CIFAR, FILES, available, load_images
from lopt.tasks import mlp_classification

BESIDE = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("LOPT_DATA_DIR", BESIDE))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"LOPT_DATA_DIR is not set and there is no {BESIDE}"
)


def idx(array):
    """The IDX file of an array of bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """Four good files, for tests to spoil."""
    generator = np.random.default_rng(0)
    for name, num in zip(FILES, (30, 30, 12, 12), strict=True):
        shape = (num, 28, 28) if "images" in name else (num,)
        array = generator.integers(0, 256, shape) if "images" in name else np.arange(num) % 10
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_digits():
    data = load_images("digits")
    assert [int(data.split(name).count) for name in SPLITS] == [1260, 179, 179, 179]
    assert data.train.arrays.images.max() == 1
    assert data.train.arrays.images.min() == 0
    # Shuffled splits have all classes, about equally often.
    for name in SPLITS:
        assert np.bincount(data.split(name).arrays.labels, minlength=10).min() >= 8
    assert available("digits")
    again = load_images("digits")
    np.testing.assert_array_equal(data.test.arrays.images, again.test.arrays.images)


@needs_data
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mnist", [6400, 800, 800, 2000]), ("fashion_mnist", [4800, 600, 600, 2058])],
)
def test_real_files_are_read_in_step(name, sizes, monkeypatch):
    monkeypatch.setenv("LOPT_DATA_DIR", str(DATA))
    assert available(name)
    data = load_images(name, size=14)
    assert [int(data.split(split).count) for split in SPLITS] == sizes
    assert data.train.arrays.images.shape[1:] == (14, 14, 1)
    # If images and labels were out of step, class means would tell nothing about test images.
    images, labels = data.train.arrays
    means = np.stack([images[labels == c].mean(0) for c in range(10)])
    test = np.asarray(data.test.arrays.images)[:500]
    distances = ((test[:, None] - means[None]) ** 2).sum((2, 3, 4))
    accuracy = np.mean(distances.argmin(1) == np.asarray(data.test.arrays.labels)[:500])
    assert accuracy > (0.75 if name == "mnist" else 0.6)


@needs_data
def test_initial_loss_on_fashion_mnist_is_the_published_one():
    # 64-32-10 over 64 keys: mean 2.333, standard deviation 0.039.
    task = mlp_classification(load_images("fashion_mnist", 8, DATA / "fashion_mnist"))
    keys = jax.random.split(jax.random.key(0), 256)
    losses = np.asarray(jax.vmap(lambda key: task.loss(task.init(key), task.batch(key)))(keys))
    assert abs(losses.mean() - 2.333) < 4 * 0.039 * np.sqrt(1 / 64 + 1 / 256)
    assert abs(losses.std() - 0.039) < 4 * 0.039 * np.sqrt((1 / 64 + 1 / 256) / 2)


def test_own_files(folder, monkeypatch):
    data = load_images("mnist", 28, folder)
    assert [int(data.split(name).count) for name in SPLITS] == [24, 3, 3, 12]
    (folder / "mnist").mkdir()
    for name in FILES:
        (folder / name).rename(folder / "mnist" / name)
    monkeypatch.setenv("LOPT_DATA_DIR", str(folder))
    again = load_images("mnist", 28)
    np.testing.assert_array_equal(again.test.arrays.images, data.test.arrays.images)


def rewrite(folder, number, change):
    path = folder / FILES[number]
    path.write_bytes(change(path.read_bytes()))


def repack(array):
    return lambda _: gzip.compress(idx(array))


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        (0, lambda _: b"<html>not found</html>", "no readable gzip"),
        (0, lambda old: old[: len(old) // 2], "no readable gzip"),
        (2, lambda _: gzip.compress(b""), "magic number"),
        (1, lambda old: gzip.compress(b"\0\0\x0d\1" + gzip.decompress(old)[4:]), "magic number"),
        (0, repack(np.zeros(30)), "magic number"),
        (2, lambda old: gzip.compress(gzip.decompress(old)[:-1]), "9407 bytes of data.*9408"),
        (0, repack(np.zeros((30, 32, 32))), "32 x 32 pixels.*28 x 28"),
        (3, repack(np.arange(11) % 10), "11 labels.*12 images"),
        (1, repack(np.arange(30)), "label 29.*0 to 9"),
    ],
)
def test_bad_files_are_named(folder, number, change, words):
    rewrite(folder, number, change)
    with pytest.raises(ValueError, match=words) as caught:
        load_images("mnist", 8, folder)
    assert FILES[number] in str(caught.value)


def test_missing_files_are_named(folder, monkeypatch):
    (folder / FILES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {FILES[3]}; put"):
        load_images("mnist", 8, folder)
    assert not available("mnist", folder)
    (folder / "mnist").symlink_to(folder)
    monkeypatch.setenv("LOPT_DATA_DIR", str(folder))
    with pytest.raises(FileNotFoundError, match=f"lacks {FILES[3]}; put"):
        load_images("mnist", 8)


def test_a_failed_download_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("LOPT_DATA_DIR", raising=False)
    monkeypatch.setenv("LOPT_CACHE_DIR", str(tmp_path))
    # Nothing listens on port 9, so this fails at once and without a network.
    monkeypatch.setitem(datasets.ADDRESSES, "mnist", "http://127.0.0.1:9/")
    assert not available("mnist")
    with pytest.raises(ConnectionError, match="LOPT_DATA_DIR"):
        load_images("mnist")


def test_downloads_are_checked_and_kept(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.delenv("LOPT_DATA_DIR", raising=False)
    monkeypatch.setenv("LOPT_CACHE_DIR", str(cache))
    (cache / "mnist").mkdir()
    for name in FILES:
        (cache / "mnist" / name).write_bytes((folder / name).read_bytes())
    assert available("mnist")
    # They are not the official files, so the download is tried again, and fails.
    monkeypatch.setitem(datasets.ADDRESSES, "mnist", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match="LOPT_DATA_DIR"):
        load_images("mnist")
    sums = tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES)
    monkeypatch.setitem(datasets.CHECKSUMS, "mnist", sums)
    assert load_images("mnist").test.count == 12


CIFAR_ARCHIVE, CIFAR_FILES = CIFAR["cifar10"][0], datasets.CIFAR_FILES["cifar10"]


def cifar_row(label, image):
    """A row of a CIFAR-10 file, byte by byte: label, then red, green and blue, row by row."""
    colours = [image[i, j, c] for c in range(3) for i in range(32) for j in range(32)]
    return bytes([label, *colours])


def pack(path, files, folder="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as archive:
        if folder:
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for name, content in {"readme.html": b"<html>", **files}.items():
            entry = tarfile.TarInfo(folder + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def cifar():
    """The six files of an excerpt, 4 rows each, with images and labels: 20 to train, 4 to test."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    rows = [cifar_row(i % 10, image) for i, image in enumerate(images)]
    files = {name: b"".join(rows[4 * i : 4 * i + 4]) for i, name in enumerate(CIFAR_FILES)}
    return files, images


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_cifar_archive_and_files_hold_the_same(cifar, tmp_path, monkeypatch):
    files, images = cifar
    write(tmp_path / "flat", files)
    (tmp_path / "unpacked").mkdir()
    write(tmp_path / "unpacked" / "cifar-10-batches-bin", files)
    (tmp_path / "cifar10").mkdir()
    pack(tmp_path / "cifar10" / CIFAR_ARCHIVE, files)
    monkeypatch.setenv("LOPT_DATA_DIR", str(tmp_path))
    assert available("cifar10")
    data = load_images("cifar10", size=32)
    assert [int(data.split(name).count) for name in SPLITS] == [16, 2, 2, 4]
    assert data.train.arrays.images.shape[1:] == (32, 32, 3)
    np.testing.assert_array_equal(data.test.arrays.images, images[20:] / np.float32(255))
    np.testing.assert_array_equal(data.test.arrays.labels, [0, 1, 2, 3])
    # Shuffled images keep their labels.
    parts = [part.arrays for part in (data.train, data.valid_inner, data.valid_outer)]
    seen = [image for part in parts for image in part.images]
    labels = [label for part in parts for label in part.labels]
    places = [
        next(i for i in range(20) if np.array_equal(images[i] / np.float32(255), image))
        for image in map(np.asarray, seen)
    ]
    assert sorted(places) == list(range(20))
    np.testing.assert_array_equal([i % 10 for i in places], labels)
    for place in ("flat", "unpacked"):
        assert available("cifar10", tmp_path / place)
        other = load_images("cifar10", 32, tmp_path / place)
        jax.tree.map(np.testing.assert_array_equal, other, data)


def test_cifar100_has_a_coarse_label_before_the_fine_one(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    rows = [bytes([i % 20]) + cifar_row(4 * i, image) for i, image in enumerate(images)]
    files = {"train.bin": b"".join(rows[:20]), "test.bin": b"".join(rows[20:])}
    pack(tmp_path / "cifar-100-binary.tar.gz", files, "cifar-100-binary/")
    data = load_images("cifar100", 32, tmp_path)
    assert data.num_classes == 100
    np.testing.assert_array_equal(data.test.arrays.labels, [80, 84, 88, 92])
    np.testing.assert_array_equal(data.test.arrays.images, images[20:] / np.float32(255))
    write(tmp_path / "flat", {**files, "test.bin": bytes([0]) + cifar_row(100, images[0])})
    with pytest.raises(ValueError, match="a label 100, expected labels from 0 to 99"):
        load_images("cifar100", 32, tmp_path / "flat")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("data_batch_3.bin", lambda old: old[:-1], "12291 bytes.*multiple of 3073"),
        ("data_batch_1.bin", lambda old: bytes([10]) + old[1:], "label 10.*0 to 9"),
        ("test_batch.bin", lambda old: old[1:] + old[:1], "label .*0 to 9"),
    ],
)
def test_bad_cifar_files_are_named(cifar, name, change, words, tmp_path):
    files = cifar[0] | {name: change(cifar[0][name])}
    write(tmp_path, files)
    with pytest.raises(ValueError, match=words) as caught:
        load_images("cifar10", 32, tmp_path)
    assert f"{tmp_path / name} has" in str(caught.value)
    pack(tmp_path / CIFAR_ARCHIVE, files)
    with pytest.raises(ValueError, match=words) as caught:
        load_images("cifar10", 32, tmp_path)
    assert f"{tmp_path / CIFAR_ARCHIVE / name} has" in str(caught.value)


def test_bad_cifar_archives_are_named(cifar, tmp_path):
    path = tmp_path / CIFAR_ARCHIVE
    pack(path, cifar[0])
    content = path.read_bytes()
    for bad in (b"", b"<html>not found</html>", content[: len(content) // 2], gzip.compress(b"x")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{CIFAR_ARCHIVE} has no readable (tar.gz|gzip)"):
            load_images("cifar10", 32, tmp_path)
    pack(path, {name: cifar[0][name] for name in CIFAR_FILES[1:]}, folder="")
    with pytest.raises(ValueError, match=rf"{CIFAR_ARCHIVE} has no data_batch_1.bin, expected"):
        load_images("cifar10", 32, tmp_path)


def test_missing_cifar_files_are_named(cifar, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"lacks {CIFAR_ARCHIVE}; put.*toronto"):
        load_images("cifar10", 32, tmp_path)
    write(tmp_path / "cifar-10-batches-bin", cifar[0])
    (tmp_path / "cifar-10-batches-bin" / CIFAR_FILES[5]).unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin lacks test_batch\.bin; put"):
        load_images("cifar10", 32, tmp_path)
    assert not available("cifar10", tmp_path)


def test_cifar_is_downloaded_as_an_archive(cifar, tmp_path, monkeypatch):
    monkeypatch.delenv("LOPT_DATA_DIR", raising=False)
    monkeypatch.setenv("LOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(datasets.ADDRESSES, "cifar10", "http://127.0.0.1:9/")
    assert not available("cifar10")
    with pytest.raises(ConnectionError, match=rf"put {CIFAR_ARCHIVE} in a folder 'cifar10'"):
        load_images("cifar10", 32)
    path = tmp_path / "cifar10" / CIFAR_ARCHIVE
    path.parent.mkdir(exist_ok=True)
    pack(path, cifar[0])
    assert available("cifar10")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.CHECKSUMS, "cifar10", (checksum,))
    assert load_images("cifar10", 32).test.count == 4


@pytest.mark.parametrize("call", [load_images, available])
def test_unknown_name(call):
    with pytest.raises(ValueError, match=r"'cifar'.*digits, mnist, fashion_mnist, cifar10"):
        call("cifar")


def test_scikit_learn_and_pooch_are_imported_late():
    late = "{'sklearn', 'pooch'}.isdisjoint(sys.modules)"
    code = f"import lopt.experiment.data.datasets, sys; print({late})"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "True"
