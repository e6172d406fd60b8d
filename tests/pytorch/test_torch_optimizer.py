"""It is a `torch.optim.Optimizer`, in every common way of using one."""

import copy
import io
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from lopt.torch import LearnedOptimizer  # noqa: E402

# Adam is Optax's.
pytestmark = pytest.mark.standard_promotion

X, Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
# Parts of one step of each kind: coordinates, matrices, recurrent, a state that tensors share.
DESIGNS = {
    "lopt-1": {"optimizer": "lopt-1", "num_steps": 20},
    "rnnprop": {"optimizer": lopt.rnnprop()},
    "small_mlp": {"optimizer": lopt.small_mlp()},
    "velo_small": {"optimizer": lopt.velo_small(), "num_steps": 20},
}
# A tensorwise one takes as long as the others together.
SLOW = {"velo_small": [pytest.mark.slow]}
each = pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, [])) for n in DESIGNS])
few = pytest.mark.parametrize("name", ["lopt-1", pytest.param("rnnprop", marks=pytest.mark.slow)])


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def loss_of(model, x=X, y=Y):
    return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)


def train(model, optimizer, steps=4, scheduler=None):
    """Trains, and returns the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step(loss=loss)
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def make(model, name="small_mlp", **options):
    return LearnedOptimizer.for_module(model, **DESIGNS[name], **options)


def assert_equal(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def saved(thing):
    """Returns what is read of what was written, without pickled code."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_pretrained_optimizer_beats_adam():
    ends = []
    for of_params in (
        lambda params: LearnedOptimizer(params, "lopt-1", num_steps=50),
        lambda params: torch.optim.AdamW(params, lr=0.01),
    ):
        model = network()
        optimizer = of_params(model.parameters())
        for _ in range(50):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        ends.append(loss_of(model).item())
    assert ends[0] < ends[1]


def test_no_step_runs_jax(monkeypatch):
    model = network()
    optimizer = make(model)

    def refuse(*arguments, **keywords):
        raise AssertionError("JAX was asked")

    for name in ("make_jaxpr", "eval_shape", "jit", "device_put"):
        monkeypatch.setattr(jax, name, refuse)
    train(model, optimizer)


# -----------------------------------------------------------------------------------------------
# Groups
# -----------------------------------------------------------------------------------------------


def test_a_group_has_a_rate_a_decay_and_a_rule_of_its_own():
    model, alone = network(), network()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    optimizer = LearnedOptimizer(
        [
            {"params": first, "optimizer": optax.sgd(0.1), "lr": 0.5},
            {"params": last, "weight_decay": 0.2},
        ],
        optax.adam(0.01),
        lr=0.3,
    )
    twins = [
        torch.optim.SGD(alone[0].parameters(), lr=0.05),
        torch.optim.AdamW(alone[2].parameters(), lr=0.003, weight_decay=20.0),
    ]
    for _ in range(5):
        for net in (model, alone):
            net.zero_grad()
            loss_of(net).backward()
        optimizer.step()
        for twin in twins:
            twin.step()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_may_be_used_again():
    groups = [{"params": list(network().parameters()), "optimizer": optax.sgd(0.1)}]
    first, second = LearnedOptimizer(groups), LearnedOptimizer(groups)
    assert [*groups[0]] == ["params", "optimizer"]
    assert first.param_groups[0]["design"] == second.param_groups[0]["design"]


def test_a_group_is_a_run_of_its_own():
    model, alone = network(), network()
    groups = [{"params": layer.named_parameters()} for layer in (model[0], model[2])]
    optimizer = LearnedOptimizer(groups[:1], lopt.rnnprop())
    optimizer.add_param_group({**groups[1], "num_steps": 20, "optimizer": "lopt-1"})
    assert optimizer.needs == {"num_steps"}
    twins = [
        LearnedOptimizer(alone[0].named_parameters(), lopt.rnnprop()),
        LearnedOptimizer(alone[2].named_parameters(), "lopt-1", num_steps=20),
    ]
    for _ in range(3):
        for net in (model, alone):
            net.zero_grad()
            loss_of(net).backward()
        for each_one in (optimizer, *twins):
            each_one.step()
    assert_equal(model, alone)


def test_a_group_that_is_refused_is_not_there():
    optimizer = LearnedOptimizer(network().parameters(), lopt.small_mlp())
    with pytest.raises(ValueError, match=r"int32"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.int32)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": []})
    optimizer.step()


def test_pretrained_rates_and_decay():
    weights = {}
    for decay in (None, 0.06, 0.0):
        model = network()
        optimizer = LearnedOptimizer(model.parameters(), "lopt-1", lr=0.05, weight_decay=decay)
        assert optimizer.param_groups[0]["weight_decay"] == (0.06 if decay is None else decay)
        assert not optimizer.needs
        train(model, optimizer)
        weights[decay] = model[0].weight
    assert torch.equal(weights[None], weights[0.06])
    assert not torch.equal(weights[0.06], weights[0.0])
    # As `lopt.pretrained` has them: the guard's share is that of the rate.
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in network().named_parameters()}
    theirs = lopt.pretrained("lopt-1", learning_rate=0.05, axes="out_in", weight_decay=0.06)
    state, model = theirs.init(params), network()
    for _ in range(4):
        loss_of(model).backward()
        grads = {n: jnp.asarray(p.grad.numpy()) for n, p in model.named_parameters()}
        updates, state = theirs.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.tensor(np.asarray(params[n])))
        model.zero_grad()
    torch.testing.assert_close(model[0].weight, weights[0.06], rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------------------------
# Steps
# -----------------------------------------------------------------------------------------------


def test_a_closure_and_a_loss_are_the_same():
    models = network(), network(), network()
    given = [make(model, "velo_small") for model in models]
    assert given[0].needs == {"loss", "num_steps"}
    for _ in range(3):
        for model, optimizer in zip(models, given, strict=True):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                return loss

            if model is models[0]:
                assert optimizer.step(closure).requires_grad
            else:
                loss = closure()
                optimizer.step(loss=loss if model is models[1] else loss.item())
    assert_equal(models[0], models[1])
    assert_equal(models[0], models[2])


def test_parameters_without_gradient_stay_with_their_state():
    model = network()
    optimizer = make(model, "velo_small")
    train(model, optimizer, 2)
    before = copy.deepcopy(model)
    states = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    model[0].weight.grad = None  # the first, which keeps what all share
    optimizer.step(loss=loss)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)
    for name, tensor in optimizer.state[model[0].weight].items():
        same = torch.equal(tensor, states["0.weight"][name])
        assert same or name.startswith("shared.")
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    now = copy.deepcopy(model)
    optimizer.step()
    assert_equal(model, now)


def test_updates_may_be_what_the_state_was():
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -g, state), grads

    late = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: 0 * p, params), update
    )
    weight = nn.Parameter(torch.zeros(2))
    optimizer = LearnedOptimizer([weight], late)
    for step in range(1, 4):
        weight.grad = torch.full((2,), float(step))
        optimizer.step()
    assert weight.tolist() == [-3.0, -3.0]


def test_clipping_and_accumulation():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    for _ in range(3):
        optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (0.5 * loss_of(model, X[part], Y[part])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        other.zero_grad(set_to_none=False)
        loss_of(twin).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_scaler():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model)
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:  # is left out
            train(twin, other, 1)
    assert scaler.get_scale() == 512.0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hooks():
    model, seen = network(), []
    optimizer = make(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 1)
    assert seen == ["before", "after"]


def test_averaged_models():
    model = network()
    optimizer, averaged = make(model), torch.optim.swa_utils.AveragedModel(model)
    path = []
    for _ in range(3):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        path.append(model[0].weight.detach().clone())
    torch.testing.assert_close(averaged.module[0].weight, torch.stack(path).mean(0))


def test_parametrized_modules():
    def build(layer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        layer(model[0])
        return model

    models = [
        build(nn.utils.parametrizations.weight_norm),
        build(nn.utils.parametrizations.orthogonal),
        build(lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Doubled())),
    ]
    for model in models:
        losses = train(model, make(model, "lopt-1"), 20)
        assert losses[-1] < losses[0]
        names = lopt.torch.axes_of(model)
        originals = [n for n in names if "original" in n and model.get_parameter(n).ndim == 2]
        assert originals
        assert all(names[n] == (1, 0) for n in originals)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


# -----------------------------------------------------------------------------------------------
# Precision
# -----------------------------------------------------------------------------------------------


@each
def test_bfloat16(name):
    model = network(torch.bfloat16)
    optimizer = make(model, name)
    floats = [t for s in optimizer.state.values() for t in s.values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    losses = train(model, optimizer, 10)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert np.isfinite(losses).all()
    assert losses[-1] != losses[0]


def test_gradients_of_another_precision_and_groups_of_two():
    model = network()
    model[2].to(torch.float64)
    optimizer = make(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model)
    optimizer.step()
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert not torch.equal(a, b)


# -----------------------------------------------------------------------------------------------
# Checkpoints and copies
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@each
def test_a_resumed_run_equals_an_uninterrupted_one(name, dtype):
    whole, model = network(dtype), network(dtype)
    train(whole, make(whole, name), 6)
    optimizer = make(model, name)
    train(model, optimizer, 3)
    weights, state = saved(model.state_dict()), saved(optimizer.state_dict())
    model = network(dtype)
    model.load_state_dict(weights)
    optimizer = make(model, name)
    optimizer.load_state_dict(state)
    train(model, optimizer, 3)
    assert_equal(model, whole)


def test_a_state_brings_rates_with_it():
    model = network()
    optimizer = make(model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 2, scheduler)
    fresh = make(network())
    fresh.load_state_dict(saved(optimizer.state_dict()))
    assert fresh.param_groups[0]["lr"] == 0.25
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    train(model, optimizer, 1)


@few
def test_copies_and_pickles_go_on(name):
    model = network()
    optimizer = make(model, name)
    train(model, optimizer, 2)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 3)
    for other, copied in pairs:
        train(other, copied, 3)
        assert_equal(model, other)
    copied.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})


# -----------------------------------------------------------------------------------------------
# Schedulers
# -----------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 8, cycle_momentum=False),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def test_every_scheduler_is_in_the_table():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    ends, rates = [], []
    for make_one in (
        lambda params: LearnedOptimizer(params, optax.sgd(1.0), lr=0.2),
        lambda params: torch.optim.SGD(params, lr=0.2),
    ):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = make_one([weight])
        scheduler, used = SCHEDULERS[name](optimizer), []
        for _ in range(6):
            weight.grad = torch.ones(2)
            before = weight.detach().clone()
            optimizer.step()
            used.append((before - weight.detach())[0].item())
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
        ends.append(weight.detach())
        rates.append(used)
    torch.testing.assert_close(*ends)
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)
    assert len(set(np.round(rates[0], 5))) > 1


def test_a_rate_may_be_a_tensor():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = LearnedOptimizer([weight], optax.sgd(1.0), lr=torch.tensor(0.5))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert weight.tolist() == [-0.75, -0.75]


# -----------------------------------------------------------------------------------------------
# Compiled
# -----------------------------------------------------------------------------------------------


# In a process of its own, where functions are as users have them: without checks of types.
COMPILED = """
import sys
import torch
import lopt
from lopt.torch import LearnedOptimizer

name, backend = sys.argv[1:]
options = {"lopt-1": {"num_steps": 20}, "velo_small": {"num_steps": 20}}.get(name, {})
rule = name if name == "lopt-1" else getattr(lopt.learned, name)()
x = torch.randn(16, 3)
ends = []
for compiled in (True, False):
    torch.manual_seed(0)
    # Wide: a matrix that an eager step works on in slabs.
    width = 200 if name == "small_mlp" else 5
    last = torch.nn.Linear(width, width)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), last)
    optimizer = LearnedOptimizer.for_module(model, rule, **options)
    step = optimizer.step
    if compiled:
        step = torch.compile(step, fullgraph=True, backend=backend)
    for count in range(6):
        optimizer.param_groups[0]["lr"] = 0.9**count
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if count == 4:
            model[0].weight.grad = None
        step(loss=loss.detach())
    ends.append([p.detach() for p in model.parameters()])
# Once for a number, once for any, and for another set of gradients.
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [("small_mlp", "aot_eager"), *((name, "inductor") for name in DESIGNS)]
)
def test_a_compiled_step_is_the_eager_one(name, backend, tmp_path):
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    # PyTorch's own compiler is warned of what PyTorch deprecates.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    subprocess.run([sys.executable, *warnings, script, name, backend], check=True)


# -----------------------------------------------------------------------------------------------
# Bad input
# -----------------------------------------------------------------------------------------------


def of(tensor, *arguments, **options):
    return LearnedOptimizer(
        [nn.Parameter(tensor, tensor.is_floating_point())], *arguments, **options
    )


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(2, dtype=torch.int32), "torch.int32"),
        (torch.ones(2, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "on the meta device"),
    ],
    ids=["integers", "complex", "float8", "sparse", "meta"],
)
def test_parameters_that_are_refused(tensor, what):
    with pytest.raises(ValueError, match=rf"parameter 0 is {what}.*leave it out, or convert"):
        of(tensor, lopt.small_mlp())


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: of(torch.ones(2)), r"'lopt-1'.*try num_steps=1000, or lr=0.05"),
        (lambda: of(torch.ones(2), lopt.velo_small()), r"length of the run; try num_steps=1000"),
        (lambda: of(torch.ones(2), lopt.dm(), layout="row"), r"layout='row'.*'torch' or 'jax'"),
        (lambda: of(torch.ones(2), lopt.dm(), lr=-1.0), r"lr=-1.0\) must be at least 0; try 0.1"),
        (lambda: of(torch.ones(2), lopt.dm(), weight_decay=-1.0), r"weight_decay=-1.0\)"),
        (
            lambda: LearnedOptimizer([{"params": nn.Linear(2, 2).parameters(), "optimizer": None}]),
            r"optimizer=None\) is no optimizer; try \"lopt-1\"",
        ),
        (lambda: of(torch.ones(2), "lopt-1", lopt.load("lopt-1")[1]), r"leave theta out"),
        (
            lambda: of(torch.ones(2), lopt.dm(), lopt.dm((3,)).init(jax.random.key(0))),
            r"another design or size",
        ),
    ],
    ids=["rate", "num_steps", "layout", "negative", "decay", "none", "theta", "weights"],
)
def test_arguments_that_are_refused(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()


def test_a_name_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"no file lopt-2.*lopt pretrained lists"):
        of(torch.ones(2), "lopt-2")


def test_a_step_without_the_loss_it_needs():
    model = network()
    optimizer = make(model, "velo_small")
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"needs the loss; try optimizer.step\(loss=loss\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"needs the loss"):
        optimizer.step(lambda: None)


def test_a_sparse_gradient():
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = LearnedOptimizer(table.parameters(), lopt.small_mlp())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \[4, 3\] is sparse; make it dense"):
        optimizer.step()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), r"the state is that of None"),
        (lambda m: make(m, "rnnprop"), r"the state is that of .*make the optimizer with"),
        (lambda m: make(m, layout="jax"), r"layout='jax'.*layout='torch'"),
        (lambda m: make(m, num_steps=7), r"num_steps=7"),
        (lambda m: make(nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))), r"the shapes"),
        (
            lambda m: LearnedOptimizer([{"params": [p]} for p in m.parameters()], lopt.dm()),
            r"make the optimizer with|different number of parameter groups",
        ),
    ],
    ids=["adam", "design", "layout", "length", "shape", "groups"],
)
def test_states_that_are_refused(other, message):
    model = network()
    optimizer = make(model)
    state = other(model).state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    train(model, optimizer, 1)


def test_without_pytorch():
    program = """
import sys
sys.modules["torch"] = None
import lopt
assert not hasattr(lopt, "LearnedOptimizer")
try:
    import lopt.torch
except ImportError as error:
    assert 'pip install "lopt[torch]"' in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_lopt_does_not_import_pytorch():
    program = """
import sys
import lopt
for name in lopt.__all__:
    getattr(lopt, name)
assert "torch" not in sys.modules and "lopt.torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
