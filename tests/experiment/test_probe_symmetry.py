"""Watching which symmetries a run's optimizer breaks: what must be zero is, and what must not."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

from lopt.experiment import cli, cli_probe
from lopt.experiment.probes import symmetry_report as probe_symmetry_report
from lopt.experiment.probes.symmetry import kept_thetas, probe_symmetry
from lopt.experiment.probes.symmetry_report import over_steps, symmetry_report
from lopt.experiment.runs import storage
from lopt.experiment.runs.train import create, reopen, train
from lopt.experiment.settings import SymmetrySettings

QUADRATIC = Path(__file__).with_name("tiny_recipe.py")
# The second layer of a perceptron with batch norm: scale holds but for an epsilon.
NETWORK = """
import lopt, optax
from lopt.tasks import batch_norm_classification

def experiment(outer_steps: int = 4):
    task = batch_norm_classification(lopt.load_images("digits"), (3,), batch_size=16)
    learned = lopt.learnable(optax.adam, learning_rate=0.02)
    meta = lopt.Mean(lopt.PES(lopt.InnerTraining(task, learned, 8), 2, 0.05), 2)
    return lopt.Experiment(learned, meta, optax.adam(0.1), outer_steps, steps_per_chunk=2)
"""
SCALE = "scale of ['network'].layers[0].weight"
TRANSLATION = "translation of ['network'].layers[1].weight"
NORM = "norm rescale of ['gain'][0] and ['network'].layers[1].weight"

pytestmark = pytest.mark.standard_promotion


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli_probe, "prepare_jax", lambda: None)
    monkeypatch.setattr("sys.argv", ["lopt", "probe", "symmetry", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.py").write_text(NETWORK)
    train(create(folder / "run", str(folder / "recipe.py")), folder / "run", show_progress=False)
    return folder / "run"


# All that needs one is as slow as it.
SLOW = pytest.param("slow", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[SLOW])
def result(run):
    return probe_symmetry(run, SymmetrySettings(12, 2, 0, 4), show_progress=False)


@pytest.fixture(scope="module")
def written(run, result, tmp_path_factory):
    """What the command writes of it; what it computes is computed once."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lopt.experiment.probes.symmetry.probe_symmetry", lambda *_: result)
        patch.setattr(probe_symmetry_report, "MOST_ROWS", 1)  # drawing takes as long as computing
        command(patch, folder, run, "--steps", 12, "--seeds", 2, "--outer-steps", 4)
    return folder / "probes" / "run"


@pytest.fixture(scope="module")
def report(written):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON.")

    return json.loads((written / "symmetry.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def normalised(report):
    """The mean normalised deviation, by symmetry and optimizer, of updates and gradients."""
    tables = [part for part in report["parts"] if "table" in part]
    return {
        one["name"]: {
            row["optimizer"]: [row[w]["mean"] for w in ("normalised", "gradients")]
            for table in tables
            if table["table"].startswith(f"{one['name']} (")
            for row in table["rows"]
        }
        for one in report["symmetries"]
    }


def test_the_page_needs_no_other_file(written):
    page = (written / "symmetry.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for name in ("losses", "deviations", "nearly", "meta_training", "stages"):
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sum(1 for _ in written.iterdir()) == 7
    assert re.search(r"[1-9] more are in symmetry\.json", page)


def test_symmetries_that_an_epsilon_breaks_are_apart(report):
    holds = {one["name"]: one["holds"] for one in report["symmetries"]}
    assert holds[TRANSLATION] == holds[NORM] == "exactly"
    assert [name for name, how in holds.items() if how == "nearly"] == [SCALE]
    slope = {one["name"]: one["slope"] for one in report["symmetries"]}
    assert slope[TRANSLATION] < 1e-14
    assert 1e-7 < slope[SCALE] < 1e-3


def test_gradients_and_sgd_keep_what_momentum_and_adam_break(normalised):
    for name, found in normalised.items():
        rounding = 1e-3 if name == SCALE else 1e-14
        assert all(gradients < rounding for _, gradients in found.values())
        assert found["SGD"][0] < rounding
        # Batch norm keeps the bias's gradient zero, so that Adam's updates are rounding, scaled.
        if not name.startswith("bias shift"):
            for optimizer in ("learned", "Adam", "Lion"):
                assert found[optimizer][0] > 1e-2
    # A sum of earlier gradients: constant tangents cannot tell it from one, others can.
    assert normalised[TRANSLATION]["momentum"][0] < 1e-13
    assert normalised[SCALE]["momentum"][0] > 1e-3


def test_units_cancel_in_signed_sums_only(report):
    for one in report["symmetries"]:
        for found in one["curves"].values():
            curves = found["updates"]
            signed, absolute = (np.array(curves[m]["mean"]) for m in ("signed", "absolute"))
            assert len(signed) == len(report["curve_steps"]) == 12
            assert (signed <= absolute * (1 + 1e-12)).all()
            assert (np.array(curves["normalised"]["mean"]) >= 0).all()


def test_meta_training_is_done_again_as_it_was(run, result):
    assert list(result.stages) == [0, 2, 4]
    # The weights of outer step 2, seen as meta-training passes by, and loaded from its checkpoint.
    for measure in ("signed", "absolute", "normalised"):
        passing = over_steps(result.replay, SCALE, measure, result.short)
        assert passing.shape == (4, 2)
        for number in (0, 2):
            kept = over_steps(result.stages[number], SCALE, measure, result.short)
            np.testing.assert_allclose(passing[number], kept, rtol=1e-6)
        assert (passing[3] != passing[0]).all()
    latest = kept_thetas(reopen(run), run)[4]
    assert latest["learning_rate"] == storage.load(run)[1]["learning_rate"]
    learned = result.optimizers[0].course.symmetries[SCALE].updates.normalised
    assert (learned == result.stages[4].symmetries[SCALE].updates.normalised).all()


def test_what_there_is_none_of_is_left_out(run, result, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert list(kept_thetas(reopen(run), tmp_path / "run")) == [0]
    # No checkpoints, no outer steps done again, nothing that holds nearly.
    found = eqx.tree_at(lambda found: found.nearly, result.found, ())
    stages = {0: result.stages[0]}
    less = dataclasses.replace(result, found=found, stages=stages, outer_steps=0, replay=None)
    report = symmetry_report(less, {"run": "less", "seeds": 2})
    assert all(one["again"] is None for one in report.data["symmetries"])
    assert all(one["holds"] == "exactly" for one in report.data["symmetries"])
    assert "nearly.png" not in report.save(tmp_path / "less")


def test_bad_input_is_one_error_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    def said(*arguments):
        with pytest.raises(SystemExit) as left:
            command(monkeypatch, tmp_path, *arguments, "--out", "results")
        assert left.value.code == 2
        assert not (tmp_path / "results").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "seeds=0" in said(run, "--seeds", 0)
    assert "steps=1" in said(run, "--steps", 1)
    assert "outer_steps=-1" in said(run, "--outer-steps", -1)
    assert "--seed -1" in said(run, "--seed", -1)
    assert "holds no run" in said(tmp_path)
    quadratic = create(tmp_path / "q", str(QUADRATIC), ["outer_steps=2"])
    train(quadratic, tmp_path / "q", show_progress=False)
    assert "(Quadratic) have no continuous symmetry" in said(tmp_path / "q")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "symmetry.json").touch()
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, run, "--out", "results")
    assert "already holds a probe" in capsys.readouterr().err
