"""Tables: rows are what the series had at their steps, evenly chosen, and finite."""

import numpy as np
import pytest

from lopt.symbolic.expression import Variable
from lopt.symbolic.series import Series, choose_rows, lagged, make_table
from lopt.symbolic.table import Table


def series(runs=3, steps=30, coordinates=4, outputs=("output", "update")):
    """Values that say where they are from."""
    run, step, coordinate = np.meshgrid(
        np.arange(runs), np.arange(steps), np.arange(coordinates), indexing="ij"
    )
    place = 1.0 + run * 10_000 + coordinate * 100 + step
    features = {"gradient": place, "time": step / 100, "raw_gradient": place}
    features["raw_parameter"] = -place
    return Series(
        features,
        {name: i + 2 * place for i, name in enumerate(outputs)},
        task=np.arange(runs) % 2,
        tensor=np.array([0, 0, 1, 1])[:coordinates],
        coordinate=np.tile(np.arange(coordinates) * 7, (runs, 1)),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_windows_of_the_series(padded):
    columns = (*lagged("gradient", 3), Variable("time"), Variable("time", 2))
    table = make_table(series(), columns, padded=padded)
    assert len(table) == 3 * 4 * (30 if padded else 28)
    assert len({*zip(table.run, table.coordinate, table.step, strict=True)}) == len(table)
    for row in range(len(table)):
        run, step, coordinate = table.run[row], table.step[row], table.coordinate[row] // 7
        expected = [
            1.0 + run * 10_000 + coordinate * 100 + step - lag if step >= lag else 0.0
            for lag in range(3)
        ]
        expected += [step / 100, max(step - 2, 0) / 100]
        np.testing.assert_allclose(table.values[row], expected)
        assert table.output[row] == 2 * (1.0 + run * 10_000 + coordinate * 100 + step)
        assert table.task[row] == run % 2
        assert table.tensor[row] == coordinate // 2
    assert (table.step.min() == 0) == padded


def test_by_default_all_that_the_rule_got_and_its_only_output():
    table = make_table(series())
    assert list(map(str, table.columns)) == ["gradient", "time"]
    assert table.about["output"] == "output"
    two = make_table(series(outputs=("output_0", "output_1", "update")))
    assert two.about["output"] == "update"
    np.testing.assert_array_equal(two.output, 2 + 2 * two.values[:, 0])
    second = make_table(series(outputs=("output_0", "output_1", "update")), output="output_1")
    np.testing.assert_array_equal(second.output, 1 + 2 * second.values[:, 0])


def test_dead_coordinates_are_left_out():
    recorded = series(steps=60)
    gradient = recorded.features["raw_gradient"]
    gradient[:, :, 0] = 0
    gradient[:, 10:50, 1] = 0
    table = make_table(recorded)
    assert 0 not in table.coordinate
    dead = table.step[(table.coordinate == 7) & (table.run == 0)]
    # Step 28 still has the gradient of step 9 among its last 20; step 29 has none.
    assert dead.tolist() == [*range(29), *range(50, 60)]
    longer = make_table(recorded, lagged("gradient", 25))
    alive = longer.step[(longer.coordinate == 7) & (longer.run == 0)]
    assert alive.tolist() == [*range(24, 34), *range(50, 60)]


def test_chosen_rows_are_even_over_tensors_steps_and_tasks():
    # Task 0 has two runs and tensor 1 has three coordinates of four: there is more of them.
    recorded = series(runs=3, steps=100)
    recorded = Series(
        recorded.features,
        recorded.outputs,
        recorded.task,
        np.array([0, 1, 1, 1]),
        recorded.coordinate,
    )
    table = make_table(recorded, rows=200, seed=1)
    counts = np.zeros((2, 2, 10), int)
    np.add.at(counts, (table.task, table.tensor, table.step // 10), 1)
    assert (counts == 5).all()
    again, other = (make_table(recorded, rows=200, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(again.values, table.values)
    assert (other.step != table.step).any()


def test_scarce_strata_are_taken_whole_and_others_fill_up():
    strata = np.array([[0] * 3 + [1] * 50 + [2] * 50])
    chosen = choose_rows(strata, 43, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 43
    assert np.bincount(strata[0, chosen]).tolist() == [3, 20, 20]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"columns": (Variable("momentum"),)}, "no feature 'momentum'.*gradient, time"),
        ({"columns": ()}, "at least one feature"),
        ({"columns": lagged("gradient", 31)}, "must be from 0 to 29"),
        ({"output": "step"}, "no output 'step'.*output, update"),
        ({"rows": 361}, r"rows=361.*have 360 rows"),
        ({"rows": 0}, "rows=0"),
    ],
)
def test_what_cannot_be_made_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_table(series(), **arguments)


def test_a_recording_that_is_not_finite_makes_no_table():
    recorded = series()
    recorded.features["time"][1, 5, 2] = np.nan
    assert recorded.finite().tolist() == [True, False, True]
    with pytest.raises(ValueError, match="column time is nan"):
        make_table(recorded)
    assert set(make_table(recorded.take(recorded.finite())).run) == {0, 1}


def table(**changes):
    ids = {name: np.arange(5) for name in ("task", "run", "tensor", "coordinate", "step")}
    fields = {
        "columns": lagged("gradient", 2),
        "values": np.arange(10.0).reshape(5, 2),
        "output": np.arange(5.0),
    }
    return Table(**(fields | ids | changes))


def test_columns_by_name_rows_and_scale():
    small = table()
    np.testing.assert_array_equal(small.column(Variable("gradient", 1)), [1, 3, 5, 7, 9])
    np.testing.assert_allclose(small.scale, np.sqrt([24, 33]))
    part = small.take(np.array([3, 1]))
    assert (part.values[:, 0].tolist(), part.run.tolist()) == ([6, 2], [3, 1])
    with pytest.raises(ValueError, match=r"no column m; it has gradient, gradient\[t-1\]"):
        small.column(Variable("m"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": lagged("gradient", 3)}, r"shape \(5, 2\), not \(5, 3\)"),
        ({"columns": (Variable("a"), Variable("a"))}, "repeats a name"),
        ({"values": np.full((5, 2), np.inf)}, "column gradient is inf in row 0"),
        ({"output": np.array([0, 1, np.nan, 3, 4])}, "output is nan in row 2"),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        table(**changes)


def test_columns_are_selected_by_name():
    columns = (*lagged("gradient", 3), Variable("time"))
    table = make_table(series(), columns)
    selected = table.select("time", "gradient[t-1]")
    assert list(map(str, selected.columns)) == ["gradient[t-1]", "time"]
    np.testing.assert_array_equal(selected.values, table.values[:, [1, 3]])
    np.testing.assert_array_equal(selected.output, table.output)
    assert table.select("gradient").columns == columns[:3]
    with pytest.raises(ValueError, match=r"no column speed; there are gradient, gradient\[t-1\]"):
        table.select("speed", "time")
