"""The studies of short horizons: surfaces, descents, runs to the end, online, and the probe."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.surface import losses_after
from lopt.analysis.truncation import Knob
from lopt.experiment import cli
from lopt.experiment.probes.subject import subject
from lopt.experiment.probes.truncation import probe_truncation, resting, sweep, verdict
from lopt.experiment.settings import HorizonSettings
from lopt.experiment.studies.setting import (
    compute_surface,
    decayed_training,
    outer_adam,
    read_surface,
    theta_at,
    warm_task,
)
from lopt.experiment.studies.settings import SurfaceSettings
from lopt.experiment.studies.short_horizon import check_study
from lopt.experiment.trainings import mean_estimate

SETTINGS = SurfaceSettings("digits", (2, 6), 9, "grid", 2.0, batches=2)


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surface")
    compute_surface(SETTINGS, folder)
    return read_surface(folder), folder


def test_a_surface_holds_the_losses_of_its_places(surface):
    found, _ = surface
    task = warm_task("digits")
    key = jax.random.fold_in(jax.random.key(0), 1)
    for i in (0, 4):
        place = jnp.asarray(found.places[i], jnp.float32)
        inner = decayed_training(task, 6, SETTINGS.time_constant)
        alone = losses_after(inner, theta_at(*place), key, (2, 6), 2)
        np.testing.assert_allclose(found.losses[:, i], alone, rtol=1e-4)


def test_its_field_is_the_derivative_of_the_losses(surface):
    found, _ = surface
    task = warm_task("digits")
    key = jax.random.fold_in(jax.random.key(0), 1)
    place = found.field_places[30]
    inner = decayed_training(task, 6, SETTINGS.time_constant)

    def loss(place):
        theta = theta_at(*jnp.asarray(place))
        return np.asarray(losses_after(inner, theta, key, (2,), 2))

    for axis in (0, 1):
        step = 1e-4 * np.eye(2)[axis]
        slope = (loss(place + step) - loss(place - step)) / 2e-4
        np.testing.assert_allclose(found.field[:, 30, axis], slope, rtol=2e-3, atol=1e-6)


def test_a_killed_surface_goes_on_where_it_was(surface, tmp_path):
    found, folder = surface
    lines = (folder / "surface.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "surface_settings.json").write_text((folder / "surface_settings.json").read_text())
    (tmp_path / "surface.jsonl").write_text(lines[0] + lines[1][: len(lines[1]) // 2])
    assert read_surface(tmp_path) is None
    compute_surface(SETTINGS, tmp_path)
    again = read_surface(tmp_path)
    np.testing.assert_array_equal(again.losses, found.losses)
    np.testing.assert_array_equal(again.field, found.field)
    assert (tmp_path / "surface.jsonl").read_text() == "".join(lines)


def test_a_folder_holds_one_surface(surface, tmp_path):
    _, folder = surface
    other = SurfaceSettings("digits", (2, 5), 9, "grid", 2.0, batches=2)
    with pytest.raises(FileExistsError, match="other settings"):
        compute_surface(other, folder)
    (tmp_path / "surface_settings.json").write_text((folder / "surface_settings.json").read_text())
    with pytest.raises(FileExistsError, match="a surface of other settings"):
        compute_surface(other, tmp_path)
    lines = [json.loads(line) for line in (folder / "surface.jsonl").read_text().splitlines()]
    lines[0]["losses"].pop()
    (tmp_path / "surface.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="is not a whole surface"):
        read_surface(tmp_path)
    (tmp_path / "surface_settings.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_surface(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "mnits"}, "--dataset mnits must be one of digits, mnist"),
        ({"horizons": (0, 5)}, "--horizons 0 must be at least 1"),
        ({"horizons": ()}, "--horizons must have a value"),
        ({"horizons": (5, 2)}, "must increase"),
        ({"points": 10}, "a square for a grid; try 9"),
        ({"points": 1, "sample": "random"}, "must be at least 4"),
        ({"sample": "sobol"}, "must be one of grid, random"),
        ({"time_constant": 0.0}, r"--time-constant 0.0 must be in \(0, inf\)"),
    ],
)
def test_surface_settings_out_of_range_are_refused(change, message):
    fields = {"dataset": "digits", "horizons": (2, 6), "points": 9, "sample": "grid"}
    with pytest.raises(ValueError, match=message):
        SurfaceSettings(**{**fields, "time_constant": 2.0, **change})


@pytest.mark.standard_promotion
def test_hyperparameters_stay_within_their_ranges():
    theta = theta_at(jnp.asarray(0.0), jnp.asarray(6.0))
    updates = theta_at(jnp.asarray(-30.0), jnp.asarray(30.0))
    optimizer = outer_adam(learning_rate=30.0)
    kept, _ = optimizer.update(jax.tree.map(jnp.negative, updates), optimizer.init(theta), theta)
    values = jax.tree.map(jnp.exp, jax.tree.map(jnp.add, theta, kept))["learning_rate"]
    np.testing.assert_allclose([values["initial"], values["power"]], [1e-4, 1e3], rtol=1e-6)


@pytest.fixture
def in_process(monkeypatch):
    """Commands leave JAX as the tests have set it up."""
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)


def tables(path):
    """Returns the rows of each table of a report."""
    return [part["rows"] for part in json.loads(path.read_text())["parts"] if "rows" in part]


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.usefixtures("in_process")
def test_the_whole_study_by_command(tmp_path, capsys):
    study = str(tmp_path)
    first = ["--dataset", "digits", "--out", study]
    cli._dispatch(["horizon", "surface", *first, "--horizons", "4", "12", "--points", "9"])
    descent = ["--horizons", "4", "--power", "1.0", "--num-meta-steps", "3"]
    cli._dispatch(["horizon", "smd", *first, *descent])
    cli._dispatch(["horizon", "best", *first, "--seeds", "2"])
    (rows,) = tables(tmp_path / "smd.json")
    assert [(row["horizon"], row["from"]) for row in rows] == [(4, "0.01, 1")]
    (rows,) = tables(tmp_path / "best.json")
    named = [row["chosen by"].split(", from")[0] for row in rows]
    assert named == ["surface, horizon 4", "surface, horizon 12", "descent, horizon 4"]
    online = ["--steps", "20", "--steps-per-update", "10", "--num-meta-steps", "2"]
    online += ["--learning-rate", "0.05", "--seeds", "2", "--look-ahead", "2"]
    cli._dispatch(["horizon", "online", *first, *online])
    (rows,) = tables(tmp_path / "online.json")
    named = [row["optimizer"].split(",")[0] for row in rows]
    assert named == ["online", "tuned schedule", "horizon 4"]
    assert all(np.isfinite(row["training loss"]["mean"]) for row in rows)
    for name in ("surface", "best", "online"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    # Started again, it finds everything done.
    cli._dispatch(["horizon", "online", *first, *online])
    capsys.readouterr()


def noisy_inner(horizon):
    task = lopt.tasks.Quadratic(jnp.array([0.02, 1.0]), jnp.array([10.0, 1.0]), 0.5)
    return lopt.InnerTraining(task, lopt.LearnableSGD(0.1), horizon)


def probe_of(horizon, **more):
    inner = noisy_inner(horizon)
    theta = inner.learned.init(jax.random.key(0))
    settings = HorizonSettings(**{"episodes": 6, "positions": 9, "seed": 1, **more})
    return probe_truncation("toy", settings, (inner, theta)).json()


def test_the_probe_finds_that_short_truncations_want_small_rates():
    knob, gradients, *_, figure = probe_of(60, truncations=(3, 12, 60))["parts"]
    assert knob["table"].startswith("learning_rate")
    assert set(figure["learning_rate"]) == {"logs", "losses", "slopes", "errors"}
    bias = [row["bias"] for row in gradients["rows"]]
    assert bias[-1] == 0
    assert bias[0] > bias[1] > 0.05
    # Noise and ill-conditioning: the shorter, the greedier (Wu et al. 2018, section 3).
    rests = [row["rests at"] for row in knob["rows"]]
    assert rests[0] < rests[1] < rests[2]
    assert all(row["where"] == "inside" for row in knob["rows"])


def test_the_slope_is_that_of_the_whole_gradient():
    inner, keys = noisy_inner(12), jax.random.split(jax.random.key(1), 6)
    theta = inner.learned.init(jax.random.key(0))
    direction = jax.tree.map(jnp.ones_like, theta)
    turned = dataclasses.replace(inner, learned=Knob(inner.learned, theta, direction))
    _, slopes = sweep(turned, (3, 12), np.zeros(1), keys)
    for i, length in enumerate((3, 12)):
        estimator = lopt.TruncatedBackprop(inner, length, stagger=False)
        count = 12 // length
        gradient = jax.jit(lambda key, e=estimator, n=count: mean_estimate((e, theta), key, n))
        expected = [gradient(key)[0] for key in keys]
        np.testing.assert_allclose(slopes[:, 0, i], expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ((-1, -1, -1, 1, 1), (np.exp(0.5), "inside")),
        ((-1, 1, 1, 1, 1), (np.exp(-1.5), "inside")),
        ((1, 1, 1, 1, 1), (np.exp(-2), "below")),
        ((-1, -1, -1, -1, np.nan), (np.exp(1), "above")),
        ((0, 0, 0, 0, 0), (np.nan, "nowhere")),
        ((-1, -1, np.nan, 1, 1), (np.nan, "diverged")),
    ],
)
def test_descent_rests_where_the_slope_turns(slopes, expected):
    found = resting(np.linspace(-2, 2, 5), np.asarray(slopes, float))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert found[1] == expected[1]


def test_the_verdict_names_truncation_knob_and_remedy():
    row = {"where": "inside", "best": 9.0}
    rows = [
        {**row, "truncation": 3, "off by": 0.1, "excess": 2.0},
        {**row, "truncation": 12, "off by": 0.99, "excess": 0.01},
        {**row, "truncation": 60, "off by": 1.0, "excess": 0.0},
    ]
    assert verdict({"rate": rows}, 0.1) == (
        "A truncation of 3 would make rate 10 times too small and the meta-loss 200% higher than "
        "it could be: use truncations of at least 12 of its 60 inner steps, or an estimator that "
        "is unbiased at any truncation, such as lopt.PES."
    )
    assert verdict({"rate": rows[1:]}, 0.1) == (
        "Truncations down to 12 of 60 inner steps cost at most 10% of meta-loss: short ones are "
        "safe here."
    )
    worse = [*rows[:2], {**rows[2], "excess": 4.0}]
    said = verdict({"rate": worse}, 0.1)
    assert "not even the gradient of all 60 steps" in said
    lost = [{**row, "where": "diverged", "excess": np.nan} for row in rows]
    said = verdict({"rate": lost}, 0.1)
    assert "diverges where rate stands" in said


def test_a_decay_is_turned_by_one_minus_it_and_never_below_zero():
    task = lopt.tasks.Quadratic(jnp.array([1.0]), jnp.array([1.0]), 0.1)
    learned = lopt.learnable(optax.sgd, learning_rate=0.01, momentum=0.9)
    inner = lopt.InnerTraining(task, learned, 6)
    settings = HorizonSettings(truncations=(3, 6), episodes=2, positions=5, seed=1)
    report = probe_truncation("toy", settings, (inner, learned.init(jax.random.key(0))))
    found = report.parts[-1].data
    assert set(found) == {"learning_rate", "1 - momentum"}
    most = {name: np.exp(max(one["logs"])) for name, one in found.items()}
    np.testing.assert_allclose(most["1 - momentum"], 10, rtol=1e-6)
    np.testing.assert_allclose(most["learning_rate"], 30, rtol=1e-6)


def test_a_probe_of_final_losses_measures_them():
    inner, _ = subject("horizon_smd", HorizonSettings(horizon=20))
    assert inner.horizon == 20


def test_studies_of_different_problems_do_not_mix(surface):
    _, folder = surface
    check_study(folder, "digits", 2.0)
    with pytest.raises(FileExistsError, match="is of digits with --time-constant 2"):
        check_study(folder, "digits", 7.0)
    with pytest.raises(FileExistsError, match="this is of mnist"):
        check_study(folder, "mnist", 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncations": (3, 30)}, "end with the horizon"),
        ({"truncations": (7, 60)}, "must increase, divide"),
        ({"reach": 1.0}, r"must be in \(1, inf\); try 30"),
        ({"positions": 8}, "must be odd; try 9"),
        ({"episodes": 1}, "at least 2"),
    ],
)
def test_a_probe_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        probe_of(60, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["horizon", "surface", "--dataset", "mnits"], "must be one of digits"),
        (["horizon", "online", "--steps", "250"], "try --steps 200"),
        (["horizon", "online", "--learning-rate", "5.0"], r"must be in \[0.0001, 1\]"),
        (["horizon", "online", "--learning-rate", "0.1", "0.1"], "is there twice"),
        (["horizon", "surface", "--batches", "0"], "--batches 0 must be at least 1; try 20"),
        (["horizon", "surface", "--seed", "-1"], "--seed -1 must be in"),
        (["horizon", "smd", "--learning-rate", "100.0"], r"must be in \[0.0001, 10\]"),
        (["horizon", "smd", "--meta-learning-rate", "-1"], "--meta-learning-rate -1.0 must be"),
        (["horizon", "smd", "--num-meta-steps", "0"], "--num-meta-steps 0 must be"),
        (["horizon", "best", "--out", "nowhere"], "holds no surface"),
        (["horizon", "smd", "--horizons", "0"], "horizon"),
        (["probe", "horizon", "Rosenbrok"], "There is no recipe or task"),
        (["probe", "horizon", "Rosenbrock", "--tolerance", "0"], "--tolerance"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_commands_refuse_what_makes_no_sense(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        cli._dispatch(arguments)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_command_writes_a_probe(tmp_path, capsys):
    arguments = ["probe", "horizon", "StyblinskiTang", "--horizon", "12"]
    arguments += ["--episodes", "2", "--positions", "3", "--out", str(tmp_path)]
    cli._dispatch(arguments)
    parts = json.loads((tmp_path / "horizon.json").read_text())["parts"]
    verdict = [part["text"] for part in parts if "text" in part][-1]
    assert verdict.split()[0] in ("A", "From", "Truncations")
    assert (tmp_path / "horizon.png").stat().st_size > 10_000
    assert verdict.split()[-1] in " ".join(capsys.readouterr().out.split())
    with pytest.raises(FileExistsError, match="already holds such a report"):
        cli._dispatch(arguments)


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.usefixtures("in_process")
def test_the_whole_table_of_the_noisy_quadratic_is_within_its_tolerances(tmp_path, capsys):
    cli._dispatch(["horizon", "quadratic", "--out", str(tmp_path)])
    (rows,) = tables(tmp_path / "quadratic.json")
    assert len(rows) > 50
    assert [row["quantity"] for row in rows if not row["within"]] == []
    assert len({row["quantity"] for row in rows}) == len(rows)
    assert (tmp_path / "quadratic.png").stat().st_size > 50_000
    assert "63.858" in capsys.readouterr().out


@pytest.mark.slow
def test_every_data_set_has_its_network(tmp_path, monkeypatch):
    from test_datasets import CIFAR_FILES, cifar_row

    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for name in CIFAR_FILES:
        images = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        rows = [cifar_row(i % 10, image) for i, image in enumerate(images)]
        (folder / name).write_bytes(b"".join(rows))
    monkeypatch.setenv("LOPT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("lopt.experiment.studies.setting.WARM_STEPS", 1)
    task, key = warm_task("cifar10"), jax.random.key(0)
    params = task.init(key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 182_838
    inner, theta = decayed_training(task, 1, 10.0), theta_at(jnp.zeros(()), jnp.zeros(()))
    loss = losses_after(inner, theta, key, (1,), 1)
    assert np.isfinite(loss).all()
