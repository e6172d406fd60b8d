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
from lopt.experiment import cli, cli_probe
from lopt.experiment.probes.estimators import probe_estimators
from lopt.experiment.probes.estimators_report import estimators_report
from lopt.experiment.probes.slices import loss_slices
from lopt.experiment.probes.subject import default_truncation, subject, task_names
from lopt.experiment.settings import ProbeSettings

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
    settings = ProbeSettings(truncation=2, sigma=0.01, samples=1024, at_once=256)
    only = ("Truncated", "ForwardMode", "ES", "PES", "NRES")
    return probe_estimators(inner, theta, jax.random.key(1), settings, only)


def test_it_finds_who_is_biased_and_who_is_not(probed):
    biased = {row.name for row in probed.rows if row.biased}
    assert biased == {"TruncatedBackprop", "TruncatedES"}
    assert all(row.biased is not None for row in probed.rows)
    by_name = {row.name: row for row in probed.rows}
    assert by_name["TruncatedBackprop"].along < 0.9
    for name in ("full backprop", "ForwardMode (all)", "ES", "PES", "NRES"):
        row = by_name[name]
        assert abs(row.along - 1) < 4 * row.along_error, name
        assert row.along_error < 0.2, name


def test_forward_mode_with_all_directions_is_as_quiet_as_backpropagation(probed):
    by_name = {row.name: row for row in probed.rows}
    full = by_name["full backprop"].variance
    np.testing.assert_allclose(by_name["ForwardMode (all)"].variance, full, rtol=0.3)
    assert by_name["ES"].variance > full
    assert by_name["ES, one arm"].variance > 10 * by_name["ES"].variance


def test_costs_and_budget_are_said(probed):
    assert probed.budget == 2 * 8 * 8
    assert probed.weights == 1
    for row in probed.rows:
        assert row.seconds > 0
        assert row.compile_seconds > 0
        assert row.memory is None or row.memory >= 0
        assert row.dropped == 0


def test_the_variance_of_each_weight_is_listed(key):
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0]), jnp.array([1.0, -1.0]), 0.1)
    inner = lopt.InnerTraining(task, lopt.LearnableAdam(0.05), 4)
    settings = ProbeSettings(truncation=2, particles=4, samples=8)
    rows = probe_estimators(inner, inner.learned.init(key), key, settings, ["PES"]).rows
    for row in rows:
        assert len(row.variances) == 4
        assert len(set(row.variances)) > 1
        np.testing.assert_allclose(np.mean(row.variances), row.variance, rtol=1e-3)


def test_of_ranks_and_searches_only_the_cost_is_said(key):
    settings = ProbeSettings(truncation=2, particles=4, samples=8)
    inner, only = noisy_quadratic(4), ("RankedES", "RandomSearch")
    _, *rows = probe_estimators(inner, inner.learned.init(key), key, settings, only).rows
    assert [row.name for row in rows] == list(only)
    for row in rows:
        assert (row.bias, row.variance, row.variances, row.signal_to_noise) == (None,) * 4
        assert row.seconds > 0
        assert row.at_once == 8


def test_a_truth_that_is_not_finite_is_said_to_be_none(key, capsys):
    inner = lopt.InnerTraining(Faulty(0.3), lopt.LearnableSGD(0.1), 4)
    theta, settings = inner.learned.init(key), ProbeSettings(truncation=2, particles=4, samples=8)
    probe = probe_estimators(inner, theta, key, settings, ["PES"])
    assert probe.truth_dropped > 0
    assert probe.truth_norm is None
    slices = loss_slices(inner, theta, key, (2,), points=3)
    report = estimators_report(probe, slices, {"name": "faulty"})
    report.show(Console())
    assert report.data["truth_dropped"] == probe.truth_dropped
    said = " ".join(capsys.readouterr().out.split())
    assert f"not finite in {probe.truth_dropped} of its samples" in said


def test_slices_of_a_loss_that_is_linear_in_theta(key):
    # The mean loss over n steps of the toy is theta (n - 1) / 2; theta itself is moved by z theta.
    slices = loss_slices(linear_toy(4), jnp.asarray(2.0), key, (3, 5, 5), points=5)
    assert slices.lengths == (3, 5)
    assert slices.surfaces is None
    for length, losses in zip(slices.lengths, slices.losses, strict=True):
        expected = 2 * (1 + slices.line) * (length - 1) / 2
        assert np.allclose(losses, expected) or np.allclose(losses[::-1], expected)


def test_slices_in_two_directions_agree_in_the_middle(key):
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0]), jnp.array([1.0, -1.0]))
    learned = lopt.adafactor_mlp()
    inner = lopt.InnerTraining(task, learned, 4, lopt.RampedLoss())
    theta = learned.init(key)
    slices = loss_slices(inner, theta, key, (2, 4), points=5, grid=3)
    assert slices.surfaces.shape == (2, 3, 3)
    np.testing.assert_allclose(slices.surfaces[:, 1, 1], slices.losses[:, 2], rtol=1e-6)
    np.testing.assert_allclose(slices.surfaces[:, 1, 2], slices.losses[:, 4], rtol=1e-6)
    episode_key = jax.random.split(key)[1]
    expected = inner.meta_loss(theta, episode_key)
    np.testing.assert_allclose(slices.losses[1, 2], expected, rtol=1e-6)


def test_what_is_not_finite_becomes_null(probed, tmp_path):
    slices = loss_slices(
        noisy_quadratic(4), {"learning_rate": jnp.asarray(9.0)}, jax.random.key(0), (200,)
    )
    assert not np.isfinite(slices.losses).all()
    estimators_report(probed, slices, {"name": "toy"}).save(tmp_path, "probe")
    text = (tmp_path / "probe.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    report = json.loads(text)
    assert None in report["slices"]["losses"][0]
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def run(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli_probe, "prepare_jax", lambda: None)
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
    assert "Wrote probe.json, probe.html, probe.png" in capsys.readouterr().out
    folder = tmp_path / "probes" / "tiny_recipe"
    report = json.loads((folder / "probe.json").read_text())
    assert report["settings"]["horizon"] == 8
    assert report["settings"]["truncation"] == 2
    names = [row["name"] for row in report["estimators"]]
    assert names == ["full backprop", "PES", "InverseVariance"]
    assert cli_probe._probe_folder(str(RECIPE), None, "estimators").name == "tiny_recipe-2"
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, *arguments, "--out", folder)
    assert "already holds a probe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such"], "There is no recipe or task 'no_such'"),
        (["no_such.py"], "no recipe file no_such.py"),
        (["Beale", "--set", "dim=3"], "Beale is a task"),
        (["Beale", "--horizon", "0"], "horizon=0"),
        (["Beale", "--truncation", "7"], "must divide"),
        (["Beale", "--sigma", "-1"], "sigma=-1"),
        (["Beale", "--particles", "3"], "particles=3 must be even"),
        (["Beale", "--samples", "2"], "samples=2"),
        (["Beale", "--directions", "0"], "directions=0"),
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
    assert {"Beale", "Rosenbrock", "QuadraticFamily"} <= set(task_names())
    for name in task_names():
        inner, theta = subject(name, horizon=3)
        assert inner.horizon == 3
        assert set(theta) == {"learning_rate", "b1", "b2", "eps"}


def test_weights_of_a_file_are_probed(tmp_path):
    learned = lopt.LearnableAdam(0.5)
    lopt.save(tmp_path / "w.safetensors", learned, learned.init(jax.random.key(0)))
    _, theta = subject("Beale", weights=tmp_path / "w.safetensors")
    np.testing.assert_allclose(theta["learning_rate"], np.log(0.5))


def test_a_recipes_ramped_loss_is_ramped_to_the_new_horizon():
    inner, _ = subject("digits", ["particles=2"], horizon=12)
    assert inner.objective == lopt.RampedLoss()
    assert [default_truncation(n) for n in (40, 8, 7, 2)] == [10, 2, 1, 1]


def test_a_probe_replaces_no_figure_of_a_run_and_wants_a_folder(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a run"):
        cli_probe._probe_folder("run", tmp_path, "symmetry")
    with pytest.raises(FileExistsError, match="is a file"):
        cli_probe._probe_folder("run", tmp_path / "run.json", "symmetry")
