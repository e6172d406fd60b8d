"""Exported files, run without lopt, against the optimizers that they were made of."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lopt
from lopt.bridges import export
from lopt.experiment.pretrained import export_command
from lopt.experiment.settings import ExportSettings

pytest.importorskip("torch")
SHAPES = [(6, 4), (4, 6), (5, 5), (5,), (), (3, 2, 2, 2), (2, 7, 3), (40, 50)]
STEPS = 5

# What runs without lopt: the file is told shapes, and prints parameters after some steps.
USE = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import numpy as np
given = np.load("given.npz")
count = len(given.files) // {each}
space = {{}}
exec(open("rule.py").read(), space)
"""
TORCH = """
import torch
params = [torch.nn.Parameter(torch.tensor(given[f"p{i}"])) for i in range(count)]
optimizer = space["LearnedOptimizer"](params, lr=0.5, weight_decay=0.1)
for step in range(%d):
    for i, p in enumerate(params):
        p.grad = torch.tensor(given[f"g{i}_{step}"])
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer = space["LearnedOptimizer"](params, lr=0.5, weight_decay=0.1)
    optimizer.load_state_dict(saved)
np.savez("found.npz", *[p.detach().numpy() for p in params])
"""
OPTAX = """
import jax, optax
params = [given[f"p{i}"] for i in range(count)]
optimizer = space["LearnedOptimizer"](0.5, 0.1)
state, update = optimizer.init(params), jax.jit(optimizer.update)
for step in range(%d):
    grads = [given[f"g{i}_{step}"] for i in range(count)]
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
np.savez("found.npz", *params)
"""


@pytest.fixture(autouse=True)
def sizes_may_be_unknown():
    """Sizes are no integers there, as type checks would have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_like_the_original(text, to, made, shapes, folder, flips=False):
    """Runs a file on parameters of these shapes; `flips`: what it is given has outputs first."""
    rng = np.random.default_rng(0)
    given = {}
    for i, shape in enumerate(shapes):
        given[f"p{i}"] = rng.normal(size=shape).astype(np.float32)
        for step in range(STEPS):
            given[f"g{i}_{step}"] = rng.normal(size=shape).astype(np.float32)
    np.savez(folder / "given.npz", **given)
    (folder / "rule.py").write_text(text)
    blocked = ["lopt", "jax", "optax"] if to == "torch" else ["lopt", "torch"]
    use = USE.format(blocked=blocked, each=STEPS + 1) + (TORCH if to == "torch" else OPTAX) % STEPS
    subprocess.run([sys.executable, "-c", use], cwd=folder, check=True)

    def seen(x):
        return jnp.moveaxis(x, [0, 1], [-1, -2]) if flips and x.ndim > 1 else jnp.asarray(x)

    params = [seen(given[f"p{i}"]) for i in range(len(shapes))]
    state, update = made.init(params), jax.jit(made.update)
    for step in range(STEPS):
        grads = [seen(given[f"g{i}_{step}"]) for i in range(len(shapes))]
        updates, state = update(grads, state, params)
        params = [p + 0.5 * (u - 0.1 * p) for p, u in zip(params, updates, strict=True)]
    found = np.load(folder / "found.npz")
    for i, p in enumerate(params):
        ours = np.asarray(seen(found[f"arr_{i}"]))
        np.testing.assert_allclose(ours, p, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("adafactor_mlp", "optax"),
        ("rnnprop", "torch"),
        *(pytest.param("small_mlp", to, marks=pytest.mark.slow) for to in ("torch", "optax")),
        pytest.param("adafactor_mlp", "torch", marks=pytest.mark.slow),
        pytest.param("rnnprop", "optax", marks=pytest.mark.slow),
    ],
)
def test_coordinatewise_rules_for_any_shape(name, to, tmp_path):
    with jax.enable_x64(False):
        learned = getattr(lopt, name)()
        theta = learned.init(jax.random.key(1))
        made = learned.optimizer(theta)
        text = export(learned, theta, to=to)
        assert_like_the_original(text, to, made, SHAPES, tmp_path, flips=to == "torch")


@pytest.mark.parametrize("to", ["torch", "optax"])
def test_an_equation(to, tmp_path):
    names = ("gradient", "momentum_0.9")
    expression = lopt.symbolic.make_expression(
        ("multiply", -0.1, ("tanh", ("add", lopt.symbolic.Variable(names[1]), 0.1)))
    )
    with jax.enable_x64(False):
        features = lopt.learned.MomentumFeatures()
        learned = lopt.symbolic.symbolic_optimizer(expression, features)
        theta = learned.init(jax.random.key(0))
        text = export(learned, theta, to=to)
        made = learned.optimizer(theta)
        assert_like_the_original(text, to, made, SHAPES, tmp_path, flips=to == "torch")


@pytest.mark.parametrize("to", ["torch", "optax"])
def test_any_optimizer_for_given_shapes(to, tmp_path):
    shapes = [(6, 4), (4, 3, 3, 3), (5,), ()]
    out = tmp_path / "rule.py"
    words = tuple("x".join(map(str, shape)) or "()" for shape in shapes)
    with jax.enable_x64(False):
        export_command(ExportSettings("lopt-1-symbolic", to, out, 100, words))
        made = lopt.pretrained("lopt-1-symbolic", num_steps=100)
        text = out.read_text()
        assert_like_the_original(text, to, made, shapes, tmp_path, flips=to == "torch")


def test_bad_input(tmp_path):
    learned, theta = lopt.load("lopt-1")
    with pytest.raises(ValueError, match=r"is not coordinatewise.*give the shapes of all"):
        export(learned, theta, num_steps=10)
    velo = lopt.velo_small()
    with pytest.raises(ValueError, match="needs the loss"):
        export(velo, velo.init(jax.random.key(0)), num_steps=10, shapes=[(3, 2)])
    with pytest.raises(ValueError, match="must be 'torch' or 'optax'"):
        export(learned, theta, to="jax")
    with pytest.raises(ValueError, match="'3xa' is no shape; try 64x32"):
        ExportSettings("lopt-1", shapes=("3xa",))
    with pytest.raises(ValueError, match="needs a run, a file of weights or a name; try lopt-1"):
        export_command(ExportSettings(out=tmp_path / "rule.py"))
    assert not list(tmp_path.iterdir())
