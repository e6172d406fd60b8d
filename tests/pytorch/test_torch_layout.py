"""Layout is meaning: the same network trains alike in PyTorch's layout and in Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from lopt.torch import LearnedOptimizer, axes_of  # noqa: E402

# Adam is Optax's.
pytestmark = pytest.mark.standard_promotion

RNG = np.random.default_rng(0)
WORDS, IMAGES = RNG.integers(7, size=(16, 6)), RNG.normal(size=(16, 2, 5, 5))
LABELS = RNG.integers(3, size=16)


class Network(nn.Module):
    """Words and images: an embedding, a convolution, a norm and square and other matrices."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.kernel = nn.Conv2d(2, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.square = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, words, images):
        seen = torch.tanh(self.kernel(images)).mean((2, 3))
        hidden = self.norm(self.table(words).mean(1) + seen)
        return self.last(torch.tanh(self.square(hidden)))


def flax_layout(model):
    """Returns parameters as Flax has them: (inputs, outputs), and kernels (height, width, ...)."""
    found = {n: p.detach().numpy() for n, p in model.named_parameters()}
    axes = {"kernel.weight": (2, 3, 1, 0), "square.weight": (1, 0), "last.weight": (1, 0)}
    arrays = {n: np.transpose(a, axes.get(n)) if n in axes else a for n, a in found.items()}
    arrays["table.embedding"] = arrays.pop("table.weight")
    return {n: jnp.asarray(a) for n, a in arrays.items()}


def flax_loss(params):
    """The same network, as Flax's layers compute it."""
    images = jnp.asarray(IMAGES.transpose(0, 2, 3, 1))
    numbers = jax.lax.conv_dimension_numbers(
        images.shape, params["kernel.weight"].shape, ("NHWC", "HWIO", "NHWC")
    )
    seen = jax.lax.conv_general_dilated(
        images, params["kernel.weight"], (1, 1), "VALID", dimension_numbers=numbers
    )
    seen = jnp.tanh(seen + params["kernel.bias"][None, None, None]).mean((1, 2))
    hidden = params["table.embedding"][WORDS].mean(1) + seen
    hidden = hidden - hidden.mean(-1, keepdims=True)
    hidden = hidden / jnp.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5)
    hidden = hidden * params["norm.weight"][None] + params["norm.bias"][None]
    hidden = jnp.tanh(hidden @ params["square.weight"] + params["square.bias"][None])
    logits = hidden @ params["last.weight"] + params["last.bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABELS)).mean()


def rules():
    learned = lopt.adafactor_mlp()
    theta = learned.init(jax.random.key(0))
    yield "lopt-1", ("lopt-1",), lopt.pretrained("lopt-1", 12), {"num_steps": 12}
    yield "adafactor_mlp", (learned, theta), learned.optimizer(theta), {}


def losses_of(model, optimizer, steps):
    words, images, labels = map(torch.tensor, (WORDS, IMAGES, LABELS))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(words, images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network():
    torch.manual_seed(0)
    return Network().to(torch.float64)


@pytest.mark.parametrize("name", ["lopt-1", pytest.param("adafactor_mlp", marks=pytest.mark.slow)])
def test_the_same_network_in_both_layouts(name):
    arguments, theirs, options = {n: rest for n, *rest in rules()}[name]
    model = network()
    params = flax_layout(model)
    losses = losses_of(model, LearnedOptimizer.for_module(model, *arguments, **options), 10)
    state, expected = theirs.init(params), []

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(flax_loss)(params)
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(10):
        params, state, loss = step(params, state)
        expected.append(float(loss))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # In the other layout it is another rule.
    other = network()
    other = losses_of(
        other, LearnedOptimizer.for_module(other, *arguments, layout="jax", **options), 10
    )
    assert not np.allclose(other, expected, rtol=1e-6)


def test_names_and_ranks_tell_as_much_of_most_networks():
    ends = []
    for make in (
        LearnedOptimizer.for_module,
        lambda model, *rest, **options: LearnedOptimizer(
            model.named_parameters(), *rest, **options
        ),
    ):
        model = network()
        # A name that says what it is; `for_module` knows by the type.
        model.embedding, model.table = model.table, None
        model.forward = lambda words, images, m=model: m.last(m.square(m.embedding(words).mean(1)))
        ends.append(losses_of(model, make(model, "lopt-1", num_steps=5), 5))
    assert ends[0] == ends[1]


def test_axes_by_type():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 3, 5),
            "transposed": nn.ConvTranspose2d(2, 3, 5),
            "rnn": nn.LSTM(2, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "table": nn.Embedding(5, 4),
            "norm": nn.LayerNorm([2, 3]),
        }
    )
    axes = axes_of(model)
    assert axes["conv.weight"] == (2, 1, 0)
    assert axes["transposed.weight"] == (2, 3, 0, 1)
    assert axes["rnn.weight_hh_l0"] == axes["attention.in_proj_weight"] == (1, 0)
    assert axes["attention.out_proj.weight"] == (1, 0)
    assert axes["table.weight"] == axes["norm.weight"] == (0, 1)
    assert axes["conv.bias"] == (0,)
