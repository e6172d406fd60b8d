"""Several seeds of meta-training side by side: each as if it were alone, and bands over all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

from lopt.experiment.evaluation.contestants import evaluate_run
from lopt.experiment.runs import files
from lopt.experiment.runs import seeds as s
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.settings import TrainSettings
from lopt.experiment.runs.train import train

pytestmark = pytest.mark.standard_promotion
RECIPE = '''
"""A recipe with a seed, on which its tasks depend as well."""

import dataclasses
import jax, optax, lopt

@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe with a seed."""
    outer_steps: int = 12
    seed: int = 0
    varied: bool = False
    evaluate: bool = False
    def build(self):
        at = jax.random.normal(jax.random.key(self.seed if self.varied else 0), (3,))
        task = lopt.tasks.Quadratic(at**2 + 0.1, at, noise_scale=0.1)
        inner = lopt.InnerTraining(task, lopt.learned.small_mlp(), 8)
        meta = lopt.Mean(lopt.PES(inner, 2, 0.05), 4)
        evaluations = [lopt.Evaluation("quadratic", task, 10)] * self.evaluate
        return lopt.Experiment(
            inner.learned, meta, optax.adam(0.01), self.outer_steps, tuple(evaluations),
            seed=self.seed, steps_per_chunk=2,
        )
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "seeded.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize("varied", [False, True])
def test_each_seed_is_trained_as_if_alone(tmp_path, recipe, varied):
    settings = [f"varied={varied}"]
    runs = s.create(tmp_path / "all", recipe, settings, (), 3)
    s.train_seeds(runs)
    for seed, run in enumerate(runs):
        alone = Run.create(tmp_path / f"alone-{seed}", recipe, [*settings, f"seed={seed}"])
        theta = train(alone, show_progress=False)
        np.testing.assert_allclose(run.log["meta_loss"], alone.log["meta_loss"], rtol=1e-5)
        assert eqx.tree_equal(run.theta, theta, rtol=1e-4, atol=1e-6)
    losses = [tuple(run.log["meta_loss"]) for run in runs]
    assert len(set(losses)) == 3


def test_stopped_and_resumed_nothing_changes(tmp_path, recipe):
    whole = s.create(tmp_path / "whole", recipe, (), (), 2)
    s.train_seeds(whole)
    parts = s.create(tmp_path / "parts", recipe, (), (), 2)
    with pytest.raises(KeyboardInterrupt):
        s.train_seeds(parts, stop=lambda: 15)
    # What a killed process may leave behind: one run is a checkpoint ahead.
    (tmp_path / "parts" / "seed-1" / "checkpoints" / "00000002.safetensors").unlink()
    (tmp_path / "parts" / "seed-1" / "metrics.jsonl").unlink()
    again = s.open_all(tmp_path / "parts")
    s.train_seeds(again)
    for one, other in zip(whole, again, strict=True):
        assert one.log["meta_loss"].tolist() == other.log["meta_loss"].tolist()
        assert eqx.tree_equal(one.theta, other.theta)


@pytest.mark.slow
def test_as_many_as_memory_allows_are_side_by_side(tmp_path, recipe, monkeypatch):
    sizes, made = [], s.SideBySide.__init__
    need = s.SideBySide([run.experiment for run in s.create(tmp_path / "a", recipe, (), (), 4)])
    monkeypatch.setattr(s, "free_memory", lambda: need.memory * 0.75)
    monkeypatch.setattr(
        s.SideBySide, "__init__", lambda self, e: (sizes.append(len(e)), made(self, e))[1]
    )
    runs = s.open_all(tmp_path / "a")
    s.train_seeds(runs)
    assert sizes == [4, 2, 2]
    assert [run.log["meta_loss"].size for run in runs] == [12] * 4


def test_memory_is_that_of_the_machine_and_of_the_group(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(s, "ROOT", tmp_path)
    assert s.free_memory() == np.inf
    files = {
        "proc/meminfo": "MemTotal:  900 kB\nMemAvailable:   8 kB\n",
        "proc/self/cgroup": "5:cpu:/\n4:memory:/job/step\n0::/job\n",
        "sys/fs/cgroup/memory.max": "7000\n",
        "sys/fs/cgroup/memory.current": "3000\n",
        "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 500\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/job/memory.stat": "inactive_file 0\n",
        "sys/fs/cgroup/job/memory.current": "1000\n",
        "sys/fs/cgroup/job/memory.max": "3000\n",
        "sys/fs/cgroup/memory/job/step/memory.stat": "total_inactive_file 100\n",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 100\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "200\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "300\n",
    }
    found = []
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found.append(s.free_memory())
    assert found == [8192.0] * 4 + [4500.0] * 4 + [2000.0] * 4 + [200.0]
    # Devices of a CPU have one memory.
    runs = s.create(tmp_path / "all", recipe, (), (), 2)
    every = s.SideBySide([run.experiment for run in runs])
    size, mesh = every.memory, s.device_mesh(1)
    monkeypatch.setattr(every, "_mesh", mesh)
    assert size == every.memory * s.device_mesh().size


def test_the_others_are_made_of_the_code_of_the_first(tmp_path, recipe):
    s.create(tmp_path / "all", recipe, (), (), 2)
    second = tmp_path / "all" / "seed-1"
    code, own = Path(recipe).read_text(), files.read_json(second / "run.json", sealed=True)
    shutil.rmtree(second)
    Path(recipe).write_text(code.replace("adam(0.01)", "adam(0.02)"))
    _, other = s.open_all(tmp_path / "all")
    assert other.config["recipe_sha256"] == own["recipe_sha256"]
    assert (second / "recipe.py").read_text() == code


def test_a_folder_of_seeds_is_not_one_run(tmp_path, recipe):
    s.create(tmp_path / "all", recipe, (), (), 2)
    with pytest.raises(FileNotFoundError, match=r"give that of one, such as .*all/seed-0\."):
        Run(tmp_path / "all")


@pytest.mark.slow
def test_what_a_function_encloses_is_each_seeds_own(tmp_path, recipe):
    path = tmp_path / "closures.py"
    path.write_text(Path(recipe).read_text().replace("adam(0.01)", "adam(0.01 * (1 + self.seed))"))
    runs = s.create(tmp_path / "all", str(path), (), (), 2)
    s.train_seeds(runs)
    alone = Run.create(tmp_path / "alone", str(path), ["seed=1"])
    train(alone, show_progress=False)
    np.testing.assert_allclose(runs[1].log["meta_loss"], alone.log["meta_loss"], rtol=1e-5)
    assert eqx.tree_equal(runs[1].theta, alone.theta, rtol=1e-4, atol=1e-6)


def test_seeds_at_different_steps_lose_nothing(tmp_path, recipe):
    one, other = s.create(tmp_path / "all", recipe, (), (), 2)
    train(one, show_progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(other, show_progress=False, stop=lambda: 15)
    lines = one.log["meta_loss"].tolist()
    with pytest.raises(ValueError, match="no checkpoint of the same outer step"):
        s.train_seeds(s.open_all(tmp_path / "all"))
    assert one.log["meta_loss"].tolist() == lines


@pytest.mark.slow
def test_reports_have_bands_over_seeds(tmp_path, recipe):
    runs = s.create(tmp_path / "all", recipe, ["evaluate=True"], (), 2)
    s.train_seeds(runs)
    report = evaluate_run(*runs)
    report.finish(tmp_path / "all", "report")
    found = json.loads((tmp_path / "all" / "report.json").read_text())
    title = "2 seeds of meta-training: mean and standard error"
    (table,) = [part for part in found["parts"] if part.get("table") == title]
    (row,) = table["rows"]
    rows = found["evaluations"][0]["rows"]
    ones = [np.mean(r["final_losses"]) for r in rows if r["optimizer"].startswith("seed-")][::2]
    assert row["training loss"]["mean"] == pytest.approx(np.mean(ones))
    error = np.std(ones, ddof=1) / np.sqrt(2)
    assert row["training loss"]["error"] == pytest.approx(error)


@pytest.mark.slow
def test_the_command_line(tmp_path, recipe):
    words = ["train", recipe, "--seeds", "2", "--run", str(tmp_path / "run")]
    lopt = [sys.executable, "-m", "lopt.experiment.cli"]
    subprocess.run([*lopt, *words], check=True)
    longer = ["train", "--resume", str(tmp_path / "run"), "--set", "outer_steps=14"]
    subprocess.run([*lopt, *longer], check=True)
    runs = s.open_all(tmp_path / "run", trust=True)
    assert [run.log["meta_loss"].size for run in runs] == [14, 14]
    again = subprocess.run([*lopt, *words], capture_output=True, text=True)
    assert again.returncode == 2
    assert "already holds" in again.stderr


def test_what_makes_no_sense_is_refused(tmp_path):
    tiny = str(Path(__file__).parent / "tiny_recipe.py")
    with pytest.raises(ValueError, match="has no field seed"):
        s.create(tmp_path / "run", tiny, (), (), 2)
    with pytest.raises(ValueError, match="give one of them"):
        TrainSettings("digits", seeds=2, workers=2)
    with pytest.raises(ValueError, match="--seeds 0 must be at least 1"):
        TrainSettings("digits", seeds=0)
    assert not (tmp_path / "run").exists()
