"""lopt distill, lopt tune and lopt train --from, from the command line to the files."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.experiment import cli
from lopt.experiment.distill import check_settings, odd_columns, searches_of
from lopt.experiment.runs.files import read_json, write_json
from lopt.experiment.runs.registry import build
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train as meta_train
from lopt.experiment.settings import DistillSettings
from lopt.symbolic.serial import from_json

TINY = ("optimizer=small_rnnprop", "dataset=digits", "outer_steps=2", "horizon=20")
TINY += ("truncation=10", "particles=1", "hidden=(6,)")
ARGUMENTS = ("--rows", "900", "--steps", "30", "--history", "1", "--seeds", "1")
ARGUMENTS += ("--search", "template", "--search-rows", "200", "--also", "time")

# Optax's Adam, in baselines and outside.
pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with jax.numpy_dtype_promotion("standard"):
        meta_train(Run.create(folder, "rnnprop", TINY), show_progress=False)
    return folder


def distil(run):
    """Runs lopt distill in a process of its own, without the type checks of tests."""
    command = [sys.executable, "-m", "lopt.experiment.cli", "distill", str(run), *ARGUMENTS]
    environment = os.environ | {"LOPT_CACHE_DIR": str(run.parent / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distilled(run):
    assert "R2" in distil(run)
    return run / "distilled"


def the_report_is_whole_and_strict_json(distilled):
    def refuse(name):
        raise AssertionError(name)

    report = json.loads((distilled / "report.json").read_text(), parse_constant=refuse)
    assert report["table"]["output"] == "output"
    tables = {part["table"]: part["rows"] for part in report["parts"] if "table" in part}
    front, (equation, black_box) = tables["Front: R2 against length"], tables["R2"]
    chosen = front[report["chosen"]]
    assert len(front) == len(report["expressions"])
    assert from_json(report["expressions"][report["chosen"]]).complexity == chosen["nodes"]
    assert all(one["weight x variable as one"] <= one["nodes"] for one in front)
    for name in ("train", "validation", "test"):
        assert equation[name] == pytest.approx(chosen[name], abs=1e-9)
        assert black_box[name] <= 1
    roll_outs = [rows for rows in tables.values() if "x network" in rows[0]]
    assert len(roll_outs) == 3
    assert {"learned", "equation", "Adam", "momentum"} <= {row["optimizer"] for row in roll_outs[0]}
    (latex,) = [part["latex"] for part in report["parts"] if "latex" in part]
    assert (distilled / "equation.tex").read_text().strip() == latex


def the_page_needs_no_other_file(distilled):
    page = (distilled / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("data:image/png;base64,") == 4
    assert page.count("data:image/svg+xml;base64,") == 1  # the equation, typeset


def the_equation_is_an_optimizer(distilled, key):
    learned, theta = lopt.load(distilled)
    expression = from_json(read_json(distilled / "equation.json"))
    np.testing.assert_allclose(theta["rule"]["constants"], expression.constants)
    optimizer = learned.optimizer(theta)
    params = {"w": jnp.ones(3)}
    updates, _ = optimizer.update({"w": jnp.ones(3)}, optimizer.init(params), params)
    assert float(jnp.abs(updates["w"]).max()) > 0


@pytest.mark.slow
def test_a_second_start_uses_what_was_found(run, distilled):
    before = (distilled / "report.json").read_text()
    times = {path: path.stat().st_mtime_ns for path in distilled.rglob("*.npz")}
    times |= {path: path.stat().st_mtime_ns for path in (distilled / "searches").rglob("*.json")}
    distil(run)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (distilled / "report.json").read_text() == before


def other_settings_need_another_folder(run):
    arguments = ["300" if word == "200" else word for word in ARGUMENTS]
    with pytest.raises(ValueError, match="another search_rows"):
        cli._dispatch(["distill", str(run), *arguments])
    with pytest.raises(ValueError, match="another columns, features"):
        cli._dispatch(["distill", str(run), *ARGUMENTS, "--columns", "time"])


def a_setting_that_there_was_not_yet_is_its_default(distilled, tmp_path):
    asked = read_json(distilled / "distill.json", sealed=True)
    older = {name: value for name, value in asked.items() if name not in ("decays", "columns")}
    write_json(tmp_path / "distill.json", older, sealed=True)
    check_settings(tmp_path, asked | {"longest": 25, "digits": 4})


def test_averages_of_odd_features_are_odd():
    features = ("m", "average_0.9_m", "v", "average_0.9_v", "m[t-1]", "average_0.5_m")
    assert odd_columns(("m",), features) == ("m", "average_0.9_m", "average_0.5_m")
    assert odd_columns((), features) == ()
    assert odd_columns(("average_0.9_v",), features) == ("average_0.9_v",)


def a_distillation_is_of_one_network(run, distilled, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    learned, theta = lopt.load(other)
    lopt.save(other / "weights.safetensors", learned, jax.tree.map(lambda w: 0.5 * w, theta))
    with pytest.raises(ValueError, match="another weights"):
        cli._dispatch(["distill", str(other), *ARGUMENTS])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--odd", "velocity"], "velocity; there are"),
        (["--history", "30", "--steps", "30"], "looks back"),
        (["--lags", "31", "--steps", "30"], "lags=31"),
        (["--lags", "20", "--also", "time"], "also=.*lags=20"),
        (["--lags", "20", "--decays", "0.9"], "decays=.*lags=20"),
        (["--decays", "1"], "decay 1.0 must be above 0 and below 1"),
        (["--decays", "0.9", "0.90"], "decay 0.9 is there twice"),
        (["--columns", "speed"], "no column speed; there are"),
    ],
)
def test_mistakes_leave_no_folder_behind(run, tmp_path, words, match):
    with pytest.raises(ValueError, match=match):
        cli._dispatch(["distill", str(run), *words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_constant_is_chosen_by_nobody(run, distilled):
    with pytest.raises(ValueError, match="is the constant"):
        cli._dispatch(["distill", str(run), *ARGUMENTS, "--longest", "1"])


def test_searches_that_are_not_installed_are_left_out_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoperon.sklearn", None)
    assert list(searches_of(DistillSettings(), tmp_path)) == ["template"]
    with pytest.raises(ImportError, match=r"lopt\[symbolic\]"):
        searches_of(DistillSettings(search=("operon",)), tmp_path)


def test_what_cannot_be_distilled_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        cli._dispatch(["distill", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="no_such"):
        cli._dispatch(["distill", str(run), "--search", "no_such", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def the_rule_is_tuned_on_a_convolutional_network(distilled, tmp_path):
    tuned = tmp_path / "tuned"
    settings = ("outer_steps=2", "horizon=4", "truncation=2", "particles=1", "seeds=0")
    words = [word for setting in settings for word in ("--set", setting)]
    cli._dispatch(["tune", str(distilled), "--task", "digits_conv", *words, "--run", str(tuned)])
    _, before = lopt.load(distilled)
    _, after = lopt.load(tuned)
    assert set(after) == {"learned", "log_multipliers"}
    changed = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), after["learned"]["rule"], before["rule"]
    )
    assert 0 < changed["constants"] < 0.1
    assert 0 < abs(float(after["log_multipliers"]["kernel"])) < 0.1
    with pytest.raises(FileExistsError, match="already holds a run"):
        cli._dispatch(["tune", str(distilled), *words, "--run", str(tuned)])


def test_a_run_is_distilled(run, distilled, key, tmp_path, subtests):
    """One test, as distilling takes a minute: no other worker does it again."""
    with subtests.test("the_report_is_whole_and_strict_json"):
        the_report_is_whole_and_strict_json(distilled)
    with subtests.test("the_page_needs_no_other_file"):
        the_page_needs_no_other_file(distilled)
    with subtests.test("the_equation_is_an_optimizer"):
        the_equation_is_an_optimizer(distilled, key)
    with subtests.test("other_settings_need_another_folder"):
        other_settings_need_another_folder(run)
    with subtests.test("a_setting_that_there_was_not_yet_is_its_default"):
        a_setting_that_there_was_not_yet_is_its_default(distilled, tmp_path)
    with subtests.test("a_distillation_is_of_one_network"):
        a_distillation_is_of_one_network(run, distilled, tmp_path)
    with subtests.test("the_rule_is_tuned_on_a_convolutional_network"):
        the_rule_is_tuned_on_a_convolutional_network(distilled, tmp_path)


@pytest.mark.slow
def test_a_network_is_trained_on_on_another_task(run, tmp_path):
    words = ["--set", "outer_steps=1", "--set", "horizon=4", "--set", "truncation=2"]
    words += ["--set", "particles=1", "--set", "seeds=0", "--run", str(tmp_path / "on")]
    cli._dispatch(["train", "--from", str(run), "--task", "digits_resnet", *words])
    learned, after = lopt.load(tmp_path / "on")
    same, before = lopt.load(run)
    assert learned == same
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after, before)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01


def test_bad_transfers_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="go together"):
        cli._dispatch(["train", "--from", str(run)])
    with pytest.raises(ValueError, match="one of them"):
        cli._dispatch(["train", "digits", "--from", str(run), "--task", "digits_conv"])
    with pytest.raises(ValueError, match="no task 'digits_nothing'"):
        build("transfer", (f"start={run}", "task=digits_nothing"))
    with pytest.raises(ValueError, match="must name a run"):
        build("transfer")
    folder = tmp_path / "bad"
    with pytest.raises(ValueError, match="FileNotFoundError"):
        Run.create(folder, "transfer", ("start=nowhere.safetensors",))
    assert not folder.exists()
