"""Watching a run's optimizer: what it finds where the truth is known, and what it writes."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.experiment import cli
from lopt.experiment.baselines import Tuned, tuned_baseline
from lopt.experiment.probes.dynamics import (
    MOST_CURVES,
    add_answers,
    add_features,
    recorded_trainings,
)
from lopt.experiment.probes.subject import REFERENCES
from lopt.experiment.recipes import l2o
from lopt.experiment.report import Figure, Report, Table
from lopt.experiment.runs import storage
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train

RECIPE = Path(__file__).with_name("tiny_recipe.py")
NETWORK = """
import dataclasses, lopt, optax

@dataclasses.dataclass
class Recipe:
    def build(self):
        family = lopt.tasks.QuadraticFamily(6, noise_scale=0.1)
        learned = lopt.small_mlp(hidden=(3,))
        meta = lopt.Mean(lopt.PES(lopt.InnerTraining(family, learned, 12), 4, 0.05), 2)
        return lopt.Experiment(learned, meta, optax.sgd(0.01), 1)
"""

pytestmark = pytest.mark.standard_promotion


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)
    monkeypatch.setattr("sys.argv", ["lopt", "probe", "dynamics", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one learned rate on a noisy quadratic: every answer is known."""
    folder = tmp_path_factory.mktemp("runs") / "learned_rate"
    train(Run.create(folder, str(RECIPE), ["outer_steps=2"]), show_progress=False)
    return folder


# All that needs one is as slow as it.
SLOW = pytest.param("slow", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[SLOW])
def written(run, tmp_path_factory):
    """What the command writes of it."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        command(patch, folder, run, "--steps", 60, "--seeds", 2)
    return run / "dynamics"


@pytest.fixture(scope="module")
def report(written):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON.")

    return json.loads((written / "dynamics.json").read_text(), parse_constant=refuse)


def rows_of(report, title):
    """Returns the rows of the table whose title begins so."""
    (found,) = [one["rows"] for one in report["parts"] if one.get("table", "").startswith(title)]
    return found


def figure_of(report, name):
    """Returns the numbers of a figure."""
    (found,) = [one for one in report["parts"] if one.get("figure") == f"{name}.png"]
    return found


def curves_of(report, name, title):
    """Returns the curves of a panel whose title begins so, by name."""
    panels = figure_of(report, name)["curves"]
    (found,) = [panel for full, panel in panels.items() if full.startswith(title)]
    return {name: one["mean"] for name, one in found.items()}


def left_out(report):
    """Returns the sentences on what was left out."""
    texts = [one.get("text", "") for one in report["parts"]]
    return [text for text in texts if text.startswith("Left out: ")]


@pytest.fixture(scope="module")
def by_name(report):
    """The rows of the table of trainings."""
    return {row["optimizer"]: row for row in rows_of(report, "Training")}


@pytest.fixture(scope="module")
def valley(report):
    return {row["optimizer"]: row for row in rows_of(report, "In the valley")}


def rate_of(row):
    return row["rate"]


def test_the_page_needs_no_other_file(written):
    page = (written / "dynamics.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    pictures = sorted(path.name for path in written.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pictures)
    histograms = {f"updates_{name}.png" for name in ("learned", *REFERENCES)}
    assert {*histograms, "courses.png", "alignment.png", "noise.png"} < set(pictures)
    for path in written.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_learned_sgd_is_sgd(run, report, by_name):
    rate = float(np.exp(storage.load(run)[1]["learning_rate"]))
    for effective in (
        curves_of(report, "courses", "Effective")["learned"],
        *curves_of(report, "alignment", "Effective").values(),
    ):
        np.testing.assert_allclose(effective, rate, rtol=1e-5)
    np.testing.assert_allclose(curves_of(report, "alignment", "Cosine")["SGD"], 1, rtol=1e-6)
    ratio = rate / rate_of(by_name["SGD"])
    relative = curves_of(report, "alignment", "Step relative")["SGD"]
    np.testing.assert_allclose(relative, ratio, rtol=1e-5)
    (lion,) = [
        row
        for row in rows_of(report, "The learned optimizer against")
        if row["reference"] == "Lion"
    ]
    assert lion["cosine, mean"]["mean"] < 0.999
    # A learned rate on a quadratic is worse than none of the tuned ones by accident only.
    assert by_name["SGD"]["mean loss"]["mean"] <= by_name["learned"]["mean loss"]["mean"]


def test_every_update_is_counted(report, by_name):
    for name in by_name:
        found = figure_of(report, f"updates_{name}")
        shown, counts = found["steps"], np.array(found["counts"])
        assert (shown[0], shown[-1], len(shown)) == (1, 60, 40)
        assert counts.shape == (40, 1, len(found["edges"]) + 1)
        assert (counts.sum(axis=-1) == 2 * report["settings"]["seeds"]).all()
        for title in ("Training loss", "Relative step"):
            assert len(curves_of(report, "courses", title)[name]) == 40
    # All of Lion's updates have one size.
    largest = figure_of(report, "updates_Lion")["largest"]
    np.testing.assert_allclose(largest, rate_of(by_name["Lion"]), rtol=1e-6)


def test_noise_of_updates_is_that_of_gradients_times_what_the_rule_makes_of_it(report, by_name):
    # The velocity that momentum begins a step with is the same for all batches.
    for name in ("SGD", "momentum"):
        noise = [row for row in rows_of(report, "Noise") if row["optimizer"] == name]
        assert [row["step"] for row in noise] == [0, 15, 30, 45, 60]
        for row in noise:
            expected = rate_of(by_name[name]) ** 2 * row["trace g"]
            np.testing.assert_allclose(row["trace u"], expected, rtol=1e-4)
            np.testing.assert_allclose(row["tail u"]["mean"], row["tail g"]["mean"], rtol=1e-3)
            assert 0 < row["top g"] <= row["trace g"]


def test_in_the_valley_odd_rules_keep_to_their_line(valley):
    for row in valley.values():
        assert row["|change of x+y|"] < 1e-5
        assert abs(row["|drift|"]) < 1e-5
        assert row["oddness"] < 1e-5
    # The curvature is 2: a rate of 10^-0.5 leaves 1 - 0.63 of it at each step.
    assert valley["SGD"]["rate"] == pytest.approx(10**-0.5)
    assert valley["SGD"]["final loss"] < 1e-12


def test_signals_are_answered(report, valley):
    for kind in ("impulse", "step", "sign flip"):
        answers = curves_of(report, "signals", kind)
        assert set(answers) == {"-gradient", "learned", *REFERENCES}
        for name in ("SGD", "learned"):
            np.testing.assert_allclose(answers[name], answers["-gradient"], rtol=1e-5, atol=1e-7)
    assert valley["SGD"]["impulse half after"] == 0
    assert valley["learned"]["impulse half after"] == 0
    # 1 - 0.9^7 is the first to exceed a half.
    assert valley["momentum"]["impulse half after"] == 6


def test_what_a_run_does_not_allow_is_left_out_and_said(report, written):
    (said,) = left_out(report)
    assert "response curves. Learnable is no lopt.Coordinatewise" in said
    assert said in (written / "dynamics.html").read_text()
    assert not (written / "responses.png").exists()


def test_nothing_is_written_over(run, written, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, written, run, "--out", written)
    assert "already holds such a report" in capsys.readouterr().err


def test_a_rule_is_asked_about_each_of_its_features(key):
    learned = lopt.small_mlp(hidden=(3,))
    family, theta = lopt.tasks.QuadraticFamily(6, noise_scale=0.1), learned.init(key)
    report = Report("", {"steps": 12, "rows": 8})
    add_features(report, lopt.InnerTraining(family, learned, 12), theta, key, key)
    (table,) = [part for part in report.parts if isinstance(part, Table)]
    (figure,) = [part for part in report.parts if isinstance(part, Figure)]
    names = [row["feature"] for row in table.rows]
    assert {"gradient", "parameter", "momentum_0.9"} < set(names) <= set(learned.features.names())
    swings = [row["swing"] for row in table.rows]
    assert swings == sorted(swings, reverse=True)
    assert list(figure.data["means"]) == list(figure.data["values"]) == names[:MOST_CURVES]
    for row in table.rows[:MOST_CURVES]:
        values, mean = (figure.data[part][row["feature"]] for part in ("values", "means"))
        assert (len(values), len(mean)) == (41, 41)
        assert values[0] < values[-1]
        assert row["range of the mean response"] == pytest.approx(np.ptp(mean))
    assert len(figure.png) > 1000


@pytest.mark.slow
def test_of_a_coordinatewise_run_nothing_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text(NETWORK)
    folder = tmp_path / "run"
    train(Run.create(folder, str(tmp_path / "recipe.py")), show_progress=False)
    command(monkeypatch, tmp_path, folder, "--seeds", 1, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "dynamics.json").read_text())
    assert (report["settings"]["steps"], left_out(report)) == (12, [])
    assert len(rows_of(report, "What moves")) > MOST_CURVES
    # Of one seed there is no error, and of a rule with biases an oddness defect.
    assert rows_of(report, "Training")[0]["mean loss"]["error"] is None
    assert rows_of(report, "In the valley")[0]["oddness"] > 1e-6
    page = (tmp_path / "out" / "dynamics.html").read_text()
    assert "Response to each feature" in page
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "out").glob("*.png")))


def test_the_best_rate_of_the_grid_is_found(key):
    # One step of rate 1 solves it.
    task = lopt.tasks.Quadratic(jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    found = tuned_baseline(task, jax.random.split(key, 2), 10, "SGD")
    np.testing.assert_allclose(found.values, [1.0])
    assert not found.at_edge
    steep = lopt.tasks.Quadratic(1e6 * jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    found = tuned_baseline(steep, jax.random.split(key, 2), 200, "SGD")
    assert found.values[0] < 1e-5


def test_where_batches_do_not_differ_there_is_no_noise(key):
    task = lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3))
    keys = jax.random.split(key, 2)
    recorded, noise = recorded_trainings(task, keys, (0, 2, 5), 4, optax.sgd(0.1), {})
    assert recorded["Training loss"].shape == (2, 5)
    assert noise.shape == (2, 3, 2, 3)
    assert np.isnan(noise).all()


def test_an_optimizer_for_other_tensors_says_so(key):
    rates = lopt.learned.per_tensor({"weight": 0.1, "bias": 0.01})
    learned = lopt.learnable(optax.sgd, learning_rate=rates)
    optimizers = {"learned": learned.optimizer(learned.init(key)), "SGD": optax.sgd(0.1)}
    report, script = (
        Report("", {"steps": 3, "starts": 2}),
        (jnp.ones((4, 5, 2)), jnp.ones(2), jnp.ones(5)),
    )
    add_answers(report, optimizers, {"SGD": Tuned((0.1,), False, 1)}, script)
    assert "Left out: valley and signals of learned" in report.parts[0].text
    assert "weight" in report.parts[0].text
    (table,) = [part for part in report.parts if isinstance(part, Table)]
    assert [row["optimizer"] for row in table.rows] == ["SGD"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "holds no run"),
        (["untrained"], "weights.safetensors"),
        (["untrained", "--seeds", "0"], "--seeds 0"),
        (["untrained", "--steps", "3"], "--steps 3"),
        (["untrained", "--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_are_said_in_a_line_before_anything_is_written(
    arguments, words, monkeypatch, tmp_path, capsys
):
    Run.create(tmp_path / "untrained", str(RECIPE))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["untrained"]


def test_the_optimizer_of_the_symmetry_study(key):
    experiment = l2o.Recipe(dataset="digits").build()
    leaves = jax.tree.leaves(experiment.learned.init(key))
    assert sum(leaf.size for leaf in leaves) == 5301
    assert experiment.evaluations[1].horizon == 1000
    assert experiment.meta.one.reduction.func is lopt.estimators.log_of_sum
    data = lopt.load_images("digits")
    for activation in (*l2o.ACTIVATIONS, l2o.BATCH_NORM):
        task = l2o.network_task(data, activation, (20,), 16)
        params = jax.eval_shape(task.init, key)
        expected = 64 * 20 + 20 + 20 * 10 + 10 + 40 * (activation == l2o.BATCH_NORM)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    with pytest.raises(ValueError, match="'tanh' must be one of sigmoid, relu, leaky_relu or"):
        l2o.Recipe("tanh", dataset="digits").build()
