"""`lopt sweep`: settings of a recipe, meta-trained alike."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lopt.experiment.report import measured
from lopt.experiment.runs import cluster
from lopt.experiment.runs.files import read_json
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.settings import CompareSettings, SweepSettings
from lopt.experiment.runs.sweep import _folder_name, grid, sweep

RECIPE = str(Path(__file__).with_name("tiny_recipe.py"))
# The recipe with a seed, which in a worker's process dies the first time that it begins.
SEEDED = """
import sys

@dataclasses.dataclass(frozen=True)
class Recipe(Recipe):
    seed: int = 0

    def build(self):
        died = Path(__file__).with_name("died")
        if "ray._private.workers.default_worker" in sys.modules or "default_worker" in sys.argv[0]:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), 9)
        return dataclasses.replace(super().build(), seed=self.seed)
"""

pytestmark = pytest.mark.standard_promotion  # Adam, as the outer optimizer


@pytest.fixture
def seeded(tmp_path):
    path = tmp_path / "seeded.py"
    code = (
        Path(RECIPE)
        .read_text()
        .replace("import optax", "import os\nfrom pathlib import Path\nimport optax")
    )
    path.write_text(code + SEEDED)
    return str(path)


def losses(folder):
    return {run.parent.name: Run(run.parent).log["meta_loss"] for run in folder.glob("*/run.json")}


def test_a_grid_has_all_combinations_and_brackets_and_quotes_stay_whole():
    points = grid(["depths=(1,2),(3,)", "name='a,b',c", "steps=4", "empty="])
    assert [tuple(point.values()) for point in points] == [
        (depths, name, "4", "") for depths in ("(1,2)", "(3,)") for name in ("'a,b'", "c")
    ]
    assert grid([]) == [{}]


def test_names_of_folders_are_safe_and_of_one_order():
    name = _folder_name({"seed": "0", "b": "(1,2)", "a": "x/y z"})
    assert name == "a=x%2Fy%20z,b=(1,2),seed=0"
    long = {_folder_name({"a": "x" * 300 + end}) for end in "12"}
    assert len(long) == 2
    assert max(map(len, long)) < 255


def test_a_sweep_has_a_row_for_each_setting_and_goes_on(tmp_path, seeded):
    fields = ("learning_rate=0.05,0.1", "truncation=2,4", "outer_steps=10")
    settings = SweepSettings(recipe=seeded, settings=fields, seeds=2)
    out = tmp_path / "out"
    report = sweep(out, settings)
    rows, found = report.parts[0].rows, losses(out)
    assert len(found) == 8
    assert [(row["learning_rate"], row["truncation"]) for row in rows] == [
        *(("0.05", "2"), ("0.05", "4"), ("0.1", "2"), ("0.1", "4"))
    ]
    for row in rows:
        rate, truncation = row["learning_rate"], row["truncation"]
        name = f"learning_rate={rate},outer_steps=10,truncation={truncation},seed="
        logs = [found[f"{name}{seed}"] for seed in range(2)]
        assert not np.array_equal(*logs)
        assert row["outer loss at first"] == measured([log[0] for log in logs])
        assert row["outer loss at the end"] == measured([log[-1] for log in logs])
        assert row["weights"] == 1
        assert "dropped particles" not in row
        config = Run(out / f"{name}1").config["settings"]
        assert (config["learning_rate"], config["seed"]) == (float(rate), 1)
    # What is done is not trained again, what was stopped goes on, and a larger grid is begun.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    torn = out / "learning_rate=0.05,outer_steps=10,truncation=2,seed=0"
    (torn / "checkpoints" / "00000010.safetensors").unlink()
    more = dataclasses.replace(settings, settings=("outer_steps=10", "truncation=2,4,8", fields[0]))
    assert len(sweep(out, more).parts[0].rows) == 6
    again = losses(out)
    assert len(again) == 12
    for name, log in found.items():
        np.testing.assert_array_equal(again[name], log)
    lines = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert lines == {torn / "metrics.jsonl"}


def test_settings_may_be_of_different_lengths_and_lose_steps(tmp_path):
    settings = SweepSettings(recipe=RECIPE, settings=("outer_steps=4,8", "poison=False,True"))
    report = sweep(tmp_path, settings)
    rows = report.parts[0].rows
    logs = {run.parent.name: Run(run.parent).log for run in tmp_path.glob("*/run.json")}
    assert {len(log["finite"]) for log in logs.values()} == {4, 8}
    for row in rows:
        log = logs[f"outer_steps={row['outer_steps']},poison={row['poison']}"]
        assert row["skipped steps"] == sum(log["finite"] == 0)
        assert row["dropped particles"] == sum(log["dropped"])
        assert (row["skipped steps"] + row["dropped particles"] > 0) == (row["poison"] == "True")
    report.save(tmp_path)
    assert len(read_json(tmp_path / "report.json")["parts"][0]["rows"]) == 4


@pytest.mark.parametrize(
    ("fields", "seeds", "message"),
    [
        (("truncation=2,3",), 1, "^truncation=3: .*"),
        (("truncation=2,x",), 1, "truncation=x: --set truncation=x: 'x' is not a value like 2"),
        (("rate=1,2",), 1, "has no field 'rate'"),
        (("truncation",), 1, "write it as field=value"),
        (("truncation=2,,4",), 1, "truncation=2,,4 has a value that is empty or there twice"),
        (("truncation=2,2",), 1, "truncation=2,2 has a value that is empty or there twice"),
        (("own=True", "truncation=2", "truncation=4"), 1, "truncation is set twice"),
        (("truncation=2,4",), 3, "--seeds 3: the recipe .* has no field seed"),
        (("seed=2,4",), 3, "--seeds 3 and --set seed=2: give one of the two"),
        ((), 1, "nothing to sweep over; try --set outer_steps=100,200"),
    ],
)
def test_what_is_refused_is_so_before_anything_is_written(tmp_path, fields, seeds, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path, SweepSettings(recipe=RECIPE, settings=fields, seeds=seeds))
    assert not any(tmp_path.iterdir())


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--workers 0 must be at least 1"):
        SweepSettings(recipe=RECIPE, workers=0)
    with pytest.raises(ValueError, match="--ray auto goes with --workers"):
        CompareSettings(("small_mlp",), ray="auto")
    with pytest.raises(ValueError, match="--seeds 0 must be at least 1; try 1"):
        SweepSettings(recipe=RECIPE, seeds=0)


def test_a_run_of_other_code_is_not_gone_on_with(tmp_path, seeded):
    settings = SweepSettings(recipe=seeded, settings=("outer_steps=2",))
    sweep(tmp_path / "out", settings)
    Path(seeded).write_text(Path(seeded).read_text() + "\n")
    with pytest.raises(ValueError, match="seed=0 holds a run of other code or other settings"):
        sweep(tmp_path / "out", settings)


@pytest.mark.slow
def test_workers_give_the_same_numbers_also_if_one_dies(tmp_path, seeded):
    pytest.importorskip("ray")
    settings = SweepSettings(recipe=seeded, settings=("outer_steps=4,6", "truncation=2"))
    here, there = tmp_path / "here", tmp_path / "there"
    rows = sweep(here, settings).parts[0].rows
    assert not (tmp_path / "died").exists()
    found = sweep(there, dataclasses.replace(settings, workers=2)).parts[0].rows
    assert (tmp_path / "died").exists()
    for ours, theirs in zip(rows, found, strict=True):
        different = {key for key in ours if ours[key] != theirs[key]}
        assert different <= {"ms per outer step"}
    for name, log in losses(here).items():
        np.testing.assert_array_equal(losses(there)[name], log)


def test_workers_of_other_versions_are_refused(tmp_path, monkeypatch):
    own = cluster.here()
    monkeypatch.setattr(cluster, "here", lambda: own | {"lopt": "0.0"})
    with pytest.raises(ValueError, match=r"this machine has .* and the driver .*'lopt': '0.0'"):
        sweep(tmp_path, SweepSettings(RECIPE, ("outer_steps=2,4",), workers=1))


def test_a_recipe_of_several_architectures_has_its_table(tmp_path):
    path = tmp_path / "several.py"
    code = (
        Path(RECIPE)
        .read_text()
        .replace(
            "        inner =",
            "        others = [lopt.tasks.QuadraticFamily(size) for size in (2, 3)]\n"
            "        task = lopt.tasks.Mixture(others)\n        inner =",
        )
    )
    path.write_text(code)
    report = sweep(tmp_path / "out", SweepSettings(str(path), ("outer_steps=4,6",)))
    report.finish(tmp_path / "out", "report")
    (table,) = [
        one for one in read_json(tmp_path / "out" / "report.json")["parts"] if "table" in one
    ]
    assert [row["outer_steps"] for row in table["rows"]] == ["4", "6"]
