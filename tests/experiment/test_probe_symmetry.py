"""Watching which symmetries a run's optimizer breaks: what must be zero is, and what must not."""

import json
import re
import shutil
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

from lopt.analysis.symmetry import symmetries
from lopt.experiment import cli
from lopt.experiment.probes import symmetry
from lopt.experiment.probes.symmetry import MEASURES, probe_symmetry
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import kept_thetas, train
from lopt.experiment.settings import SymmetrySettings

QUADRATIC = Path(__file__).with_name("tiny_recipe.py")
# The second layer of a perceptron with batch norm: scale holds but for an epsilon.
NETWORK = """
import dataclasses
import lopt, optax
from lopt.tasks import batch_norm_classification

@dataclasses.dataclass(frozen=True)
class Recipe:
    "A perceptron with batch norm."
    outer_steps: int = 4

    def build(self):
        task = batch_norm_classification(lopt.load_images("digits"), (3,), batch_size=16)
        learned = lopt.learnable(optax.adam, learning_rate=0.02)
        meta = lopt.Mean(lopt.PES(lopt.InnerTraining(task, learned, 8), 2, 0.05), 2)
        return lopt.Experiment(learned, meta, optax.adam(0.1), self.outer_steps, steps_per_chunk=2)
"""
SCALE = "scale of ['network'].layers[0].weight"
TRANSLATION = "translation of ['network'].layers[1].weight"
NORM = "norm rescale of ['gain'][0] and ['network'].layers[1].weight"

pytestmark = pytest.mark.standard_promotion


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)
    monkeypatch.setattr("sys.argv", ["lopt", "probe", "symmetry", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.py").write_text(NETWORK)
    train(Run.create(folder / "run", str(folder / "recipe.py")), show_progress=False)
    return folder / "run"


# All that needs one is as slow as it.
SLOW = pytest.param("slow", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[SLOW])
def written(run, tmp_path_factory):
    """What the command writes."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetry, "MOST_ROWS", 1)  # drawing takes as long as computing
        arguments = ("--steps", 12, "--seeds", 2, "--outer-steps", 4)
        command(patch, folder, run, *arguments, "--out", "results")
    return folder / "results"


@pytest.fixture(scope="module")
def report(written):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON.")

    return json.loads((written / "symmetry.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def figures(report):
    """The curves of each figure, by the title of the panel and by name."""
    return {part["figure"]: part for part in report["parts"] if "figure" in part}


@pytest.fixture(scope="module")
def normalised(report):
    """The mean normalised deviation, by symmetry and optimizer, of updates and gradients."""
    tables = [part for part in report["parts"] if "table" in part]
    return {
        table["table"].partition(" (")[0]: {
            row["optimizer"]: [row[w]["mean"] for w in ("normalised", "gradients")]
            for row in table["rows"]
        }
        for table in tables
        if "units" in table["table"]
    }


def test_the_page_needs_no_other_file(written):
    page = (written / "symmetry.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for name in ("losses", "deviations", "nearly", "meta_training", "stages"):
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sum(1 for _ in written.iterdir()) == 7
    assert re.search(r"[1-9] more panels are in the JSON", page)


def test_symmetries_that_an_epsilon_breaks_are_apart(report, figures, normalised):
    exactly, nearly = (set(figures[f"{name}.png"]["curves"]) for name in ("deviations", "nearly"))
    assert {f"{name}: {m}" for name in (TRANSLATION, NORM) for m in MEASURES} <= exactly
    assert nearly == {f"{SCALE}: {m}" for m in MEASURES}
    assert len(exactly) + len(nearly) == 3 * len(normalised)
    slope = report["slopes"]
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


def test_rules_are_compared_with_themselves_on_moved_gradients(report):
    parts = [part for part in report["parts"] if "rules" in part.get("table", "")]
    missed = {row["symmetry"]: row for row in parts[0]["rows"]}
    assert set(missed["odd"]) == {"symmetry", "learned", "SGD", "momentum", "Adam", "Lion"}
    assert max(missed["odd"][name] for name in ("learned", "SGD", "Adam", "Lion")) < 1e-6
    assert missed["left rotation"]["momentum"] < 1e-6 < 0.1 < missed["left rotation"]["Adam"]


def test_units_cancel_in_signed_sums_only(figures, normalised):
    for symmetry_name in normalised:
        figure = figures["nearly.png" if symmetry_name == SCALE else "deviations.png"]
        assert figure["steps"] == list(range(1, 13))
        curves = [figure["curves"][f"{symmetry_name}: {m}"] for m in MEASURES]
        for optimizer in ("learned", "SGD", "momentum", "Adam", "Lion", "gradients"):
            signed, absolute, cosine = (np.array(one[optimizer]["mean"]) for one in curves)
            assert len(signed) == 12
            assert (signed <= absolute * (1 + 1e-12)).all()
            assert (cosine >= 0).all()


def test_meta_training_is_done_again_as_it_was(run, figures):
    for measure in MEASURES:
        panel = figures["meta_training.png"]["curves"][f"{SCALE}: {measure}"]
        passing, kept = panel["learned"], panel["learned (kept)"]
        assert kept["steps"] == [0, 2, 4]
        # The weights of outer step 2, seen as meta-training passes by, and loaded.
        for one in ("mean", "error"):
            assert len(passing[one]) == 4
            np.testing.assert_allclose(passing[one][::2], kept[one][:2], rtol=1e-6)
        assert passing["mean"][3] != passing["mean"][0]
    opened = Run(run)
    latest = kept_thetas(opened.experiment, run)[4]
    assert latest["learning_rate"] == opened.theta["learning_rate"]
    title = f"{SCALE}: normalised"
    learned = figures["nearly.png"]["curves"][title]["learned"]
    assert learned == figures["stages.png"]["curves"][title]["outer step 4"]


@pytest.mark.slow
def test_what_there_is_none_of_is_left_out(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    less = Run(tmp_path / "run")
    assert list(kept_thetas(less.experiment, less.folder)) == [0]

    # No checkpoints, no outer steps done again, nothing that holds nearly.
    def exactly(task, key):
        found = symmetries(task, key)
        only = tuple(one for one in found.generators if one.name == TRANSLATION)
        return eqx.tree_at(lambda found: (found.generators, found.nearly), found, (only, ()))

    monkeypatch.setattr(symmetry, "symmetries", exactly)
    monkeypatch.setattr(symmetry, "REFERENCES", ("SGD",))
    report = probe_symmetry(less, SymmetrySettings(2, 1, 0, 0))
    files = report.save(tmp_path / "less")
    assert "nearly.png" not in files
    assert "meta_training.png" in files
    (figure,) = (
        part for part in report.json()["parts"] if part.get("figure") == "meta_training.png"
    )
    assert set(figure["curves"]) == {f"{TRANSLATION}: {m}" for m in MEASURES}
    assert all(set(one) == {"SGD", "learned (kept)"} for one in figure["curves"].values())


def test_bad_input_is_one_error_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    def said(*arguments):
        with pytest.raises(SystemExit) as left:
            command(monkeypatch, tmp_path, *arguments, "--out", "results")
        assert left.value.code == 2
        assert not (tmp_path / "results").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "--seeds 0" in said(run, "--seeds", 0)
    assert "--steps 1" in said(run, "--steps", 1)
    assert "--outer-steps -1" in said(run, "--outer-steps", -1)
    assert "--seed -1" in said(run, "--seed", -1)
    assert "holds no run" in said(tmp_path)
    quadratic = Run.create(tmp_path / "q", str(QUADRATIC), ["outer_steps=2"])
    train(quadratic, show_progress=False)
    assert "(Quadratic) have no continuous symmetry" in said(tmp_path / "q")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "symmetry.json").touch()
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, run, "--out", "results")
    assert "already holds such a report" in capsys.readouterr().err
