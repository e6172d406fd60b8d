"""Several processes that train one run: real ones, which the command line joins."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import numpy as np
import psutil
import pytest

from lopt.experiment.runs.settings import TrainSettings
from lopt.experiment.runs.storage import _read

RECIPE = Path(__file__).parent / "tiny_recipe.py"
LOPT = [sys.executable, "-m", "lopt.experiment.cli"]
LONG = ("--set", "outer_steps=100000")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def is_free(port):
    with socket.socket() as one, contextlib.suppress(OSError):
        one.bind(("127.0.0.1", port))
        return True
    return False


def begin(*words, processes=2, differing=()):
    """Starts processes that join one another."""
    where = f"127.0.0.1:{free_port()}"
    started = []
    for i in range(processes):
        join = ["--coordinator", where, "--processes", f"{processes}", "--process", f"{i}"]
        own = differing[i] if differing else ()
        command = [*LOPT, "train", *map(str, words), *own, *join]
        started.append(popen(command))
    return started


def popen(command, **told):
    """Starts a process that may write much before it is read, as JAX 0.9 does of its cache."""
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    one = subprocess.Popen(
        command, env=os.environ | told, stdout=said, stderr=subprocess.STDOUT, text=True
    )
    one.said = said
    return one


def ends(started, timeout=90):
    """Returns exit status and output of each process; none is left."""
    try:
        for one in started:
            one.wait(timeout)
    finally:
        texts = []
        for one in started:
            one.kill()
            one.wait()
            with one.said:
                one.said.seek(0)
                texts.append(one.said.read())
    return [(one.returncode, text) for one, text in zip(started, texts, strict=True)]


def alone(*words):
    found = subprocess.run([*LOPT, "train", *map(str, words)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found


def log(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def wait_for_lines(folder, count, started):
    """Waits until so many outer steps are logged."""
    deadline = time.time() + 90
    while not (folder / "metrics.jsonl").exists() or len(log(folder)) < count:
        assert time.time() < deadline
        assert all(one.poll() is None for one in started), ends(started)
        time.sleep(0.05)


def arrays(path):
    return _read(path)[0]


def test_two_processes_train_what_one_does_and_hand_over_to_one_another(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone(RECIPE, "--run", one)
    ended = ends(begin(RECIPE, "--run", two, "--set", "outer_steps=30"))
    assert [status for status, _ in ended] == [0, 0], ended
    assert "weights.safetensors" in ended[0][1]
    assert sorted(path.name for path in (two / "checkpoints").glob("00000030*")) == [
        "00000030-1.safetensors",
        "00000030.safetensors",
    ]
    # On the same mesh bit for bit: the run that was never interrupted is of two processes.
    whole = tmp_path / "whole"
    assert [s for s, _ in ends(begin(RECIPE, "--run", whole))] == [0, 0]
    assert [s for s, _ in ends(begin("--resume", two, "--set", "outer_steps=60"))] == [0, 0]
    assert log(two) == log(whole)
    for part in ("00000060.safetensors", "00000060-1.safetensors"):
        found = (two / "checkpoints" / part).read_bytes()
        assert found == (whole / "checkpoints" / part).read_bytes()
    # And by a process alone, to rounding.
    expected = arrays(one / "weights.safetensors")
    assert eqx.tree_equal(arrays(two / "weights.safetensors"), expected, rtol=1e-6)
    three = tmp_path / "three"
    ends(begin(RECIPE, "--run", three, "--set", "outer_steps=30"))
    alone("--resume", three, "--set", "outer_steps=60")
    assert eqx.tree_equal(arrays(three / "weights.safetensors"), expected, rtol=1e-6)
    losses = [[line["meta_loss"] for line in log(folder)] for folder in (one, two, three)]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["Slurm", "Open MPI"])
def test_what_a_scheduler_says_need_not_be_said_again(scheduler, tmp_path):
    # JAX takes a port for the job, of the last 4,096.
    port = next(n for n in range(4096) if is_free(61440 + n))
    started = []
    for i in "01":
        if scheduler == "Slurm":
            told = {"JOB_ID": f"{port}", "STEP_NODELIST": "localhost", "STEP_NUM_NODES": "1"}
            told |= {"NTASKS": "2", "PROCID": i, "LOCALID": i}
            told = {f"SLURM_{name}": value for name, value in told.items()}
        else:
            told = {"MCA_orte_hnp_uri": f"{port * 4096}.0;tcp://127.0.0.1:34911"}
            told |= {"COMM_WORLD_SIZE": "2", "COMM_WORLD_RANK": i, "COMM_WORLD_LOCAL_RANK": i}
            told = {f"OMPI_{name}": value for name, value in told.items()}
        words = ["train", str(RECIPE), "--run", str(tmp_path / "run"), "--distributed"]
        started.append(popen([*LOPT, *words], **told))
    ended = ends(started)
    assert [status for status, _ in ended] == [0, 0], ended
    assert len(log(tmp_path / "run")) == 60


def test_a_process_that_is_killed_stops_the_others_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "run"
    started = begin(RECIPE, "--run", folder, *LONG)
    wait_for_lines(folder, 6, started)
    # Nothing listens on other than loopback.
    for one in started:
        ports = [c for c in psutil.Process(one.pid).net_connections() if c.status == "LISTEN"]
        assert ports
        assert {c.laddr.ip.removeprefix("::ffff:") for c in ports} == {"127.0.0.1"}
    started[1].kill()
    (status, said), _ = ends(started, timeout=60)
    assert status not in (0, 143)
    assert "was lost" in said
    assert "--resume" in said
    # Both get the signal of a scheduler in a way: one does, and tells the other.
    started = begin("--resume", folder)
    wait_for_lines(folder, len(log(folder)) + 4, started)
    started[1].send_signal(signal.SIGTERM)
    ended = ends(started)
    assert [status for status, _ in ended] == [143, 143]
    assert all("Stopped" in said for _, said in ended)
    last = max(int(path.stem[:8]) for path in (folder / "checkpoints").glob("*.safetensors"))
    assert last == len(log(folder))  # a checkpoint was made of all that was done


@pytest.mark.parametrize(
    ("words", "differing", "expected"),
    [
        (("--set", "particles=5"), (), "5 particles cannot be spread evenly over the 2 devices"),
        (
            (),
            ((), ("--set", "truncation=4")),
            "Process 1 differs from process 0 in settings: ('truncation=4',), not ()",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_in_every_process(tmp_path, words, differing, expected):
    ended = ends(begin(RECIPE, "--run", tmp_path / "run", *words, differing=differing), 60)
    for status, said in ended:
        assert status == 2
        assert expected in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # 40 s until it is given up
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_meets_nobody_ends_within_a_minute(tmp_path, which):
    began = time.time()
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    words = [*LOPT, "train", RECIPE, "--run", tmp_path / "run", *where, "--process", f"{which}"]
    found = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert time.time() - began < 60
    assert found.returncode != 0
    assert "did not meet within 40 seconds" in found.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"coordinator": "127.0.0.1:80"}, "go together"),
        ({"coordinator": "here", "processes": 2, "process": 0}, "must be HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "must be below --processes"),
        ({"workers": 2, "distributed": True}, "give one of them"),
        ({"stale": 2}, "go with --workers"),
        ({"ray": "auto"}, "go with --workers"),
        ({"workers": -1}, "--workers -1 must be at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        TrainSettings("digits", **options)
