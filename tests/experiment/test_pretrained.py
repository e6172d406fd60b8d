"""What comes with lopt: made from a run, given by name, guarded, refused where it is another."""

import importlib.util
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.experiment import cli
from lopt.experiment.evaluation.contestants import of_path
from lopt.experiment.report import Interval, Report
from lopt.experiment.runs import storage
from lopt.experiment.runs.files import read_json, to_line, write_json
from lopt.experiment.runs.run import Run
from lopt.learned import FallBack, MatrixAxes, muon_mlp

# AdamW.
pytestmark = pytest.mark.standard_promotion

ROOT = Path(__file__).parents[2]
RECIPE = '''"""Tiny."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import optax

import lopt
from lopt.learned import MatrixAxes, muon_mlp


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Quadratics of two dimensions, for a test."""

    outer_steps: int = 2

    def build(self):
        task = lopt.tasks.Quadratic(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
        inner = lopt.InnerTraining(task, muon_mlp(1, axes=MatrixAxes("out_in")), 8)
        meta = lopt.Mean(lopt.PES(inner, 2, 0.05), 2)
        return lopt.Experiment(inner.learned, meta, optax.adam(0.1), self.outer_steps)
'''


def tool():
    """Returns tools/ship.py as a module."""
    spec = importlib.util.spec_from_file_location("ship", ROOT / "tools" / "ship.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theta():
    learned = muon_mlp(1)
    theta = learned.init(jax.random.key(1))
    # Not those that it begins with: gates and sizes take part.
    return jax.tree.map(lambda leaf: leaf + 0.01, theta)


@pytest.fixture(autouse=True, scope="module")
def shipped(tmp_path_factory, theta):
    """The folder of what is shipped: "mini", from a run with an evaluation."""
    folder, made = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("made")
    (made / "tiny.py").write_text(RECIPE)
    run = Run.create(made / "run", str(made / "tiny.py"))
    storage.save_weights(run.folder / "weights.safetensors", run.experiment.learned, theta)
    lines = [{"step": i, "meta_loss": 1.0, "seconds": 900.0} for i in range(2)]
    (run.folder / "metrics.jsonl").write_text("".join(map(to_line, lines)))
    judged = Report("Evaluation of run")
    judged.table("digits", [{"optimizer": "learned"}])
    row = {"optimizer": "learned", "worth": Interval(math.inf, 3.0, math.inf)}
    judged.table("All 2 tasks: normalised training loss", [row])
    write_json(made / "report.json", judged.json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "PRETRAINED", folder)
        ship = tool()
        ship.ship(ship.Settings("mini", run.folder, "A test.", made))
        yield folder


def test_the_card_says_where_it_comes_from(shipped, theta):
    assert lopt.pretrained_names() == ("mini",)
    card = read_json(shipped / "mini.json")
    assert card["weights"] == sum(leaf.size for leaf in jax.tree.leaves(theta))
    assert (card["largest params"], card["longest horizon"], card["hours"]) == (2, 8, 0.5)
    assert card["state bytes per param"] == 12.0
    assert card["recipe"] == "tiny.py"
    assert card["settings"] == {"outer_steps": 2}
    assert card["trained on"] == "Quadratics of two dimensions, for a test."
    # An infinite number is told apart from one that is none.
    (table,) = card["evaluation"]
    assert table["rows"][0]["worth"] == {"value": "Infinity", "low": 3.0, "high": "Infinity"}
    assert float(table["rows"][0]["worth"]["value"]) == math.inf


@pytest.mark.parametrize(
    ("words", "shown"), [((), ("mini", "A test.", "0.5")), (("mini",), ("inf [3, inf]", "sha256"))]
)
def test_lopt_pretrained(words, shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lopt", "pretrained", *words])
    monkeypatch.setenv("COLUMNS", "120")
    cli.main()
    text = capsys.readouterr().out
    for word in shown:
        assert word in text


def test_one_is_there_for_programs_that_are_traced():
    find = jax.jit(lambda params: lopt.pretrained("mini", 10).init(params))
    assert find({"w": jnp.ones((2, 2))}).count == 0


def trained(optimizer, steps=3):
    """Returns the params and state after some steps on a sum of squares."""
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def close(one, other, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), one, other)


def test_it_is_the_rule_with_what_was_asked_for(theta):
    asked = {"axes": "out_in", "weight_decay": 0.1}
    params, state = trained(lopt.pretrained("mini", num_steps=20, **asked))
    own = muon_mlp(1, axes=MatrixAxes("out_in"), weight_decay=0.1).optimizer(theta, 20)
    close(params, trained(own)[0], rtol=1e-6)
    assert state.count == 0
    assert not hasattr(trained(lopt.pretrained("mini", 20, guard=False))[1], "count")
    # By default matrices are as in Flax and Optax: (inputs, outputs).
    other = muon_mlp(1, weight_decay=0.1).optimizer(theta, 20)
    close(trained(lopt.pretrained("mini", 20, weight_decay=0.1))[0], trained(other)[0], rtol=1e-6)


def test_weights_decay_as_they_were_trained_unless_it_is_said(monkeypatch):
    monkeypatch.setattr(storage, "PRETRAINED", Path(lopt.__file__).parent / "weights")
    stored = lopt.load("lopt-1")[0].weight_decay
    assert stored > 0
    by_default, said, without = (
        trained(lopt.pretrained("lopt-1", 2000, **asked))[0]["w"]
        for asked in ({}, {"weight_decay": stored}, {"weight_decay": 0.0})
    )
    np.testing.assert_array_equal(by_default, said)
    assert np.abs(by_default - without).max() > 1e-6


def test_a_rate_of_ones_own_may_be_a_number_a_schedule_or_injected():
    number = trained(lopt.pretrained("mini", learning_rate=0.02))[0]
    schedule = trained(lopt.pretrained("mini", learning_rate=optax.constant_schedule(0.02)))[0]
    close(number, schedule, rtol=1e-6)

    def made(learning_rate):
        return lopt.pretrained("mini", learning_rate=learning_rate)

    injected = optax.inject_hyperparams(made)(learning_rate=0.02)
    params = jax.tree.map(jnp.zeros_like, number) | {"b": jnp.ones(3, jnp.float32)}
    state, plain = injected.init(params), made(0.02)
    updates = injected.update(params, state, params)[0]
    close(updates, plain.update(params, plain.init(params), params)[0], rtol=1e-6)


def test_steps_that_explode_or_are_not_finite_are_replaced(shipped, theta):
    broken = theta | {"sizes": jax.tree.map(lambda leaf: leaf.at[0].set(10.0), theta["sizes"])}
    ship = tool()
    lopt.save(shipped.parent / "broken.safetensors", muon_mlp(1), broken)
    path = ship.ship(ship.Settings("broken", shipped.parent / "broken.safetensors", "Explodes."))
    try:
        params, state = trained(lopt.pretrained("broken", num_steps=20))
        assert state.count == 3
        close(params, trained(optax.adamw(1e-3, b2=0.9))[0], rtol=1e-6)
    finally:
        path.unlink()
        path.with_suffix(".json").unlink()
    optimizer, nothing = lopt.pretrained("mini", 20), {"b": jnp.ones(3)}
    state = optimizer.init(nothing)
    updates, state = optimizer.update({"b": jnp.full(3, jnp.nan)}, state, nothing)
    close(updates, {"b": np.zeros(3)})
    assert state.count == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lopt.pretrained("mimi", 10), "no pretrained optimizer 'mimi'; try 'mini'"),
        (lambda: lopt.pretrained("mini"), "num_steps=1000, or learning_rate=0.05"),
        (lambda: lopt.pretrained("mini", 10, axes="io"), "must be in_out or out_in"),
        (
            lambda: lopt.pretrained("mini", 10).init({"n": jnp.ones((), jnp.int32)}),
            r"params\['n'\] is int32, and only floats are trained; leave it out, as eqx.filter",
        ),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_weights_whose_hash_differs_are_refused(shipped, theta, tmp_path, monkeypatch):
    for path in shipped.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(storage, "PRETRAINED", tmp_path)
    lopt.save(tmp_path / "mini.safetensors", muon_mlp(1), jax.tree.map(jnp.zeros_like, theta))
    for use in (lambda: lopt.pretrained("mini", 10), lambda: lopt.load("mini")):
        with pytest.raises(ValueError, match="another SHA-256 than its card says; install lopt"):
            use()
    (tmp_path / "mini.json").unlink()
    with pytest.raises(ValueError, match="'mini'; this lopt comes without any"):
        lopt.pretrained("mini", 10)


def test_commands_that_take_weights_take_the_name(theta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    close(lopt.load("mini")[1], theta)
    (one,), run = of_path("mini", trust=False, alone=True)
    assert (one.name, run) == ("mini", None)
    with pytest.raises(FileNotFoundError, match="mimi, and no optimizer of that name"):
        of_path("mimi", trust=False, alone=True)
    settings = ("start=mini", "task=Rosenbrock", "horizon=2", "truncation=1", "seeds=0")
    begun = Run.create(tmp_path / "run", "transfer", settings)
    close(begun.experiment.initial, theta)
    # It goes on where nothing of the name is shipped any more.
    monkeypatch.setattr(storage, "PRETRAINED", tmp_path)
    close(Run(tmp_path / "run").experiment.initial, theta)


def test_a_file_or_folder_of_the_name_wins(theta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mini").mkdir()
    zeros = jax.tree.map(jnp.zeros_like, theta)
    lopt.save("mini/weights.safetensors", muon_mlp(1), zeros)
    close(lopt.load("mini")[1], zeros)
    state = trained(lopt.pretrained("mini", 20))[1]
    assert isinstance(state.parts, tuple)
    own = FallBack(muon_mlp(1)).optimizer((theta, {}), 20)
    close(trained(lopt.pretrained("mini", 20))[0], trained(own)[0], rtol=1e-6)
