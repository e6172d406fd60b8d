"""Splits keep rows of one coordinate together, and refuse tables that are too small."""

import numpy as np
import pytest

from lopt.symbolic.expression import Variable
from lopt.symbolic.split import coordinate_groups, run_groups, sample, split_by, split_table
from lopt.symbolic.table import Table


def make_table(runs, coordinates, steps, tasks=1):
    rows = tasks * runs * coordinates * steps
    places = np.unravel_index(np.arange(rows), (tasks, runs, coordinates, steps))
    values = np.arange(rows, dtype=float)
    task, run, coordinate, step = places
    columns = (Variable("gradient"),)
    return Table(columns, values[:, None], values, task, run, coordinate % 2, coordinate, step)


def ids(table, *names):
    return set(zip(*(getattr(table, name).tolist() for name in names), strict=True))


@pytest.mark.parametrize(("runs", "coordinates", "tasks"), [(1, 10, 1), (2, 8, 1), (3, 6, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_coordinate_of_a_run_is_on_two_sides_and_no_row_is_lost(runs, coordinates, tasks, seed):
    table = make_table(runs, coordinates, 30, tasks)
    splits = split_table(table, seed)
    sides = [splits.train, splits.validation, splits.test]
    rows = np.concatenate([side.output for side in sides])
    np.testing.assert_array_equal(np.sort(rows), table.output)
    names = ("task", "run", "tensor", "coordinate")
    pairs = [ids(side, *names) for side in sides]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == len(ids(table, *names))


def test_enough_runs_make_whole_runs_of_test_and_validation():
    splits = split_table(make_table(10, 4, 20))
    assert set(splits.unseen_runs) == {"validation", "test"}
    sides = [ids(side, "task", "run") for side in (splits.train, splits.validation, splits.test)]
    assert [len(side) for side in sides] == [6, 2, 2]
    assert len(set.union(*sides)) == 10


def test_few_runs_are_used_for_the_test_first():
    splits = split_table(make_table(3, 10, 20))
    assert "test" in splits.unseen_runs
    assert not ids(splits.test, "run") & ids(splits.train, "run")
    lonely = split_table(make_table(1, 10, 20))
    assert lonely.unseen_runs == ()
    assert len(lonely.test) == len(lonely.validation) == 40


def test_equal_numbers_in_different_tasks_are_different_runs():
    table = make_table(2, 3, 4, tasks=3)
    assert len(np.unique(run_groups(table))) == 6
    assert len(np.unique(coordinate_groups(table))) == 18


def test_splits_depend_on_the_seed_alone():
    table = make_table(10, 4, 20)
    one, same, other = (split_table(table, seed).test.output for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize(("runs", "coordinates", "steps"), [(1, 1, 1000), (1, 2, 500), (4, 2, 2)])
def test_too_small_tables_are_refused(runs, coordinates, steps):
    with pytest.raises(ValueError, match=rf"of {runs * coordinates * steps} rows.* needs 20"):
        split_table(make_table(runs, coordinates, steps))


def test_bad_fractions_are_refused():
    table = make_table(10, 4, 20)
    with pytest.raises(ValueError, match=r"test=1.5"):
        split_table(table, test=1.5)
    with pytest.raises(ValueError, match="nothing to train on"):
        split_table(table, validation=0.5, test=0.5)


def test_samples_are_rows_without_repetition():
    table = make_table(10, 4, 20)
    some = sample(table, 100, 0)
    assert len(some) == len(set(some.output.tolist())) == 100
    assert sample(table, 10_000, 0) is table


def test_a_split_of_ones_own_is_a_label_for_each_row():
    table = make_table(6, 4, 20)
    labels = np.asarray(["train", "train", "train", "validation", "train", "test"])[table.run]
    labels[(table.run == 3) & (table.coordinate == 0)] = "train"
    splits = split_by(table, labels.tolist())
    for name, side in splits.mapping().items():
        np.testing.assert_array_equal(side.output, table.output[labels == name])
    # Some of the run of the validation side is trained on.
    assert splits.unseen_runs == ("test",)
    with pytest.raises(ValueError, match=r"for each of 480 rows; it has shape \(479,\)"):
        split_by(table, labels[1:].tolist())
    with pytest.raises(ValueError, match=r"must be train, validation, test.* holds held-out, test"):
        split_by(table, np.where(labels == "train", "held-out", labels).tolist())
    with pytest.raises(ValueError, match=r"the validation side .* has 0 rows"):
        split_by(table, np.where(labels == "test", "test", "train").tolist())
