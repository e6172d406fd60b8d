"""Probing: what it finds where the truth is known, what it writes, and what it refuses."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from toys import Faulty, linear_toy

import lopt
from lopt.experiment import cli
from lopt.experiment.data.named_tasks import without_data
from lopt.experiment.probes.estimators import default_truncation, loss_slices, probe_estimators
from lopt.experiment.probes.subject import subject
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.storage import save_weights
from lopt.experiment.settings import ProbeSettings, SymmetrySettings

RECIPE = Path(__file__).with_name("tiny_recipe.py")

# Adam.
pytestmark = pytest.mark.standard_promotion


def noisy_quadratic(horizon):
    """One learned rate on quadratics whose gradients are noisy."""
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0]), jnp.array([1.0, -1.0]), noise_scale=0.1)
    return lopt.InnerTraining(task, lopt.LearnableSGD(0.05), horizon)


@pytest.fixture(scope="module")
def probed():
    inner = noisy_quadratic(8)
    theta = inner.learned.init(jax.random.key(0))
    only = ("Truncated", "ForwardMode", "ES", "PES", "NRES")
    settings = ProbeSettings(truncation=2, sigma=0.01, samples=1024, at_once=256, only=only, seed=1)
    return probe_estimators("toy", settings, (inner, theta))


def rows_of(report):
    """Returns the rows of the table in a report, or in its JSON, by estimator."""
    (table,) = [part for part in report["parts"] if "rows" in part]
    return {row["estimator"]: row for row in table["rows"]}


def test_it_finds_who_is_biased_and_who_is_not(probed):
    rows = rows_of(probed.json())
    biased = {name for name, row in rows.items() if row["biased"]}
    assert biased == {"TruncatedBackprop", "TruncatedES"}
    assert all(row["biased"] is not None for row in rows.values())
    assert rows["TruncatedBackprop"]["along truth"]["mean"] < 0.9
    for name in ("full backprop", "ForwardMode (all)", "ES", "PES", "NRES"):
        along = rows[name]["along truth"]
        assert abs(along["mean"] - 1) < 4 * along["error"], name
        assert along["error"] < 0.2, name


def test_forward_mode_with_all_directions_is_as_quiet_as_backpropagation(probed):
    variance = {name: row["variance"] for name, row in rows_of(probed.json()).items()}
    full = variance["full backprop"]
    np.testing.assert_allclose(variance["ForwardMode (all)"], full, rtol=0.3)
    assert variance["ES"] > full
    assert variance["ES, one arm"] > 10 * variance["ES"]


def test_costs_and_budget_are_said(probed):
    said = probed.json()
    assert said["budget_of_inner_steps"] == 2 * 8 * 8
    assert said["weights"] == 1
    for row in rows_of(said).values():
        assert row["µs/step"] > 0
        assert row["compile s"] > 0
        assert row["MiB"] >= 0
        assert row["dropped"] == 0


def test_the_variance_of_each_weight_is_listed(key):
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0]), jnp.array([1.0, -1.0]), 0.1)
    inner = lopt.InnerTraining(task, lopt.LearnableAdam(0.05), 4)
    settings = ProbeSettings(truncation=2, particles=4, samples=8, only=("PES",))
    said = probe_estimators("toy", settings, (inner, inner.learned.init(key))).json()
    assert list(said["variances"]) == ["full backprop", "PES"]
    for name, variances in said["variances"].items():
        assert len(variances) == 4
        assert len(set(variances)) > 1
        np.testing.assert_allclose(np.mean(variances), rows_of(said)[name]["variance"], rtol=1e-3)


def test_of_several_architectures_it_probes_their_mean(key):
    still = [
        lopt.tasks.Quadratic(0.5 * ones, ones, 0.0, 0.0) for ones in (jnp.ones(1), jnp.ones(3))
    ]
    settings, norms = ProbeSettings(truncation=2, particles=4, samples=8, only=("PES",)), []
    for tasks in (*still, lopt.tasks.Mixture(still)):
        inner = lopt.InnerTraining(tasks, lopt.LearnableSGD(0.05), 4)
        said = probe_estimators("toy", settings, (inner, inner.learned.init(key))).json()
        norms.append(said["truth_norm"])
    assert norms[2] == pytest.approx(np.mean(norms[:2]))
    assert rows_of(said)["PES"]["samples"] == 4  # of two pairs each
    faulty = lopt.InnerTraining(lopt.tasks.Mixture([still[1], Faulty(0.3)]), inner.learned, 4)
    said = probe_estimators("faulty", settings, (faulty, inner.learned.init(key))).json()
    assert said["truth_dropped"] > 0


def test_of_ranks_and_searches_only_the_cost_is_said(key):
    only = ("RankedES", "RandomSearch")
    settings = ProbeSettings(truncation=2, particles=4, samples=8, only=only)
    inner = noisy_quadratic(4)
    said = probe_estimators("toy", settings, (inner, inner.learned.init(key))).json()
    _, *rows = rows_of(said).values()
    assert [row["estimator"] for row in rows] == list(only)
    for row in rows:
        assert (row["bias"], row["variance"], row["S/N"]) == (None,) * 3
        assert row["estimator"] not in said["variances"]
        assert row["µs/step"] > 0
        assert row["at once"] == 8


def test_a_truth_that_is_not_finite_is_said_to_be_none(key, capsys):
    inner = lopt.InnerTraining(Faulty(0.3), lopt.LearnableSGD(0.1), 4)
    settings = ProbeSettings(truncation=2, particles=4, samples=8, only=("PES",))
    report = probe_estimators("faulty", settings, (inner, inner.learned.init(key)))
    assert report.data["truth_dropped"] > 0
    assert "truth_norm" not in report.data
    assert {row["bias"] for row in rows_of(report.json()).values()} == {None}
    report.show(Console())
    said = " ".join(capsys.readouterr().out.split())
    assert f"not finite in {report.data['truth_dropped']} of its samples" in said


def test_slices_of_a_loss_that_is_linear_in_theta(key):
    # The mean loss over n steps of the toy is theta (n - 1) / 2; theta itself is moved by z theta.
    slices = loss_slices(linear_toy(4), jnp.asarray(2.0), key, (3, 5, 5))
    assert slices["lengths"].tolist() == [3, 5]
    assert slices["surfaces"] is None
    for length, losses in zip(slices["lengths"], slices["losses"], strict=True):
        expected = 2 * (1 + slices["line"]) * (length - 1) / 2
        assert np.allclose(losses, expected) or np.allclose(losses[::-1], expected)


def test_slices_in_two_directions_agree_in_the_middle(key):
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0]), jnp.array([1.0, -1.0]))
    learned = lopt.adafactor_mlp()
    inner = lopt.InnerTraining(task, learned, 4, lopt.RampedLoss())
    theta = learned.init(key)
    slices = loss_slices(inner, theta, key, (2, 4))
    losses, surfaces = slices["losses"], slices["surfaces"]
    assert surfaces.shape == (2, 21, 21)
    assert losses.shape == (2, 101)
    np.testing.assert_allclose(surfaces[:, 10, 10], losses[:, 50], rtol=1e-6)
    np.testing.assert_allclose(surfaces[:, 10, 20], losses[:, 100], rtol=1e-6)
    episode_key = jax.random.split(key)[1]
    expected = inner.meta_loss(theta, episode_key)
    np.testing.assert_allclose(losses[1, 50], expected, rtol=1e-6)


def test_what_is_not_finite_becomes_null(tmp_path, key):
    inner, theta = noisy_quadratic(200), {"learning_rate": jnp.asarray(9.0)}
    settings = ProbeSettings(truncation=100, particles=4, samples=8, only=("PES",))
    report = probe_estimators("toy", settings, (inner, theta))
    report.save(tmp_path, "estimators")
    text = (tmp_path / "estimators.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (slices,) = [part for part in json.loads(text)["parts"] if part.get("figure") == "slices.png"]
    assert None in slices["losses"][0]
    for name in ("estimators", "slices"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def run(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)
    monkeypatch.setattr("sys.argv", ["lopt", "probe", "estimators", *map(str, arguments)])
    cli.main()


def test_the_command_writes_a_probe_and_never_over_one(monkeypatch, tmp_path, capsys):
    arguments = (
        RECIPE,
        "--samples",
        16,
        "--only",
        "PES",
        "--only",
        "Inverse",
        "--set",
        "truncation=4",
    )
    run(monkeypatch, tmp_path, *arguments)
    assert "Wrote estimators.json, estimators.html, estimators.png" in capsys.readouterr().out
    folder = tmp_path / "probes" / "tiny_recipe" / "estimators"
    report = json.loads((folder / "estimators.json").read_text())
    assert report["settings"]["horizon"] == 8
    assert report["settings"]["truncation"] == 2
    assert list(rows_of(report)) == ["full backprop", "PES", "InverseVariance"]
    command = cli.COMMANDS["probe estimators"]
    second = cli._folder(command, str(RECIPE), ProbeSettings(), None)
    assert second == Path("probes") / "tiny_recipe" / "estimators-2"
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, *arguments, "--out", folder)
    assert "already holds such a report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such"], "There is no recipe or task 'no_such'"),
        (["no_such.py"], "no recipe file no_such.py"),
        (["Beale", "--set", "dim=3"], "Beale is a task"),
        (["Beale", "--horizon", "0"], "--horizon 0 must be at least 1"),
        (["Beale", "--truncation", "7"], "must divide"),
        (["Beale", "--sigma", "-1"], "sigma=-1"),
        (["Beale", "--particles", "3"], "--particles 3 must be at least 4; try 8"),
        (["Beale", "--samples", "2"], "--samples 2 must be at least 16"),
        (["Beale", "--directions", "0"], "--directions 0"),
        (["Beale", "--seed", "-1"], "--seed -1"),
        (["Beale", "--only", "PSE"], "no estimator 'PSE'"),
        (["Beale", "--weights", "nowhere"], "no file nowhere"),
    ],
)
def test_mistakes_are_said_in_a_line_before_anything_is_written(
    arguments, words, monkeypatch, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_task_named_can_be_built():
    assert {"Beale", "Rosenbrock", "QuadraticFamily"} <= set(without_data())
    for name in without_data():
        inner, theta = subject(name, ProbeSettings(horizon=3))
        assert inner.horizon == 3
        assert set(theta) == {"learning_rate", "b1", "b2", "eps"}


def test_weights_of_a_file_are_probed(tmp_path):
    learned = lopt.LearnableAdam(0.5)
    lopt.save(tmp_path / "w.safetensors", learned, learned.init(jax.random.key(0)))
    _, theta = subject("Beale", ProbeSettings(weights=tmp_path / "w.safetensors"))
    np.testing.assert_allclose(theta["learning_rate"], np.log(0.5))


def test_a_run_is_probed_at_its_weights(tmp_path):
    folder = tmp_path / "run"
    Run.create(folder, str(RECIPE))
    theta = {"learning_rate": jnp.asarray(-3.0, jnp.float32)}
    inner, initial = subject(str(RECIPE), ProbeSettings())
    save_weights(folder / "weights.safetensors", inner.learned, theta)
    found, at = subject(str(folder), ProbeSettings())
    assert found.horizon == inner.horizon == 8
    assert at["learning_rate"] == -3.0 != initial["learning_rate"]
    with pytest.raises(ValueError, match="is a run"):
        subject(str(folder), ProbeSettings(settings=("truncation=4",)))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        subject(str(tmp_path), ProbeSettings())


def test_a_recipes_ramped_loss_is_ramped_to_the_new_horizon():
    inner, _ = subject("digits", ProbeSettings(settings=("particles=2",), horizon=12))
    assert inner.objective == lopt.RampedLoss()
    assert [default_truncation(n) for n in (40, 8, 7, 2)] == [10, 2, 1, 1]


def test_a_probe_replaces_no_figure_of_a_run_and_wants_a_folder(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    command = cli.COMMANDS["probe symmetry"]
    with pytest.raises(FileExistsError, match="holds a run"):
        cli._folder(command, Path("run"), SymmetrySettings(), tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        cli._folder(command, Path("run"), SymmetrySettings(), tmp_path / "run.json")
