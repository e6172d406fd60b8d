"""Every kind of file that lopt reads, damaged in 200 ways: refused in one line, or read the same.

The bytes of each file are changed, torn and added to. Files whose every value can be judged get
hostile values in place of each of theirs.
"""

import copy
import dataclasses
import gzip
import io
import json
import math
import tarfile
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import lopt
from lopt.experiment.data import datasets
from lopt.experiment.data.datasets import (
    ADDRESSES,
    CHECKSUMS,
    CIFAR,
    FILES,
    read_cifar,
    read_pair,
)
from lopt.experiment.data.tables import load_table, save_table
from lopt.experiment.runs import storage
from lopt.experiment.runs.description import describe
from lopt.experiment.runs.files import (
    number_in,
    read_columns,
    read_json,
    read_lines,
    scan_lines,
    to_line,
    write_json,
)
from lopt.experiment.runs.run import Run
from lopt.experiment.studies.setting import surface_settings
from lopt.experiment.studies.settings import SurfaceSettings
from lopt.symbolic.expression import Variable, make_expression
from lopt.symbolic.serial import to_json
from lopt.symbolic.table import IDS, Table

CIFAR_ARCHIVE, CIFAR_FILES = CIFAR["cifar10"][0], datasets.CIFAR_FILES["cifar10"]

RECIPE = Path(__file__).with_name("tiny_recipe.py")
WAYS = 200


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: `write` makes a good one in a folder, `read` returns what is made of it."""

    write: object
    read: object
    name: object = staticmethod(lambda path: path.name)


# ---- the files


def table():
    generator = np.random.default_rng(0)
    ids = {name: generator.integers(0, 5, 12) for name in IDS}
    columns = (Variable("m"), Variable("gradient", 2))
    return Table(columns, generator.normal(size=(12, 2)), generator.normal(size=12), **ids)


def write_table(suffix):
    def write(folder):
        save_table(folder / f"table{suffix}", table())
        return folder / f"table{suffix}"

    return write


def read_table(path):
    names = ("m", "gradient") if path.suffix == ".npy" else None
    found = load_table(path, names=names)
    return [found.columns, dict(found.about)] + [
        np.asarray(getattr(found, name)).tolist() for name in ("values", "output", *IDS)
    ]


def write_run(folder):
    Run.create(folder / "run", str(RECIPE), ["outer_steps=4"])
    return folder / "run" / "run.json"


def read_run(path):
    run = Run(path.parent)
    return describe(run.experiment.learned), run.config


LINES = [
    {"step": i, "meta_loss": 0.5 / (i + 1) if i != 3 else None, "finite": 1.0, "seconds": 0.25}
    for i in range(12)
]


def write_log(folder):
    (folder / "metrics.jsonl").write_text("".join(map(to_line, LINES)))
    return folder / "metrics.jsonl"


def read_log(path):
    lines = read_lines(path)
    losses, nothing = read_columns(path, ("meta_loss", "nothing"))
    expected = [line.get("meta_loss") for line in lines]
    expected = [one if isinstance(one, int | float) else math.nan for one in expected]
    np.testing.assert_array_equal(losses, expected)
    assert np.isnan(nothing).all()
    return lines


def write_surface_log(folder):
    lines = [{"step": i, "losses": [[0.5, None], [i, 2.5]]} for i in range(8)]
    (folder / "surface.jsonl").write_text("".join(map(to_line, lines)))
    return folder / "surface.jsonl"


def write_surface(folder):
    settings = dataclasses.asdict(SurfaceSettings(points=4, horizons=(2, 5)))
    write_json(folder / "surface_settings.json", settings, sealed=True)
    return folder / "surface_settings.json"


def read_surface(path):
    return dataclasses.asdict(surface_settings(path.parent))


def state():
    values = np.arange(6.0).reshape(2, 3)
    return {"a": values, "key": jax.random.key(1), "step": np.asarray(7, np.int32)}


def write_checkpoint(folder):
    storage.save_checkpoint(folder, 3, state())
    return folder / "00000003.safetensors"


def read_checkpoint(path):
    found = storage.load_checkpoint(path.parent, 3, jax.eval_shape(state))
    return [np.asarray(found["a"]).tolist(), found["key"], int(found["step"])]


LEARNED = lopt.LearnableAdam()


def write_weights(folder):
    path = folder / "weights.safetensors"
    lopt.save(path, LEARNED, LEARNED.init(jax.random.key(0)))
    return path


def read_weights(path):
    learned, theta = lopt.load(path)
    return [describe(learned), jax.tree.map(float, theta)]


def write_distill(folder):
    write_weights(folder)
    read_distill(folder / "distill.json")
    return folder / "distill.json"


def read_distill(path):
    from lopt.experiment.distill import check_settings
    from lopt.experiment.settings import DistillSettings

    check_settings(path.parent, dataclasses.asdict(DistillSettings()))
    return "accepted"


def write_front(folder):
    tree = ("multiply", -0.5, ("tanh", Variable("gradient", 2)))
    front = [to_json(make_expression(one)) for one in (tree, Variable("m"))]
    write_json(folder / "5.json", {"found": front}, sealed=True)
    return folder / "5.json"


def read_front(path):
    from lopt.experiment.distill import StoredSearch

    search = StoredSearch(lopt.symbolic.TemplateSearch(), path.parent)
    return [to_json(found) for found in search.search(table(), 5)]


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_idx(number):
    def write(folder):
        images = np.random.default_rng(0).integers(0, 256, (3, 28, 28))
        for name, array in zip(FILES, (images, np.arange(3)), strict=False):
            (folder / name).write_bytes(gzip.compress(idx(array), mtime=0))
        return folder / FILES[number]

    return write


def read_idx(path):
    found = read_pair(path.parent / FILES[0], path.parent / FILES[1])
    return [array.tolist() for array in found]


def pack(path, entries):
    """Writes a tar.gz of members and their contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, content in entries:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return path


def entries():
    rows = np.random.default_rng(0).integers(0, 256, (6, 3073)).astype(np.uint8)
    rows[:, 0] %= 10
    return [
        (tarfile.TarInfo(f"cifar-10-batches-bin/{name}"), row.tobytes())
        for name, row in zip(CIFAR_FILES, rows, strict=True)
    ]


def write_cifar(folder):
    return pack(folder / CIFAR_ARCHIVE, entries())


def read_archive(path):
    return [array.tolist() for pair in read_cifar("cifar10", [path]) for array in pair]


def folder_of(path):
    return path.parent.name


KINDS = {
    "run.json": Kind(write_run, read_run),
    "metrics.jsonl": Kind(write_log, read_log),
    "surface.jsonl": Kind(write_surface_log, read_lines),
    "surface_settings.json": Kind(write_surface, read_surface),
    "checkpoint.safetensors": Kind(write_checkpoint, read_checkpoint),
    "weights.safetensors": Kind(write_weights, read_weights),
    "table.npz": Kind(write_table(".npz"), read_table),
    "table.npy": Kind(write_table(".npy"), read_table),
    "distill.json": Kind(write_distill, read_distill, folder_of),
    "front": Kind(write_front, read_front),
    "cifar": Kind(write_cifar, read_archive),
    "idx images": Kind(write_idx(0), read_idx),
    "idx labels": Kind(write_idx(1), read_idx),
}
# Without a checksum, another digit is another number, and a log ends before what is damaged.
UNSEALED = {
    "run.json",
    "metrics.jsonl",
    "surface.jsonl",
    "surface_settings.json",
    "table.npy",
    "front",
}
LOGS = {"metrics.jsonl", "surface.jsonl"}


def verdict(kind, path, good):
    """Returns what is wrong with how a file is read, or nothing."""
    try:
        found = KINDS[kind].read(path)
    except (ValueError, OSError) as error:
        said = str(error)
        if KINDS[kind].name(path).removesuffix(".json") not in said:
            return f"does not name the file: {said[:200]}"
        return "is said on several lines" if "\n" in said else ""
    except BaseException as error:
        return f"ends in {type(error).__name__}: {str(error)[:200]}"
    if found == good:
        return ""
    if kind in LOGS and found == good[: len(found)]:
        return ""
    return f"is read as {str(found)[:200]}"


# ---- bytes


def damaged(content, seed):
    """Returns other bytes: flipped, torn, cut out of, added to, or filled with zeros."""
    generator = np.random.default_rng(seed)
    place, length = generator.integers(len(content)), generator.integers(1, 9)
    noise = generator.integers(0, 256, length).astype(np.uint8).tobytes()
    flipped = bytearray(content)
    flipped[place] ^= 1 << generator.integers(8)
    changed = [
        bytes(flipped),
        content[:place],
        content[:place] + content[place + length :],
        content[:place] + noise + content[place:],
        content[:place] + bytes(length) + content[place + length :],
        content[place:],
        content[:place] + noise + content[place + length :],
        content + noise,
    ]
    return changed[seed % len(changed)]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(kind, tmp_path):
    path = KINDS[kind].write(tmp_path)
    content, good = path.read_bytes(), KINDS[kind].read(path)
    wrong = {}
    for seed in range(WAYS):
        path.write_bytes(damaged(content, seed))
        if found := verdict(kind, path, good):
            wrong[seed] = found
    if kind in UNSEALED:
        wrong = {seed: said for seed, said in wrong.items() if not said.startswith("is read as")}
    assert not wrong


# ---- values

NESTED = "[" * 100_000 + "]" * 100_000
# As text of JSON, as some are none.
HOSTILE = [
    *("null", "true", "false", "-1", "0.5", '""', '"text"', "[]", "[5]", "{}", '{"a": 1}'),
    *("Infinity", "-Infinity", "NaN", "1e999", "1" + "0" * 30, "-" + "9" * 400, "1" * 10_000),
    *('"\\ud800"', '"\\u001b[31m"', '"../../etc/passwd"', NESTED, '{"a":' * 900 + "1" + "}" * 900),
]
MARK = "the hostile value"


def leaves(content, path=()):
    """Yields the paths of all values in JSON, also of lists and dictionaries."""
    yield path
    items = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = list(enumerate(content))[:2]  # others are alike
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(content, path, text):
    """Returns JSON with text in the place of one value; or without it, if there is no text."""
    content = copy.deepcopy(content)
    if not path:
        return text or ""
    place = content
    for key in path[:-1]:
        place = place[key]
    if text is None:
        del place[path[-1]]
    else:
        place[path[-1]] = MARK
    return json.dumps(content).replace(json.dumps(MARK), text or "")


def hostile(content):
    """Yields places in JSON, and the texts to put there; None for nothing."""
    for path in leaves(json.loads(content)):
        for text in (*HOSTILE, *([None] if path else [])):
            yield path, text


def flat(values):
    for value in values:
        yield from flat(value) if isinstance(value, list) else [value]


@pytest.mark.parametrize("number", [0, 5, -1])
@pytest.mark.parametrize("kind", sorted(LOGS))
def test_hostile_values_of_logs(kind, number, tmp_path):
    path = KINDS[kind].write(tmp_path)
    good, lines = KINDS[kind].read(path), path.read_text().splitlines()
    for place, text in hostile(lines[number]):
        changed = lines.copy()
        changed[number] = replaced(json.loads(lines[number]), place, text)
        path.write_text("\n".join(changed) + "\n")
        found = KINDS[kind].read(path)
        assert [line["step"] for line in found] == list(range(len(found)))
        assert not any(np.isinf(np.array(list(flat(line.values())), float)).any() for line in found)
        if text not in ("null", "-1", "0.5", None):
            assert found == good[: len(found)] or text in ("[]", "[5]")


def is_plausible(content, path, text):
    """Returns whether a value may be what was written: another number, or fewer of a list."""
    for key in path[:-1]:
        content = content[key]
    if text is None:
        return isinstance(content, list)
    old = content[path[-1]] if path else None
    return text in ("null", "-1", "0.5") and type(old) in (int, float)


@pytest.mark.parametrize("kind", ["run.json", "surface_settings.json", "distill.json", "front"])
def test_hostile_values(kind, tmp_path):
    path = KINDS[kind].write(tmp_path)
    good, content = KINDS[kind].read(path), path.read_bytes()
    wrong = {}
    for place, text in hostile(content):
        path.write_text(replaced(json.loads(content), place, text))
        found = verdict(kind, path, good)
        if found.startswith("is read as") and is_plausible(json.loads(content), place, text):
            continue
        if found:
            wrong[f"{place} is {str(text)[:30]}"] = found
    assert not wrong


def rewrite(path, arrays, described):
    """Writes weights with a checksum that fits them, as far as they have one at all."""
    if isinstance(described, dict):
        described["checksum"] = storage._checksum(described, arrays)
    text = described if isinstance(described, str) else json.dumps(described)
    path.write_bytes(safetensors.numpy.save(arrays, {"lopt": text}))


def test_hostile_descriptions_of_optimizers(key, tmp_path):
    """Also with the right checksum they are loaded, or refused in one line."""
    path, learned = tmp_path / "weights.safetensors", lopt.small_mlp((3,))
    arrays, described = storage._arrays(learned.init(key)), describe(learned)
    wrong = {}
    for place, text in hostile(json.dumps(described).encode()):
        content = replaced(described, place, text)
        try:
            rewrite(path, arrays, json.loads(content))
        except (ValueError, RecursionError):
            rewrite(path, arrays, content)
        try:
            assert isinstance(lopt.load(path)[0], lopt.AbstractLearnedOptimizer)
        except ValueError as error:
            if path.name not in str(error) or "\n" in str(error):
                wrong[f"{place} is {str(text)[:30]}"] = str(error)
        except Exception as error:
            wrong[f"{place} is {str(text)[:30]}"] = repr(error)
    assert not wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.reshape(1), r"is float64\[1\], expected"),
        (lambda a: a.astype(np.complex64), "is complex64"),
        (lambda a: a.astype(np.int64), r"is int64\[\], expected"),
        (lambda a: a.astype(bool), r"is bool\[\], expected"),
        (lambda a: np.full_like(a, np.nan), "not finite"),
        (lambda a: np.full_like(a, 1e300), "not finite"),
    ],
)
def test_weights_of_another_kind(change, words, tmp_path):
    path = write_weights(tmp_path)
    arrays = safetensors.numpy.load_file(path)
    name = sorted(arrays)[0]
    arrays[name] = change(arrays[name].astype(np.float64))
    rewrite(path, arrays, describe(LEARNED))
    with jax.enable_x64(False), pytest.raises(ValueError, match=words) as caught:
        lopt.load(path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_that_was_renamed(tmp_path):
    storage.save_checkpoint(tmp_path, 3, state())
    (tmp_path / "00000003.safetensors").rename(tmp_path / "00000004.safetensors")
    with pytest.raises(ValueError, match=r"00000004.safetensors is damaged"):
        storage.load_checkpoint(tmp_path, 4, jax.eval_shape(state))


# ---- archives


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(datasets, "LIMIT", 2**20)


def test_images_beyond_the_limit(small, tmp_path):
    path = write_idx(0)(tmp_path)
    header = bytes([0, 0, 8, 3])
    announced = header + np.array((10**6, 28, 28), ">i4").tobytes()
    path.write_bytes(gzip.compress(announced + bytes(100)))
    with pytest.raises(ValueError, match=r"images.*has the shape .*at most 1048576 bytes"):
        read_idx(path)
    # More than the header announces is not unpacked.
    bomb = header + np.array((3, 28, 28), ">i4").tobytes() + bytes(10**8)
    path.write_bytes(gzip.compress(bomb))
    del bomb
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"images.*has more than 2352 bytes of data, expected 2352"
    ):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_an_archive_beyond_the_limit(small, tmp_path):
    path = pack(tmp_path / CIFAR_ARCHIVE, [*entries(), (tarfile.TarInfo("more"), bytes(10**8))])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"cifar.*\(it unpacks to more than 1048576 bytes\)"):
        read_archive(path)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    for name in CIFAR_FILES:
        (tmp_path / name).write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match=r"data_batch_1.bin has 1048577 bytes.*up to 1048576"):
        read_cifar("cifar10", [tmp_path / name for name in CIFAR_FILES])


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("name", ["test_batch.bin", "other"])
def test_links_and_devices(kind, name, tmp_path):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/passwd"
    members = [one for one in entries() if Path(one[0].name).name != name]
    path = pack(tmp_path / CIFAR_ARCHIVE, [*members, (entry, b"")])
    with pytest.raises(ValueError, match=rf"cifar.*{name}' is there twice, or is a link or device"):
        read_archive(path)


def test_an_archive_that_goes_in_circles(tmp_path):
    """A negative size leads back to the header before it."""
    entry = tarfile.TarInfo("back")
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / CIFAR_ARCHIVE).write_bytes(gzip.compress(bytes(header) + bytes(10240)))
    with pytest.raises(ValueError, match=r"cifar.*has no readable tar.gz"):
        read_archive(tmp_path / CIFAR_ARCHIVE)


def test_an_archive_is_read_to_its_end(tmp_path):
    """Its checksum is behind all members, where tarfile does not look."""
    path = write_cifar(tmp_path)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar.*has no readable gzip file \(CRC check failed"):
        read_archive(path)


def test_downloads_are_https_with_sha_256():
    assert all(address.startswith("https://") for address in ADDRESSES.values())
    sums = [checksum for found in CHECKSUMS.values() for checksum in found]
    assert len(sums) == len(set(sums)) == 10
    assert all(len(checksum) == 64 and int(checksum, 16) for checksum in sums)


# ---- logs


def test_a_log_of_any_length_takes_no_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ({"step": i, "meta_loss": 1 / (i + 1), "finite": 1.0} for i in range(5000))
    path.write_text("".join(map(to_line, lines)))
    tracemalloc.start()
    line, end = max(scan_lines(path), key=lambda found: found[1])
    assert tracemalloc.get_traced_memory()[1] < 10**5
    tracemalloc.stop()
    assert json.loads(line)["step"] == 4999
    assert number_in(line, "finite") == 1
    assert end == path.stat().st_size
    losses, finite = read_columns(path, ("meta_loss", "finite"))
    np.testing.assert_array_equal(losses, 1 / np.arange(1, 5001))
    assert finite.all()


def test_columns_have_nan_for_none(tmp_path):
    losses, seconds = read_columns(write_log(tmp_path), ("meta_loss", "seconds"))
    assert np.isnan(losses).nonzero()[0].tolist() == [3]
    assert seconds.tolist() == [0.25] * 12
    assert read_columns(tmp_path / "nothing.jsonl", ("a", "b")).shape == (2, 0)


@pytest.mark.parametrize(
    "value", [0.0, -1.5e-300, 1.7e308, 5e-324, 123456789012345680.0, 1e-5, 1e16]
)
def test_numbers_of_a_log_come_back(value, tmp_path):
    content = {"step": 0, 'größe/\\"a"': value, "list": [[value, None], []], "whole": 2**62}
    (tmp_path / "log.jsonl").write_text(to_line(content))
    assert read_lines(tmp_path / "log.jsonl") == [content]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 12, "meta_loss": 1.0, "finite": NaN, "seconds": [1.0]}',
        '{"step": 12, "meta_loss": 1.0, "finite": "1", "seconds": 1.0}',
        '{"step": 13, "meta_loss": 1.0, "finite": 1.0, "seconds": 1.0}',
        '{"step": 12, "meta_loss": 1e999, "finite": 1.0, "seconds": 1.0}',
        '{"step": 12, "meta_loss": 1.0, "finite": 1.0, "seconds": 1.0} {}',
        '{"step": 12, "finite": 1.0, "seconds": 1.0, "meta_loss": %s}' % ("1" * 2**23),
        "0" * 2**23,
        "",
    ],
)
def test_a_log_ends_before_a_line_that_is_not_whole(line, tmp_path):
    path = write_log(tmp_path)
    end = path.stat().st_size
    with path.open("a") as file:
        file.write(line + "\n")
        file.write(to_line(LINES[0] | {"step": 13}))
    assert read_log(path) == LINES
    assert [found for _, found in scan_lines(path)][11] == end
    # Also one that only lacks its end: what is written next would stand behind it.
    path.write_text("".join(map(to_line, LINES))[:-1])
    assert read_log(path) == LINES[:-1]


def test_json_that_cannot_be_is_refused_by_name(tmp_path):
    path = tmp_path / "content.json"
    for text in ("NaN", "[1e999]", '{"a": 99999999999999999999}', '["\\ud800"]', "\ufeff1", NESTED):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"content.json is not valid JSON") as caught:
            read_json(path)
        assert len(str(caught.value)) < 600
    path.write_text('{"seed": 9223372036854775807, "name": "\\ud83d\\ude00"}')
    assert read_json(path) == {"seed": 2**63 - 1, "name": "\U0001f600"}


def test_a_new_file_is_written_once(tmp_path):
    write_json(tmp_path / "run.json", 1, new=True)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "run.json", 2, new=True)
    assert read_json(tmp_path / "run.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
