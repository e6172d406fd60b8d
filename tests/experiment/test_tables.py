"""Tables on disk: they come back as they were, and damage is said in one line with the file."""

import json

import numpy as np
import pytest

from lopt.experiment.data import tables
from lopt.experiment.data.tables import load_table, save_table
from lopt.experiment.runs.files import read_json
from lopt.symbolic.expression import Variable
from lopt.symbolic.table import IDS, Table

COLUMNS = (Variable("m"), Variable("gradient"), Variable("gradient", 2), Variable("time", 1))


@pytest.fixture
def table():
    generator = np.random.default_rng(0)
    ids = {name: generator.integers(0, 50, 40) for name in IDS}
    values = generator.normal(size=(40, 4)).astype(np.float32)
    about = {"run": "digits", "output": "update", "seeds": [1, 2]}
    return Table(COLUMNS, values, generator.normal(size=40), **ids, about=about)


def test_a_round_trip_keeps_everything(table, tmp_path):
    path = tmp_path / "table.npz"
    save_table(path, table)
    again = load_table(path)
    assert again.columns == table.columns
    assert again.about == table.about
    for name in ("values", "output", *IDS, "scale"):
        ours, theirs = getattr(again, name), getattr(table, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_programs_can_read_them(table, tmp_path):
    save_table(tmp_path / "t.npz", table)
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["feature.gradient[t-2]"], table.values[:, 2])
        said = json.loads(str(file["lopt"]))
    assert said["version"] == 1
    assert said["columns"][2] == ["gradient", 2]
    np.testing.assert_allclose(said["scale"], table.scale)


def test_the_older_npy_has_features_most_recent_first_and_then_the_output(table, tmp_path):
    save_table(tmp_path / "t.npy", table)
    rows = np.load(tmp_path / "t.npy", allow_pickle=False)
    assert rows.shape == (40, 5)
    np.testing.assert_array_equal(rows[:, :4], table.values[:, [0, 1, 3, 2]])
    np.testing.assert_array_equal(rows[:, 4], table.output)


def test_older_npy_files_are_read_time_major(tmp_path):
    # Three steps of two features; row r holds 100 lag + 10 feature + r.
    rows = np.array(
        [[100 * lag + 10 * k + r for lag in range(3) for k in range(2)] + [-r] for r in range(6)],
        float,
    )
    np.save(tmp_path / "old.npy", rows)
    old = load_table(tmp_path / "old.npy", names=("mt", "gt"))
    assert len(old.columns) == 6
    for variable, values in old.mapping().items():
        feature = {"mt": 0, "gt": 10}[variable.name]
        np.testing.assert_array_equal(values, 100 * variable.lag + feature + np.arange(6))
    np.testing.assert_array_equal(old.output, -np.arange(6))
    assert "unknown" in old.about["ids"]
    assert len(set(old.coordinate)) == 6
    with pytest.raises(ValueError, match=r"old.npy: an .npy has no names for its 6 features"):
        load_table(tmp_path / "old.npy")
    plain = load_table(tmp_path / "old.npy", names=["gradient"])
    assert plain.columns == tuple(Variable("gradient", lag) for lag in range(6))
    with pytest.raises(ValueError, match=r"old.npy: it has 7 columns.*4 features"):
        load_table(tmp_path / "old.npy", names=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match=r"old.npy: .*shape|old.npy: Table\(columns=.*repeats"):
        load_table(tmp_path / "old.npy", names=("a", "a"))


def rewrite(path, change):
    """Saves an npz again with its arrays changed."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, **arrays)


def set_said(field, value):
    def change(arrays):
        said = json.loads(str(arrays["lopt"])) | {field: value}
        arrays["lopt"] = np.array(json.dumps(said))

    return change


NESTED = "[" * 100_000 + "]" * 100_000


def put(name, value):
    def change(arrays):
        arrays[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("feature.gradient[t-2]"), r"lacks the column feature.gradient\[t-2\]"),
        (lambda a: a.pop("output"), "lacks the column output"),
        (lambda a: a.pop("run"), "lacks the column run"),
        (lambda a: a.pop("lopt"), "no `lopt` beside its columns"),
        (put("feature.m", np.full(40, np.nan)), "the column m is nan in row 0"),
        (put("output", np.full(40, np.inf)), "the output is inf"),
        (
            put("output", np.zeros(39)),
            r"output holds float64 of shape \(39,\), not .*\(40,\)",
        ),
        (put("run", np.zeros(40)), "column run holds float64"),
        (put("feature.m", np.array(["1"] * 40)), "column feature.m holds <U1"),
        (put("lopt", np.array("not JSON")), "`lopt` is damaged"),
        (set_said("version", 2), "version 2, and this lopt reads"),
        (set_said("format", "lopt report"), "'lopt report'"),
        (set_said("columns", [["m"]]), "`lopt` is damaged"),
        (set_said("columns", [["m", "__import__('os')"]]), "`lopt` is damaged"),
        (set_said("columns", [["m", -1]]), "`lopt` is damaged"),
        (set_said("columns", []), "`lopt` is damaged"),
        (set_said("columns", [["m", float("inf")]]), "`lopt` is damaged"),
        (put("lopt", np.array(NESTED)), "`lopt` is damaged"),
    ],
)
def test_damaged_tables_are_refused_by_name(change, words, table, tmp_path):
    path = tmp_path / "broken.npz"
    save_table(path, table)
    rewrite(path, change)
    with pytest.raises(ValueError, match=words) as caught:
        load_table(path)
    assert "broken.npz: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_torn_files_are_refused_by_name(suffix, share, table, tmp_path):
    path = tmp_path / f"torn{suffix}"
    save_table(path, table)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"torn{suffix}: it is not a whole"):
        load_table(path)


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bytes_are_noticed_or_harmless(seed, table, tmp_path):
    path = tmp_path / "flipped.npz"
    save_table(path, table)
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    content[generator.integers(len(content))] ^= generator.integers(1, 256)
    path.write_bytes(content)
    try:
        again, said = load_table(path), f"{path}: "
    except ValueError as error:
        again, said = table, str(error)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    for name in ("values", "output", *IDS):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"'shape': (40, 5)", b"'shape': (40, 5("), (b"(40, 5)", b"(4" + b"0" * 12 + b", 5)")],
)
def test_a_damaged_header_of_an_npy(old, new, table, tmp_path):
    path = tmp_path / "header.npy"
    save_table(path, table)
    content = path.read_bytes()
    space = b" " * (len(new) - len(old)) + b"\n"
    path.write_bytes(content.replace(old, new).replace(space, b"\n", 1))
    with pytest.raises(ValueError, match=r"header.npy: it is not a whole npy"):
        load_table(path)


def test_json_that_is_nested_too_deeply_is_damaged(tmp_path):
    for content in (NESTED, "1" * 5000, "{"):
        (tmp_path / "deep.json").write_text(content)
        with pytest.raises(ValueError, match=r"deep.json is not valid JSON \(.*restore it"):
            read_json(tmp_path / "deep.json")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    bomb = np.array([Bomb()], object)
    np.save(tmp_path / "bomb.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "bomb.npz", output=bomb, allow_pickle=True)
    for name in ("bomb.npy", "bomb.npz"):
        with pytest.raises(ValueError, match=f"{name}: it is not a whole"):
            load_table(tmp_path / name)


def test_mistakes_are_said_before_anything_is_written(table, tmp_path):
    with pytest.raises(ValueError, match=r"ends in .npz, .npy, not as t.csv"):
        save_table(tmp_path / "t.csv", table)
    with pytest.raises(FileNotFoundError, match="no table"):
        load_table(tmp_path / "t.npz")
    odd = Table(**(vars(table) | {"about": {"rule": object()}}))
    with pytest.raises(ValueError, match="`about` is not made of JSON"):
        save_table(tmp_path / "t.npz", odd)
    np.save(tmp_path / "one.npy", np.zeros(4))
    np.save(tmp_path / "whole.npy", np.zeros((4, 3), int))
    for name, words in (("one.npy", "not one array"), ("whole.npy", "holds int64")):
        with pytest.raises(ValueError, match=words):
            load_table(tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {"one.npy", "whole.npy"}


def test_a_write_that_fails_leaves_the_old_table(table, tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    save_table(path, table)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_table(path, table.take(np.arange(3)))
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["t.npz"]
