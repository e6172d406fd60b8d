"""Recording trained runs: what the table says is true of the run, and mistakes cost no time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lopt.experiment import cli
from lopt.experiment.data.tables import load_table
from lopt.experiment.record import record_run
from lopt.experiment.runs import storage
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train
from lopt.experiment.settings import RecordSettings, split_lag
from lopt.symbolic.expression import Variable

RECIPE = Path(__file__).with_name("tiny_recipe.py")
NETWORK = """
import dataclasses, lopt, optax
import jax.numpy as jnp

@dataclasses.dataclass
class Recipe:
    def build(self):
        family = lopt.tasks.QuadraticFamily(12)
        learned = lopt.learned.rnnprop("mt+g+t", hidden=(3,), dense=2)
        meta = lopt.Mean(lopt.PES(lopt.InnerTraining(family, learned, 8), 4, 0.05), 2)
        return lopt.Experiment(learned, meta, optax.sgd(0.01), 1)
"""

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def rate_run(tmp_path_factory):
    """A run of one learned rate on a quadratic of two coordinates: fewer than are recorded."""
    folder = tmp_path_factory.mktemp("rate")
    train(Run.create(folder, str(RECIPE), ["outer_steps=2"]), show_progress=False)
    return folder


@pytest.fixture(scope="module")
def network_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    (folder / "recipe.py").write_text(NETWORK)
    run = folder / "run"
    train(Run.create(run, str(folder / "recipe.py")), show_progress=False)
    return run


def test_of_learned_sgd_the_updates_are_the_rate_times_the_gradients(rate_run):
    settings = RecordSettings(rows=60, steps=10, at_once=2)
    table = record_run(Run(rate_run), settings)
    assert len(table) == 60
    assert list(map(str, table.columns)) == ["gradient", "parameter"]
    rate = np.exp(storage.load(rate_run)[1]["learning_rate"])
    np.testing.assert_allclose(table.output, -rate * table.values[:, 0], rtol=1e-5)
    assert set(table.coordinate) == {0, 1}
    # One task, one tensor, and as many rows of each step, as steps are tenths of the run.
    assert (set(table.task), set(table.tensor)) == ({0}, {0})
    assert np.bincount(table.step).tolist() == [6] * 10
    # A tenth of what was recorded.
    assert table.about["runs"] == 30
    assert table.about["output"] == "update"


def test_a_network_with_memory_is_recorded_on_fresh_tasks(network_run):
    settings = RecordSettings(rows=40, steps=6, at_once=2)
    table = record_run(Run(network_run), settings)
    assert list(map(str, table.columns)) == ["m_normalised", "gradient", "time"]
    assert table.about["output"] == "output"
    assert (np.abs(table.output) <= 1).all()
    assert np.ptp(table.output) > 0
    np.testing.assert_allclose(table.column(Variable("time")), (table.step + 1) / 1000, rtol=1e-6)
    # Every run drew a task of its own.
    assert len(set(table.task)) == len(set(table.run)) > 2
    same, other = (
        record_run(Run(network_run), dataclasses.replace(settings, seed=seed)) for seed in (0, 1)
    )
    np.testing.assert_array_equal(same.values, table.values)
    assert not np.isin(other.column(Variable("gradient")), table.column(Variable("gradient"))).any()


def test_a_run_is_recorded_through_averages_of_what_its_rule_sees(network_run):
    settings = RecordSettings(40, 6, at_once=2, also=("warmup_0.8",), decays=(0.9,))
    table = record_run(Run(network_run), settings)
    averages = ["average_0.9_m_normalised", "average_0.9_gradient"]
    expected = ["m_normalised", "gradient", *averages, "time", "warmup_0.8"]
    assert list(map(str, table.columns)) == expected
    first = table.step == 0
    assert first.any()
    found = table.column(Variable("average_0.9_gradient"))[first]
    np.testing.assert_allclose(found, 0.1 * table.column(Variable("gradient"))[first], rtol=1e-5)
    np.testing.assert_allclose(
        table.column(Variable("warmup_0.8")), 1 - 0.8 ** (table.step + 1.0), rtol=1e-5
    )


def test_the_command_writes_a_table_of_lags_and_never_over_one(network_run, monkeypatch, capsys):
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)
    arguments = [
        "record",
        str(network_run),
        "--rows",
        "30",
        "--steps",
        "6",
        "--lags",
        "3",
        "--target",
    ]
    cli._dispatch([*arguments, "update", "--padded"])
    said = " ".join(capsys.readouterr().out.split())
    assert "30 rows, 3 columns, output update" in said
    table = load_table(network_run / "table.npz")
    # This rule gets the gradient as it is, so that lags go by its name.
    assert table.columns == tuple(Variable("gradient", lag) for lag in range(3))
    early = table.step < 2
    assert early.any()
    assert (table.values[early, 2] == 0).all()
    assert (table.values[~early] != 0).all()
    assert table.about["steps"] == 6
    with pytest.raises(FileExistsError, match="already exists; give another"):
        cli._dispatch([*arguments, "update"])
    inside_a_file = str(network_run / "run.json" / "table.npz")
    with pytest.raises(NotADirectoryError, match=r"run\.json is a file, not a folder"):
        cli._dispatch([*arguments, "output", "--output", inside_a_file])
    other = network_run / "other.npy"
    cli._dispatch([*arguments, "output", "--output", str(other)])
    assert np.load(other).shape == (30, 4)


def test_features_are_read_as_they_are_printed():
    for variable in (Variable("m"), Variable("momentum_0.9", 12)):
        assert Variable(*split_lag(str(variable))) == variable
    for text in ("", "m[t]", "m[t-x]", "m[t-1", "[t-1]", "m[t--1]", "m[t-1]]"):
        with pytest.raises(ValueError, match="is no feature"):
            split_lag(text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": 0}, "--rows 0"),
        ({"steps": 0}, "--steps 0"),
        ({"lags": 3, "decays": (0.9,)}, r"--decays \(0\.9,\) and --lags 3"),
        ({"per_tensor": 0}, "--per-tensor 0"),
        ({"steps": 10, "lags": 11}, "--lags 11"),
        ({"lags": 2, "features": ("gradient",)}, "give one of the two"),
        ({"features": ("gradient[2]",)}, "is no feature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        RecordSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": ("momentum",)}, "no feature 'momentum'.*gradient, parameter"),
        ({"features": ("gradient[t-9]",)}, "must be from 0 to 3"),
        ({"target": "output"}, "no output 'output'.*update"),
    ],
)
def test_what_was_not_recorded_is_named(settings, words, rate_run):
    with pytest.raises(ValueError, match=words):
        record_run(Run(rate_run), RecordSettings(rows=4, steps=4, **settings))


def test_folders_and_files_are_checked_first(rate_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        record_run(Run(tmp_path), RecordSettings())
    with pytest.raises(ValueError, match=r"ends in .npz"):
        cli._dispatch(["record", str(rate_run), "--output", str(tmp_path / "table.txt")])
    with pytest.raises(ValueError, match="--seed -1"):
        cli._dispatch(["record", str(rate_run), "--seed", "-1"])
    Run.create(tmp_path / "untrained", str(RECIPE))
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"):
        record_run(Run(tmp_path / "untrained"), RecordSettings())
    assert {file.name for file in tmp_path.iterdir()} == {"untrained"}


def test_runs_that_all_diverge_make_no_table(tmp_path):
    train(
        Run.create(tmp_path, str(RECIPE), ["outer_steps=2", "poison=True"]),
        show_progress=False,
    )
    with pytest.raises(ValueError, match=r"No row of .* 0 of them stayed finite"):
        record_run(Run(tmp_path), RecordSettings(rows=10, steps=40))
