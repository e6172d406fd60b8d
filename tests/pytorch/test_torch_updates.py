"""One definition, equal updates: every rule steps in PyTorch as it does in JAX."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_conformance import LEARNED, exported
from toys import quick_jit

import lopt
from lopt.core import AbstractLearnedOptimizer
from lopt.core.tensors import BLOCK_SIZE
from lopt.learned import MomentFeatures
from lopt.symbolic import Variable, make_expression, symbolic_optimizer
from lopt.symbolic.operators import OPERATORS

torch = pytest.importorskip("torch")
from lopt.torch import LearnedOptimizer  # noqa: E402

# Adam is Optax's.
pytestmark = pytest.mark.standard_promotion

KEY = jax.random.key(0)
FEATURES = ("gradient", "momentum_0.9")
SHAPES = {
    "matrix": (6, 4),
    "square": (4, 4),
    "kernel": (3, 2, 2, 2),
    "embedding": (5, 3),
    "vector": (4,),
    "scalar": (),
    "empty": (0, 3),
    "frozen": (3, 2),  # has no gradient
}
# In both precisions, or in the one that is named; others are slow tests.
QUICK = {"MuonMLP": ["float64"], "rnnprop": ["float64"], "small_mlp": ["float64", "float32"]}
# Newton and Schulz's steps amplify rounding: updates in 32 bits are as far from JAX's as JAX's are
# from its own in 64.
ROUGH = {"Celo2": 2e-4, "celo2": 2e-4, "MuonMLP": 1e-5, "muon_mlp": 1e-5}
# With its random weights it diverges.
SMALLER = {"velo": 0.3}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def follow(optimizer, theirs, dtype, steps, shapes=SHAPES, pause=None, **options):
    """Trains on the same gradients in PyTorch and in JAX, and compares parameters at each step.

    In 64 bits both go their own way. In 32 bits rounding grows along the way, by the rule's own
    sensitivity, so that PyTorch takes over JAX's parameters and state after every step.

    Returns the largest difference, relative to the largest update of its tensor in 32 bits, beyond
    a rounding of the parameter itself; relative to the parameter in 64 bits.
    """
    rng, worst = np.random.default_rng(0), 0.0
    params = {n: jnp.asarray(0.5 * rng.normal(size=s), dtype) for n, s in shapes.items()}
    tensors = {n: torch.nn.Parameter(torch.tensor(np.asarray(p))) for n, p in params.items()}
    ours = LearnedOptimizer(tensors.items(), optimizer, layout="jax", **options)
    program = ours._rules[0].program(tuple(range(len(tensors))))
    state = theirs.init(params)
    step = quick_jit(lambda g, s, p, loss: theirs.update(g, s, p, value=loss))
    for count in range(steps):
        loss = jnp.asarray(1.5 - count / 200, dtype)
        grads = {
            n: jnp.asarray(rng.normal(size=p.shape) * np.exp(-count / 50) + 0.3 * p, dtype)
            for n, p in params.items()
        }
        for name in ["frozen", *([pause] if count % 3 == 1 else [])]:
            grads[name] = None
        for name, tensor in tensors.items():
            grad = grads.get(name)
            tensor.grad = None if grad is None else torch.tensor(np.asarray(grad))
        ours.step(loss=float(loss))
        updates, state = step({n: grads[n] for n in params}, state, params, loss)
        for name, update in updates.items():
            if update is not None:
                params[name] = params[name] + update
        for name, tensor in tensors.items():
            new, found = np.asarray(params[name]), tensor.detach().numpy()
            error, size = np.abs(new - found).max(initial=0), np.abs(new).max(initial=0)
            if dtype == "float32" and updates.get(name) is not None:
                error = max(0.0, error - np.spacing(size))
                size = np.abs(updates[name]).max(initial=0)
            worst = max(worst, error / (size + np.finfo(dtype).tiny))
        if dtype == "float32":
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(torch.tensor(np.asarray(params[name])))
            leaves = jax.tree.leaves(state)
            for (row, name), leaf in zip(program.places, leaves, strict=True):
                own = ours.state[list(tensors.values())[row]][name]
                own.copy_(torch.tensor(np.asarray(leaf)))
    return worst


def compare(learned, dtype, steps=100, factor=1.0, shapes=SHAPES, pause=None):
    steps = min(steps, learned.max_steps or steps)
    num_steps = steps if learned.needs_num_steps else None
    with jax.enable_x64(dtype == "float64"):
        theta = jax.tree.map(lambda w: (factor * w).astype(w.dtype), learned.init(KEY))
        theirs = learned.optimizer(theta, num_steps)
        options = {"theta": theta, "num_steps": num_steps}
        return follow(learned, theirs, dtype, steps, shapes, pause, **options)


ROWS = [
    pytest.param(name, dtype, marks=[] if dtype in QUICK.get(name, []) else [pytest.mark.slow])
    for name in exported(lopt.learned, AbstractLearnedOptimizer)
    for dtype in ("float64", "float32")
]


@pytest.mark.parametrize(("name", "dtype"), ROWS)
def test_every_learned_optimizer(name, dtype):
    learned = LEARNED.get(name, getattr(lopt.learned, name))()
    error = compare(learned, dtype, factor=SMALLER.get(name, 1.0))
    assert error < (ROUGH.get(name, 1e-6) if dtype == "float32" else 1e-6)


def test_gradients_that_come_and_go():
    assert compare(lopt.small_mlp(), "float64", steps=10, pause="vector") < 1e-12


@pytest.mark.parametrize("name", ["small_mlp", slow("rnnprop"), slow("velo_small")])
def test_what_is_worked_on_in_slabs(name):
    side = math.isqrt(BLOCK_SIZE)
    shapes = {"large": (side + 99, side), "long": (3, 5, side**2 // 14), "small": (3,)}
    learned = getattr(lopt.learned, name)()
    assert compare(learned, "float64", steps=3, shapes=shapes) < 1e-10


def test_an_equation_of_every_operator():
    gradient, momentum = (Variable(name) for name in FEATURES)
    terms = [
        ("tanh", (name, gradient, momentum)[: 1 + operator.arity])
        for name, operator in OPERATORS.items()
    ]
    root = functools.reduce(lambda total, term: ("add", total, term), terms)
    rule = make_expression(("multiply", -0.01, root))
    learned = symbolic_optimizer(rule, MomentFeatures(FEATURES))
    assert compare(learned, "float64", steps=20) < 1e-12


def test_an_equation_that_looks_back():
    root = ("add", ("multiply", -0.5, Variable("gradient")), Variable("gradient", 2))
    rule = make_expression(("multiply", 0.1, root))
    learned = symbolic_optimizer(rule, MomentFeatures(("gradient",)))
    assert compare(learned, "float64", steps=10) < 1e-12


@pytest.mark.parametrize("name", [slow("lopt-1"), "lopt-1-symbolic"])
def test_pretrained_optimizers(name):
    with jax.enable_x64(True):
        theirs = lopt.pretrained(name, 100)
        assert follow(name, theirs, "float64", 100, num_steps=100) < 1e-6


OPTAX = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "muon": lambda: optax.contrib.muon(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=3),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.lion(optax.cosine_decay_schedule(1e-2, 50))
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optimizers_of_optax(name):
    optimizer = OPTAX[name]()
    # Optax has no updates of nothing.
    shapes = {name: shape for name, shape in SHAPES.items() if name not in ("empty", "frozen")}
    with jax.enable_x64(True):
        assert follow(optimizer, optimizer, "float64", 20, shapes) < 1e-6
