"""Loggers: what TensorBoard and Weights & Biases read back is what `metrics.jsonl` says."""

import dataclasses
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lopt.experiment import cli
from lopt.experiment.runs.files import read_json, read_lines
from lopt.experiment.runs.loggers import LOGGERS, check_installed
from lopt.experiment.runs.registry import build
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train
from lopt.experiment.settings import LOGGERS as NAMED

RECIPE = Path(__file__).with_name("tiny_recipe.py")

# Adam.
pytestmark = pytest.mark.standard_promotion


def lines(folder):
    """The steps of a run, as far as their numbers are finite."""
    return [
        {name: value for name, value in line.items() if value is not None}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def in_tensorboard(folder):
    """The steps that are shown of a run, and in the order of its files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    found = {}
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            found.setdefault(event.step, []).append((name, event.value))
    assert all(len(dict(values)) == len(values) for values in found.values())  # none twice
    return [{"step": step, **dict(values)} for step, values in found.items()]


def records(content):
    """The records of a file of wandb: LevelDB's log, in blocks of 32 KiB, behind seven bytes."""
    at, parts = 7, []
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # no room for a head
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def in_wandb(folder):
    """The steps of the last offline folder of a run."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    *_, last = sorted((folder / "wandb").glob("offline-run-*"))
    (file,) = last.glob("*.wandb")
    for _ in range(50):  # wandb's own process may still be writing
        try:
            read = [Record.FromString(content) for content in records(file.read_bytes())]
            if any(one.WhichOneof("record_type") == "exit" for one in read):
                break
        except DecodeError:
            pass
        time.sleep(0.1)
    steps = []
    for history in [one.history for one in read if one.WhichOneof("record_type") == "history"]:
        values = {item.nested_key[0]: json.loads(item.value_json) for item in history.item}
        values = {name: value for name, value in values.items() if name[0] != "_"}
        steps.append({"step": history.step.num, **values})
    return steps


READ = {"tensorboard": in_tensorboard, "wandb": in_wandb}


def same(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-6)  # TensorBoard has 32 bits


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_every_logger_has_a_name_on_the_command_line():
    assert tuple(LOGGERS) == NAMED


@pytest.mark.slow
def test_a_killed_run_goes_on_without_doubled_or_lost_steps(tmp_path):
    folder, environment = tmp_path / "run", os.environ | {"LOPT_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "lopt.experiment.cli", "train"]
    loggers = [word for name in NAMED for word in ("--logger", name)]
    begin = [*command, RECIPE, "--run", folder, *loggers, "--set", "outer_steps=100000"]
    process = subprocess.Popen(begin, env=environment, stdout=subprocess.DEVNULL)
    while len(read_lines(folder / "metrics.jsonl")) < 30:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = len(read_lines(folder / "metrics.jsonl")) + 4
    again = [*command, "--resume", folder, "--set", f"outer_steps={steps}"]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(lines(folder)) == steps
    for read in READ.values():
        same(read(folder), lines(folder))


@pytest.mark.parametrize("name", NAMED)
def test_a_logger_that_is_added_has_all_steps_and_stays(name, tmp_path):
    run = Run.create(tmp_path / "run", str(RECIPE), ["outer_steps=4"])
    train(run, show_progress=False)
    run.add_loggers([name])
    longer = Run(run.folder).lengthen(["outer_steps=8"])
    train(longer, show_progress=False)
    assert len(lines(run.folder)) == 8
    same(READ[name](run.folder), lines(run.folder))


def test_steps_of_a_resumed_wandb_run_have_one_id(tmp_path):
    run = Run.create(tmp_path / "run", str(RECIPE), ["outer_steps=4"], ["wandb"])
    train(run, show_progress=False)
    time.sleep(1.1)  # folders are named by the second
    train(run.lengthen(["outer_steps=6"]), show_progress=False)
    first, second = (run.folder / "wandb").glob("offline-run-*")
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    same(in_wandb(run.folder), lines(run.folder))


OWN = """
@contextlib.contextmanager
def mine(folder, settings):
    with (folder / "mine.jsonl").open("w") as file:
        print(json.dumps(settings["outer_steps"]), file=file)
        yield lambda step, numbers: print(json.dumps({"step": step, **numbers}), file=file)
        print(json.dumps("closed"), file=file)


def every_other(step):
    return {"ratio": step.loss / (step.step % 2)}


@dataclasses"""


def test_a_logger_of_ones_own_gets_finite_numbers_and_is_closed(tmp_path):
    recipe, text = tmp_path / "recipe.py", RECIPE.read_text()
    text = text.replace("import dataclasses", "import contextlib, dataclasses, json")
    text = text.replace("@dataclasses", OWN, 1)
    more = "steps_per_chunk=2, loggers=(mine,), record=every_other"
    recipe.write_text(text.replace("steps_per_chunk=2", more))
    run = Run.create(tmp_path / "run", str(recipe), ["outer_steps=6"])
    train(run, show_progress=False)
    told = [json.loads(line) for line in (run.folder / "mine.jsonl").read_text().splitlines()]
    assert told == [6, *lines(run.folder), "closed"]
    assert ["ratio" in line for line in told[1:-1]] == [False, True] * 3


def test_unknown_loggers_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"'tensorbord', which is none of tensorboard, wandb"):
        dataclasses.replace(build(str(RECIPE)), loggers=("tensorbord",))
    words = ["lopt", "train", str(RECIPE), "--logger", "jsonl", "--run", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "--logger jsonl must be one of tensorboard, wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_extra_is_named_before_anything_is_written(name, tmp_path, monkeypatch):
    check_installed(NAMED)
    find = importlib.util.find_spec
    module = LOGGERS[name][1]
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda one, *more: None if one == module else find(one, *more)
    )
    with pytest.raises(ImportError, match=rf"pip install 'lopt\[{name}\]'"):
        Run.create(tmp_path / "run", str(RECIPE), ["outer_steps=4"], [name])
    assert not (tmp_path / "run").exists()
    run = Run.create(tmp_path / "run", str(RECIPE), ["outer_steps=4"])
    config = read_json(run.folder / "run.json")
    with pytest.raises(ImportError, match=name):
        run.add_loggers([name])
    assert read_json(run.folder / "run.json") == config
