"""Runs as a user starts them: killed at any moment, resumed, and given bad input."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from lopt.estimators import InverseVariance, RampedHorizon
from lopt.experiment import cli
from lopt.experiment.runs import storage
from lopt.experiment.runs.files import locked, read_json, read_lines, write_json
from lopt.experiment.runs.registry import build, recipe_names
from lopt.experiment.runs.run import Run, printed
from lopt.experiment.runs.train import guarded, train
from lopt.learned import LearnableSGD

RECIPE = Path(__file__).with_name("tiny_recipe.py")

# Adam.
pytestmark = pytest.mark.standard_promotion


def command(*arguments):
    return [sys.executable, "-m", "lopt.experiment.cli", *map(str, arguments)]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"LOPT_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


def lopt(environment, *arguments):
    return subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, timeout=300
    )


def values(folder):
    """Everything that a run logs but the time that it took."""
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def test_a_run_killed_at_several_moments_continues_bit_for_bit(tmp_path, environment):
    whole = tmp_path / "whole"
    done = lopt(environment, "train", RECIPE, "--run", whole)
    assert done.returncode == 0, done.stderr
    assert len(values(whole)) == 60

    killed = tmp_path / "killed"
    arguments = ("train", RECIPE, "--run", killed)
    # As soon as the folder is a run; after some log lines; in the midst of writing checkpoints.
    moments = [
        lambda: (killed / "run.json").exists(),
        lambda: len(read_lines(killed / "metrics.jsonl")) >= 6,
        lambda: (
            len(read_lines(killed / "metrics.jsonl")) >= 20
            and any(killed.glob("checkpoints/.*.safetensors.*"))
        ),
        lambda: len(read_lines(killed / "metrics.jsonl")) >= 40,
    ]
    for moment in moments:
        process = subprocess.Popen(
            command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0), process.stderr.read()
        process.stderr.close()
        arguments = ("train", "--resume", killed)
    done = lopt(environment, *arguments)
    assert done.returncode == 0, done.stderr

    assert values(killed) == values(whole)
    ours, theirs = (
        safetensors.numpy.load_file(folder / "weights.safetensors") for folder in (killed, whole)
    )
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


@pytest.fixture
def run(tmp_path):
    """A finished run of ten outer steps."""
    folder = tmp_path / "run"
    train(Run.create(folder, str(RECIPE), ["outer_steps=10"]), show_progress=False)
    return folder


def test_a_run_keeps_its_last_checkpoints_and_its_weights(run):
    assert storage.checkpoints(run / "checkpoints") == [6, 8, 10]
    learned, theta = storage.load(run)
    assert learned == build(str(RECIPE)).learned
    assert set(theta) == {"learning_rate"}
    optimizer = storage.load_optimizer(run)
    assert optimizer.init({"w": jnp.zeros(2)}) is not None


def test_resuming_a_finished_run_changes_nothing(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train(Run(run), show_progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_torn_line_and_a_checkpoint_that_is_missing_are_passed_over(run):
    expected = values(run)
    (run / "checkpoints" / "00000010.safetensors").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "meta_')
    train(Run(run), show_progress=False)
    assert values(run) == expected


def test_weights_are_those_of_the_last_checkpoint_wherever_a_run_was_killed(run):
    """Also between the writing of the two."""
    weights = run / "weights.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    torn = run / "checkpoints" / ".00000010.safetensors.123"
    torn.write_bytes(b"half")
    train(Run(run), show_progress=False)
    assert weights.read_bytes() == expected
    assert not torn.exists()


@pytest.mark.parametrize("left", ["metrics.jsonl", "weights.safetensors", "checkpoints"])
def test_what_is_left_of_a_run_is_not_continued_as_another(run, left):
    for path in list(run.iterdir()):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileExistsError, match="already holds a run"):
        Run.create(run, str(RECIPE))


@pytest.mark.parametrize("text", ["[]", "{", '{"recipe": "digits"}', '{"step": 10}'])
@pytest.mark.parametrize("name", ["run.json", "checkpoints/00000010.safetensors"])
def test_damaged_text_is_named(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=Path(name).stem):
        train(Run(run), show_progress=False)


@pytest.fixture
def moved(tmp_path):
    """A finished run whose recipe was edited since, and which was moved to another folder."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.read_text())
    train(Run.create(tmp_path / "run", str(recipe), ["outer_steps=4"]), show_progress=False)
    recipe.write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n{RECIPE.read_text()}")
    return (tmp_path / "run").rename(tmp_path / "elsewhere")


def test_a_moved_run_has_brought_its_recipe_along(moved):
    assert Run(moved).experiment.outer_steps == 4
    train(Run(moved), show_progress=False)
    assert not (moved.parent / "executed").exists()
    (moved / "recipe.py").write_text(f"\n{RECIPE.read_text()}")
    with pytest.raises(ValueError, match="edited since"):
        Run(moved).check_unchanged()
    assert not (moved.parent / "executed").exists()


def test_code_that_was_not_run_on_this_machine_is_not_run(moved, monkeypatch, tmp_path):
    monkeypatch.setenv("LOPT_CACHE_DIR", str(tmp_path / "another machine"))
    with pytest.raises(ValueError, match="add --trust"):
        Run(moved).check_unchanged()
    assert Run(moved, trust=True).experiment.outer_steps == 4
    assert Run(moved).experiment.outer_steps == 4  # it was run now


def test_the_code_of_a_run_is_trusted_by_a_probe_that_is_told_to(moved, monkeypatch, capsys):
    monkeypatch.setenv("LOPT_CACHE_DIR", str(moved.parent / "another machine"))
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)
    probe = ["lopt", "probe", "estimators", str(moved), "--only", "nothing"]
    for trust, words in (([], "add --trust"), (["--trust"], "no estimator 'nothing'")):
        monkeypatch.setattr("sys.argv", [*probe, *trust])
        with pytest.raises(SystemExit):
            cli.main()
        assert words in capsys.readouterr().err


def test_a_run_is_lengthened(tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    train(Run.create(short, str(RECIPE), ["outer_steps=6"]), show_progress=False)
    train(Run.create(long, str(RECIPE), ["outer_steps=10"]), show_progress=False)
    train(Run(short).lengthen(["outer_steps=10"]), show_progress=False)
    assert values(short) == values(long)
    assert Run(short).config["settings"]["outer_steps"] == 10
    for settings, words in (
        (["outer_steps=4"], "has done 10"),
        (["truncation=4"], "nothing but outer_steps"),
        (["outer_steps=many"], "not a value"),
    ):
        with pytest.raises(ValueError, match=words):
            Run(short).lengthen(settings)
    assert Run(short).config["settings"]["outer_steps"] == 10


def test_a_run_says_what_differs_from_when_it_began(run):
    assert Run(run).changes() == []
    config = read_json(run / "run.json", sealed=True)
    made_with = config["made_with"] | {"jax": "0.1", "python": "3.9.1"}
    write_json(run / "run.json", config | {"made_with": made_with}, sealed=True)
    found = Run(run).changes()
    assert len(found) == 2
    assert found[0].startswith("python was 3.9.1 when the run began")


def test_a_run_of_the_data_found_then_is_usable_with_others(tmp_path, monkeypatch):
    """What a recipe chose by what it found is kept, whatever is found later."""
    monkeypatch.setenv("LOPT_DATA_DIR", str(tmp_path))
    settings = ["outer_steps=2", "particles=1", "hidden=(3,)", "truncation=2", "horizon=4"]
    run = Run.create(tmp_path / "run", "rnnprop", settings)
    assert run.config["settings"]["dataset"] == "digits"
    assert [one["name"] for one in run.config["data"]] == ["digits"]
    monkeypatch.setattr("lopt.experiment.data.datasets.available", lambda name: True)
    again = Run(run.folder)
    again.check_unchanged()
    assert again.changes() == []


def test_an_evaluation_that_cannot_work_is_refused_before_meta_training(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        RECIPE.read_text()
        .replace("optax.sgd(learning_rate)", "optax.set_to_zero().nothing")
        .replace("lopt.InnerTraining(task, learned, 8)", "lopt.InnerTraining(task, lopt.dm(), 8)")
    )
    settings = ["own=True", "evaluate=True"]
    with pytest.raises(ValueError, match="The evaluation 'digits' cannot work"):
        Run.create(tmp_path / "run", str(recipe), settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "source",
    ["def experiment(:", "import nothing_of_that_name", "experiment = 3", "raise KeyError"],
)
def test_a_recipe_that_fails_is_named(source, tmp_path):
    recipe = tmp_path / "broken.py"
    recipe.write_text(source)
    with pytest.raises(ValueError, match=r"broken\.py"):
        Run.create(tmp_path / "run", str(recipe))
    assert not (tmp_path / "run").exists()


def test_annotations_of_a_recipe_may_be_strings(tmp_path):
    recipe = tmp_path / "recipe.py"
    text = RECIPE.read_text()
    at = text.index("import dataclasses")
    recipe.write_text(f"{text[:at]}from __future__ import annotations\n{text[at:]}")
    assert build(str(recipe), ["outer_steps=3"]).outer_steps == 3


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/run cannot be made"):
        Run.create(tmp_path / "file" / "run", str(RECIPE))


def test_a_gradient_whose_norm_overflows_counts_as_not_finite():
    """Taken, it would leave an infinity in Adam's second moments, and no step would be any more."""
    optimizer = guarded(build(str(RECIPE)))
    theta = {"learning_rate": jnp.zeros((), jnp.float32)}
    state, sizes = optimizer.init(theta), []
    for size in (1.0, 1e25, 1.0):
        grads = {"learning_rate": jnp.asarray(size, jnp.float32)}
        updates, state = optimizer.update(grads, state, theta)
        sizes.append(abs(float(updates["learning_rate"])))
    assert int(state.total_notfinite) == 1
    assert sizes[1] == 0
    assert sizes[2] > 0.01


def test_a_norm_that_overflows_is_skipped_by_any_optimizer():
    experiment = dataclasses.replace(build(str(RECIPE)), outer_optimizer=optax.sgd(1e-3))
    optimizer, theta = guarded(experiment), {"w": jnp.zeros(2, jnp.float32)}
    updates, state = optimizer.update({"w": jnp.full(2, 1e25, jnp.float32)}, optimizer.init(theta))
    assert int(state.total_notfinite) == 1
    assert not updates["w"].any()


@pytest.mark.parametrize("size", [1e20, -1e38])
def test_a_square_that_overflows_freezes_nothing(size):
    """Of one weight the norm is |g|, compiled: finite, where Adam's second moment is not."""
    optimizer = guarded(build(str(RECIPE)))
    theta = {"learning_rate": jnp.zeros((), jnp.float32)}
    state, sizes = optimizer.init(theta), []
    update = jax.jit(optimizer.update)
    for g in (1.0, size, 1.0, 1.0):
        updates, state = update({"learning_rate": jnp.float32(g)}, state, theta)
        sizes.append(abs(float(updates["learning_rate"])))
    assert int(state.total_notfinite) == 1
    assert sizes[1] == 0
    assert min(sizes[2:]) > 0.01


def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.read_text().replace("adam(self.learning_rate)", 'adam(float("inf"))'))
    run = Run.create(tmp_path / "run", str(recipe), ["outer_steps=4"])
    train(run, show_progress=False)
    assert run.log["finite"].tolist() == [0] * 4
    assert run.theta == run.learned.init(jax.random.key(0))


def test_a_log_that_is_shorter_than_the_checkpoint_falls_back(run):
    expected = values(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:9]))
    train(Run(run), show_progress=False)
    assert values(run) == expected
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="holds 3 whole lines, and the first of the checkpoints"):
        train(Run(run), show_progress=False)


def test_files_of_others_stay(run):
    kept = [run / ".env", run / ".gitignore", run / "checkpoints" / ".note.1", run / ".folder"]
    for path in kept[:3]:
        path.write_text("mine")
    kept[3].mkdir()
    train(Run(run), show_progress=False)
    assert all(path.exists() for path in kept)


def test_a_run_is_written_by_one_process(run):
    expected = values(run)
    with locked(run), pytest.raises(FileExistsError, match="being trained by another process"):
        train(Run(run), show_progress=False)
    assert values(run) == expected
    with pytest.raises(FileExistsError):
        write_json(run / "run.json", {}, new=True)
    assert read_json(run / "run.json")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_run_as_ctrl_c_does(number, code, tmp_path, environment):
    folder = tmp_path / "run"
    arguments = ("train", RECIPE, "--set", "outer_steps=1000000", "--run", folder)
    process = subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, text=True
    )
    while not storage.checkpoints(folder / "checkpoints"):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == code
    assert f"Continue with: lopt train --resume {folder}" in out
    assert storage.checkpoints(folder / "checkpoints")


def test_a_damaged_checkpoint_is_named(run):
    path = run / "checkpoints" / "00000010.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000010\.safetensors is damaged.*resume from step 8"):
        train(Run(run), show_progress=False)
    path.write_bytes(content[:40])
    with pytest.raises(ValueError, match=r"00000010\.safetensors is damaged"):
        train(Run(run), show_progress=False)


def test_a_recipe_that_was_edited_is_refused(run):
    config = read_json(run / "run.json", sealed=True)
    write_json(
        run / "run.json", config | {"settings": config["settings"] | {"truncation": 4}}, sealed=True
    )
    with pytest.raises(ValueError, match="no longer gives the experiment"):
        train(Run(run), show_progress=False)


def test_a_loss_that_is_not_finite_is_skipped_with_its_momentum():
    """Without a single finite particle the gradient is zero, and the loss not a number."""
    optimizer = guarded(build(str(RECIPE)))
    theta = {"learning_rate": jnp.zeros((), jnp.float32)}
    state = optimizer.init(theta)
    one, zero = ({"learning_rate": jnp.asarray(g, jnp.float32)} for g in (1.0, 0.0))
    _, state = optimizer.update(one, state, theta, value=jnp.float32(1))
    updates, state = optimizer.update(zero, state, theta, value=jnp.float32(jnp.nan))
    assert int(state.total_notfinite) == 1
    assert updates["learning_rate"] == 0


def test_particles_that_are_not_finite_are_dropped_and_counted(tmp_path):
    folder = tmp_path / "run"
    settings = ["outer_steps=6", "poison=True"]
    run = Run.create(folder, str(RECIPE), settings)
    train(run, show_progress=False)
    lines = read_lines(folder / "metrics.jsonl")
    assert sum(line["dropped"] for line in lines) > 0
    bad = [line for line in lines if line["finite"] == 0]
    assert all(line["update_norm"] == 0 for line in bad)
    assert all(line["finite"] == 0 for line in lines if line["meta_loss"] is None)
    _, theta = storage.load(folder)
    assert np.isfinite(theta["learning_rate"])


class TestBadInput:
    """One clear line, exit status 2, nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["train", "nonsense"], ["nonsense", "digits"]),
            (["train", "nowhere/recipe.py"], ["nowhere/recipe.py"]),
            (["train", RECIPE, "--set", "size=3"], ["size", "outer_steps"]),
            (["train", RECIPE, "--set", "outer_steps"], ["field=value"]),
            (["train", RECIPE, "--set", "outer_steps=many"], ["many"]),
            (["train", RECIPE, "--set", "outer_steps=0"], ["outer_steps=0"]),
            (["train", RECIPE, "--set", "learning_rate=1e309"], ["learning_rate=1e309", "finite"]),
            (["train", RECIPE, "--set", "outer_steps=2.5"], ["float", "int"]),
            (["train", "digits", "--set", "estimator=guess"], ["guess", "pes"]),
            (["train", "digits", "--set", "weight_decay=-1"], ["weight_decay=-1"]),
            (["train", RECIPE, "--set", "truncation=3"], ["truncation=3", "try 2 or 4"]),
            (["train", "--resume", "nowhere"], ["nowhere"]),
            (["evaluate", "nowhere"], ["nowhere"]),
            (["train"], ["recipe"]),
        ],
    )
    def test_is_refused_before_anything_is_written(
        self, arguments, words, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["lopt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        for word in words:
            assert word in said
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_holds_a_run_is_not_overwritten(self, run):
        with pytest.raises(FileExistsError, match="--resume"):
            Run.create(run, str(RECIPE))


def test_recipes_that_come_along_can_be_built(tmp_path):
    assert "digits" in recipe_names()
    learned = LearnableSGD()
    storage.save(tmp_path / "start.safetensors", learned, learned.init(jax.random.key(0)))
    needed = {"transfer": (f"start={tmp_path / 'start.safetensors'}",)}
    for name in recipe_names():
        assert build(name, needed.get(name, ())).outer_steps > 0


def test_numbers_of_a_file_are_as_good_as_defaults():
    written = build("lopt-1", ("held_out=0.5", "depths=(1,)", "datasets=()"))
    assert printed(written) == printed(build("lopt-1", ("depths=(1,)", "datasets=()")))
    other = build("lopt-1", ("held_out=0.25", "depths=(1,)", "datasets=()"))
    assert printed(written) != printed(other)


RECIPES = {
    ("estimator=forward", "only=('schedule',)"): ["Part", "OnlineForwardMode"],
    ("estimator=mixed",): ["InverseVariance"],
    ("from_buffer=0.5", "growing=True"): ["Resume", "GPES"],
}
SMALL = ("depths=(1,)", "datasets=()", "particles=3")


@pytest.mark.parametrize("settings", RECIPES)
def test_estimators_of_the_recipe_of_lopt_1(settings):
    one, found = build("lopt-1", (*settings, *SMALL)).meta.one.one, []
    while True:
        found.append(one)
        if isinstance(one, InverseVariance) or not hasattr(one, "one"):
            break
        one = one.one
    assert [type(each).__name__ for each in found] == RECIPES[settings]
    if "growing=True" in settings:
        assert isinstance(found[-1].schedule, RampedHorizon)


@pytest.mark.slow
@pytest.mark.parametrize("settings", RECIPES)
def test_a_step_of_the_recipe_of_lopt_1_by_other_estimators(settings):
    made = build("lopt-1", (*settings, *SMALL))
    theta = made.initial_theta()

    def step(key):
        state = made.meta.prepare(theta, key)
        return made.meta.estimate(theta, state, key)[0].grads

    assert jax.tree.structure(jax.eval_shape(step, jax.random.key(0))) == jax.tree.structure(theta)


@pytest.mark.slow
def test_a_run_is_evaluated_and_a_second_start_compiles_nothing(tmp_path, environment):
    arguments = ["train", RECIPE, "--set", "outer_steps=4", "--set", "evaluate=True"]
    compiled = Path(environment["LOPT_CACHE_DIR"]) / "compiled"
    programs = []
    for name in ("first", "second"):
        done = lopt(environment, *arguments, "--run", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "tuned Adam" in done.stdout
        programs.append({path.name for path in compiled.iterdir() if "atime" not in path.name})
    assert programs[0] == programs[1] != set()
    assert values(tmp_path / "first") == values(tmp_path / "second")
    report = read_json(tmp_path / "first" / "report.json")
    done = lopt(environment, "evaluate", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "first" / "report.json") == report


def test_help_of_a_recipe_lists_its_fields(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lopt", "train", "digits", "--help"])
    cli.main()
    text = " ".join(capsys.readouterr().out.split())
    for words in ("outer_steps", "int", "800", "steps of meta-training", "weight_decay"):
        assert words in text
    monkeypatch.setattr("sys.argv", ["lopt", "train", "no_such", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "no recipe 'no_such'" in capsys.readouterr().err


def test_a_rule_of_ones_own_is_trained_and_loaded_with_its_recipe(tmp_path):
    folder = tmp_path / "run"
    run = Run.create(folder, str(RECIPE), ["outer_steps=4", "own=True"])
    theta = train(run, show_progress=False)
    with pytest.raises(ValueError, match="describes no optimizer"):
        storage.load(folder)
    _, again = storage.load(folder, run.experiment.learned)
    assert again == theta
    other = build("digits", ["outer_steps=1"]).learned
    with pytest.raises(ValueError, match="does not fit"):
        storage.load(folder, other)


@pytest.mark.slow
def test_the_main_job_runs_from_the_command_line_to_its_report(tmp_path, environment):
    """Four outer steps of it, on digits only: what else is found differs between machines."""
    settings = ["outer_steps=4", "particles=2", "horizon=10", "truncation=5", "hidden=4"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    quiet = environment | {"LOPT_DATA_DIR": str(tmp_path)}
    done = lopt(quiet, "train", "digits", *arguments, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "run" / "report.json")
    assert [e["trained_on"] for e in report["evaluations"]].count(True) == 1
    for name in ("curves.png", "meta_training.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000
