"""Workers, of this process and of Ray: the same outer steps, whoever comes and goes."""

import contextlib
import dataclasses
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

import lopt
from lopt.estimators.finite import mean_of_finite
from lopt.experiment.runs import files, fleets
from lopt.experiment.runs import workers as w
from lopt.experiment.runs.cluster import connected
from lopt.experiment.runs.fleets import RayFleet
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.storage import _read
from lopt.experiment.runs.train import OneProgram, beginning, train

pytestmark = pytest.mark.standard_promotion
RECIPE = Path(__file__).parent / "tiny_recipe.py"
LOPT = [sys.executable, "-m", "lopt.experiment.cli"]


def experiment(num=6, sizes=(2, 3), **options):
    """Returns one on tasks of several shapes, which cannot be mapped together."""
    families = [lopt.tasks.QuadraticFamily(size) for size in sizes]
    inner = lopt.InnerTraining(
        lopt.tasks.Mixture(families), lopt.learnable(optax.sgd, learning_rate=0.05), 8
    )
    meta = lopt.Mean(lopt.PES(inner, 2, 0.05), num)
    return lopt.Experiment(inner.learned, meta, optax.adam(0.05), 12, **options)


def lines_of(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def actors_of(driver):
    found = []
    for one in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found += [one] * one.name().startswith("ray::_Actor")
    return found


def steps_of(folder):
    return len(lines_of(folder)) if (folder / "metrics.jsonl").exists() else 0


def states_equal(one, other, **tolerance):
    return eqx.tree_equal(w.to_host(one), w.to_host(other), **tolerance)


@pytest.mark.parametrize(
    "count", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6))]
)
def test_the_parts_of_a_mean_are_its_particles(count):
    mean = experiment().meta
    theta, key = beginning(experiment())
    whole = w.prepare(mean, theta, key)
    parts = w.split(mean, count)
    assert [part.rows[0] for part in parts][1:] == [part.rows[1] for part in parts][:-1]
    layout = w._Layout(mean, whole)
    own = [w.prepare(part, theta, key) for part in parts]
    for part, state in zip(parts, own, strict=True):
        assert states_equal(layout.cut(w.to_host(whole), part), state)
    assert states_equal(layout.join(parts, list(map(w.to_host, own))), whole)
    found = [w.window(part, theta, state, key) for part, state in zip(parts, own, strict=True)]
    every, _ = eqx.filter_jit(type(mean).particles)(mean, theta, whole, key)
    pooled = w.pooled([w.answer_of(*each[:2]) for each in found], theta)
    assert eqx.tree_equal(pooled, mean_of_finite(every), rtol=1e-6)


def test_pooled_answers_weigh_as_many_particles_as_were_finite():
    theta = {"a": jnp.zeros(2)}

    def answer(loss, number):
        return w.Answer(
            np.array(loss, np.float32), [np.full(2, loss, np.float32)], {}, 4 - number, number
        )

    found = w.pooled([answer(1.0, 3), answer(5.0, 1), answer(np.nan, 0)], theta)
    assert float(found.loss) == 2.0
    assert found.grads["a"].tolist() == [2.0, 2.0]
    assert int(found.dropped) == 1 + 3 + 4
    nothing = w.pooled([answer(np.nan, 0)], theta)
    assert np.isnan(nothing.loss)
    assert nothing.grads["a"].tolist() == [0.0, 0.0]


def test_costs_decide_how_particles_are_split():
    mean = experiment(num=8, sizes=(1, 200)).meta  # four of each, the second dear
    cheap, dear = w.split(mean, 2)
    assert cheap.rows[1] > 4  # all that are cheap, and some of the others
    assert dear.rows == (cheap.rows[1], 8)
    with pytest.raises(ValueError, match="8 particles are too few for 9 workers; try 8"):
        w.split(mean, 9)


def test_architectures_that_are_compiled_apart_train_what_one_program_does():
    made = experiment()
    fleet = fleets.Here(made)
    for one in fleet.workers:
        one.made.result()
    found = []
    for engine in (OneProgram(made), w.Workers(made, fleet)):
        state, record = engine.advance(engine.begin(), 12)
        found.append((engine.states(state)[0], jax.device_get(record)))
    (one, expected), (other, record) = found
    np.testing.assert_allclose(record["meta_loss"], expected["meta_loss"], rtol=1e-6)
    assert states_equal(one, other, rtol=1e-5, atol=1e-6)


def test_the_first_steps_do_not_wait_for_the_last_compilation(monkeypatch):
    made, compiled = experiment(), []
    make = fleets._Thread._make

    def slow(self, *begun):
        if compiled:  # all but the first
            time.sleep(1.0)
        compiled.append(self)
        return make(self, *begun)

    monkeypatch.setattr(fleets._Thread, "_make", slow)
    engine = w.Workers(made, fleets.Here(made))
    state, _ = engine.advance(engine.begin(), 3)
    assert ", 1 of 2 workers" in engine.status
    full = engine.states(state)[0]  # also of what has not begun
    assert jax.tree.structure(full) == jax.tree.structure(w.shapes(made))
    time.sleep(2.5)
    engine.advance(state, 1)
    assert ", 2 of 2 workers" in engine.status


def test_estimates_that_are_too_old_are_dropped_and_counted(monkeypatch):
    made = experiment()
    fleet = fleets.Here(made)
    for one in fleet.workers:
        one.made.result()
    # One device each, so that the second is not kept waiting by the first.
    run = fleets._Thread._window
    pools = [fleets.ThreadPoolExecutor(1) for _ in fleet.workers]
    for one, thread in zip(fleet.workers, pools, strict=True):
        one._thread = thread

    def slow(self, *given):
        if self is fleet.workers[1]:
            time.sleep(0.1)
        return run(self, *given)

    monkeypatch.setattr(fleets._Thread, "_window", slow)
    engine = w.Workers(made, fleet, stale=1)
    _, record = engine.advance(engine.begin(), 200)
    assert record["stale"].sum() >= 1
    assert f"{int(record['stale'].sum())} stale" in engine.status
    assert np.isfinite(record["meta_loss"]).all()


def test_workers_need_particles():
    made = dataclasses.replace(experiment(), meta=experiment().meta.one)
    with pytest.raises(ValueError, match="GPES has none; try lopt"):
        w.mean_of(made)


@pytest.fixture(scope="module")
def ray():
    importlib.import_module("ray")  # as others of the process may have
    with connected(2, None) as found:
        yield found


def test_two_actors_train_what_one_process_does_though_one_is_killed(tmp_path, ray):
    one, two = (Run.create(tmp_path / name, str(RECIPE)) for name in ("one", "two"))
    expected = train(one, show_progress=False)
    fleet = RayFleet(ray, two, 2)
    engine = w.Workers(two.experiment, fleet)

    def kill():  # after each of the first chunks
        if len(two.log["seconds"]) in (4, 10):
            random.Random(0).choice(actors_of(psutil.Process())).kill()
        return 0

    found = train(two, show_progress=False, engine=engine, stop=kill)
    assert eqx.tree_equal(found, expected, rtol=1e-6)
    np.testing.assert_allclose(two.log["meta_loss"], one.log["meta_loss"], rtol=1e-6)
    lost = [json.loads(line)["lost"] for line in lines_of(two.folder)]
    assert sum(lost) == engine._counts["lost"]
    # Nothing of it listens on other than loopback.
    ports = set()
    for one in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            ports |= {c.laddr.ip for c in one.net_connections() if c.status == "LISTEN"}
    assert {ip.removeprefix("::ffff:") for ip in ports} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_run_of_workers_goes_on_in_one_process(tmp_path, ray):
    one = Run.create(tmp_path / "one", str(RECIPE))
    expected = train(one, show_progress=False)
    two = Run.create(tmp_path / "two", str(RECIPE), ("outer_steps=20",))
    train(two, show_progress=False, engine=w.Workers(two.experiment, RayFleet(ray, two, 2)))
    found = train(two.lengthen(("outer_steps=60",)), show_progress=False)
    assert eqx.tree_equal(found, expected, rtol=1e-6)
    three = Run.create(tmp_path / "three", str(RECIPE), ("outer_steps=20",))
    train(three, show_progress=False)
    three = three.lengthen(("outer_steps=60",))
    engine = w.Workers(three.experiment, RayFleet(ray, three, 2), stale=2)
    found = train(three, show_progress=False, engine=engine)  # other numbers, but it ends
    assert eqx.tree_equal(found, expected, rtol=0.5)


def test_what_goes_wrong_in_a_worker_is_said_here(tmp_path, ray):
    run = Run.create(tmp_path / "run", str(RECIPE))
    (run.folder / "recipe.py").unlink()
    content = files.read_json(run.folder / "run.json", sealed=True)
    files.write_json(run.folder / "run.json", content | {"recipe": "/elsewhere.py"}, sealed=True)
    engine = w.Workers(run.experiment, RayFleet(ray, run, 2))
    with pytest.raises(RuntimeError, match=r"a worker failed: .*elsewhere.py and its copy"):
        engine.advance(engine.begin(), 1)


def test_a_refused_number_of_workers_leaves_nothing_behind(tmp_path):
    words = ["train", RECIPE, "--workers", 9, "--run", tmp_path / "run"]
    found = subprocess.run([*LOPT, *map(str, words)], capture_output=True, text=True)
    assert found.returncode == 2
    assert "4 particles are too few for 9 workers; try 4" in found.stderr
    assert not (tmp_path / "run").exists()


def test_windows_that_a_driver_asked_for_and_did_not_keep_are_counted():
    made, tally = experiment(), np.zeros((2, 2), np.int64)
    for done, lost in ((0, 0), (0, 4), (2, 0), (4, 0)):
        fleet = fleets.Here(made)
        for one in fleet.workers:
            one.made.result()
        engine = w.Workers(made, fleet, tally=tally)
        state = dataclasses.replace(engine.begin(), step=jnp.int32(done))
        record = engine.advance(state, 2)[1]
        assert record["lost"].tolist() == [lost, 0]


def test_windows_in_progress_when_a_driver_stops_are_counted(monkeypatch):
    made, tally, run = experiment(), np.zeros((2, 2), np.int64), fleets._Thread._window
    stopped, pools = threading.Event(), [fleets.ThreadPoolExecutor(1) for _ in range(2)]

    def late(one, *given):
        if one.part.rows[0] > 0:
            assert stopped.wait(60)
        return run(one, *given)

    monkeypatch.setattr(fleets._Thread, "_window", late)
    found = []
    for done in (0, 2):
        stopped.clear()
        fleet = fleets.Here(made)
        for one, thread in zip(fleet.workers, pools, strict=True):
            one.made.result()
            one._thread = thread  # of its own, so that the first need not wait for the second
        engine = w.Workers(made, fleet, stale=9, tally=tally)
        state = dataclasses.replace(engine.begin(), step=jnp.int32(done))
        found.append(engine.advance(state, 2)[1]["lost"].tolist())
        stopped.set()
    assert found == [[0, 0], [1, 0]]


def test_who_is_waited_for_is_said(monkeypatch, capsys):
    made = experiment()
    fleet = fleets.Here(made)
    for one in fleet.workers:
        one.made.result()
    run = fleets._Thread._window
    monkeypatch.setattr(fleets._Thread, "_window", lambda *a: (time.sleep(0.4), run(*a))[1])
    monkeypatch.setattr(w, "PATIENCE", 0.1)
    engine = w.Workers(made, fleet)
    engine.advance(engine.begin(), 1)
    assert "Waiting for 2 of 2 workers" in capsys.readouterr().out


@pytest.mark.parametrize("listens", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cluster_that_is_not_there_is_one_error_within_a_minute(listens):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        if not listens:
            other.close()
        began = time.time()
        words = ["train", RECIPE, "--workers", 2, "--ray", address, "--run", "nowhere"]
        found = subprocess.run([*LOPT, *map(str, words)], capture_output=True, text=True)
    assert found.returncode == 2
    assert f"--ray {address} cannot be reached" in found.stderr.splitlines()[-1]
    assert time.time() - began < 60
    assert not Path("nowhere").exists()


def test_sigterm_ends_a_run_before_ray_is_there(tmp_path):
    words = ["train", RECIPE, "--workers", 2, "--run", tmp_path / "run"]
    with subprocess.Popen([*LOPT, *map(str, words)]) as started:
        while not psutil.Process(started.pid).children():  # the first of a cluster
            assert started.poll() is None
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 143


@pytest.mark.slow
def test_sigterm_ends_workers_after_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    words = ["train", RECIPE, "--workers", 2, "--run", folder, "--set", "outer_steps=100000"]
    with subprocess.Popen([*LOPT, *map(str, words)]) as started:
        while not (folder / "weights.safetensors").exists():
            assert started.poll() is None
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 143
    last = max(int(path.stem) for path in (folder / "checkpoints").glob("*.safetensors"))
    assert last == len(Run(folder).log["seconds"])


@pytest.mark.slow  # two minutes
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # Ray's become other programs
def test_machines_join_and_leave(tmp_path, monkeypatch):
    """A run goes on while the second of its machines is lost, and another one comes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    folder, settings = tmp_path / "run", ["--set", "outer_steps=1000"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        words = ["train", str(RECIPE), "--workers", "2", "--ray", cluster.address, *settings]
        with subprocess.Popen([*LOPT, *words, "--run", str(folder)], text=True) as driver:
            for _ in range(3):
                before = steps_of(folder)
                node = cluster.add_node(num_cpus=1)
                while steps_of(folder) < before + 100:
                    assert driver.poll() is None
                    time.sleep(0.1)
                cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            assert driver.wait() == 0
    finally:
        cluster.shutdown()
    lines = [json.loads(line) for line in lines_of(folder)]
    assert len(lines) == 1000
    assert sum(line["lost"] for line in lines) >= 1
    assert np.isfinite([line["meta_loss"] for line in lines]).all()


@pytest.mark.slow  # four minutes
def test_chaos(tmp_path):
    """Twenty workers and five drivers are killed at random: the run is the undisturbed one."""
    calm, folder, rng = tmp_path / "calm", tmp_path / "run", random.Random(0)
    settings = ["--set", "outer_steps=3000"]
    subprocess.run([*LOPT, "train", str(RECIPE), "--run", str(calm), *settings], check=True)
    begin = [*LOPT, "train", str(RECIPE), "--run", str(folder), *settings]
    go_on = [*LOPT, "train", "--resume", str(folder)]
    victims = ["worker"] * 20 + ["driver"] * 5
    rng.shuffle(victims)
    while True:
        there = folder.exists()
        with subprocess.Popen([*(go_on if there else begin), "--workers", "2"]) as driver:
            seen, due = steps_of(folder), 0.0
            while driver.poll() is None:
                time.sleep(0.1)
                if not victims or time.time() < due or steps_of(folder) <= seen:
                    continue
                if victims[-1] == "driver":
                    victims.pop()
                    driver.kill()
                    break
                actors = actors_of(psutil.Process(driver.pid))
                if actors:
                    victims.pop()
                    os.kill(rng.choice(actors).pid, signal.SIGKILL)
                    due = time.time() + rng.uniform(0.5, 2)
            status = driver.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert not victims
    lines = [json.loads(line) for line in lines_of(folder)]
    assert sum(line["lost"] for line in lines) >= 5 + 1  # of each driver, and of workers
    # Windows that were lost are computed again: it is the same run, to rounding.
    expected = [json.loads(line)["meta_loss"] for line in lines_of(calm)]
    found = [line["meta_loss"] for line in lines]
    weights = _read(folder / "weights.safetensors")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
