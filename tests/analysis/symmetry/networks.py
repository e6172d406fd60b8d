"""Networks whose symmetries are known, in double precision."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from toys import quick_jit

import lopt
from lopt.analysis.symmetry import Mixing, ModelLoss, Symmetry

CLASSES = 3


def double(tree, dtype=jnp.float64):
    """Returns a tree with its floating-point arrays in double precision, or another."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def cross_entropy(model, batch):
    inputs, labels = batch
    logits = jax.vmap(model)(inputs)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


class Inputs(eqx.Module):
    """Draws normal inputs of a shape, and labels."""

    shape: tuple[int, ...] = eqx.field(static=True)
    size: int = eqx.field(static=True, default=8)
    dtype: object = eqx.field(static=True, default=jnp.float64)

    def __call__(self, key):
        one, other = jax.random.split(key)
        inputs = jax.random.normal(one, (self.size, *self.shape), self.dtype)
        return inputs, jax.random.randint(other, (self.size,), 0, CLASSES)


def model_task(model, shape, size=8):
    return ModelLoss(double(model), cross_entropy, Inputs(shape, size))


def perceptron(activation, depth=1, size=8, seed=1):
    """4 inputs, hidden layers of 3 units, 3 classes: 27 params with one hidden layer."""
    model = eqx.nn.MLP(4, CLASSES, 3, depth, activation, key=jax.random.key(seed))
    return model_task(model, (4,), size)


class Normalised(eqx.Module):
    """4-3-3 with batch norm, in training mode: 33 params."""

    layers: tuple[eqx.nn.Linear, ...]
    gain: jax.Array
    shift: jax.Array
    epsilon: float = eqx.field(static=True)
    activation: object = eqx.field(static=True)

    def __init__(self, epsilon, activation, key):
        one, other = jax.random.split(key)
        self.layers = (eqx.nn.Linear(4, 3, key=one), eqx.nn.Linear(3, CLASSES, key=other))
        self.gain, self.shift = jnp.ones(3), jnp.zeros(3)
        self.epsilon, self.activation = epsilon, activation


def normalised_loss(model, batch):
    inputs, labels = batch
    rows = jax.vmap(model.layers[0])(inputs)
    rows = rows - jnp.mean(rows, axis=0, keepdims=True)
    rows = rows * jax.lax.rsqrt(jnp.mean(rows**2, axis=0, keepdims=True) + model.epsilon)
    rows = model.activation(rows * model.gain[None] + model.shift[None])
    return cross_entropy(model.layers[1], (rows, labels))


def normalised(epsilon, size=8, activation=jax.nn.relu):
    model = double(Normalised(epsilon, activation, jax.random.key(3)))
    return ModelLoss(model, normalised_loss, Inputs((4,), size))


class Attentive(eqx.Module):
    """Self-attention, a layer norm and two layers, on a sequence."""

    attention: eqx.nn.MultiheadAttention
    hidden: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    output: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(2, 4, qk_size=3, **biases, key=one)
        self.hidden = eqx.nn.Linear(4, 5, key=two)
        self.norm = eqx.nn.LayerNorm(5)
        self.output = eqx.nn.Linear(5, CLASSES, key=three)

    def __call__(self, rows):
        rows = jax.vmap(self.hidden)(self.attention(rows, rows, rows))
        return self.output(jnp.mean(jax.nn.relu(jax.vmap(self.norm)(rows)), axis=0))


def images(size=28, count=512, classes=10):
    """Random grey images: 784 pixels by default."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, size, size, 1), dtype=np.uint8)
    labels = random.integers(0, classes, count)
    return lopt.tasks.image_data(pixels, labels, None, None, num_classes=classes, size=size)


def start_at(task, optimizer, seed=0):
    """Returns a training state in double precision whose biases are not zero."""
    key = jax.random.key(seed)
    params = double(task.init(key))
    flat, restore = jax.flatten_util.ravel_pytree(params)
    flat = flat + 0.1 * jax.random.normal(key, flat.shape, flat.dtype)
    return lopt.start(task, optimizer, restore(flat), key)


def random_like(params, seed):
    """Returns normal params."""
    flat, restore = jax.flatten_util.ravel_pytree(params)
    return restore(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


def check_follows(generator, params):
    """Checks what a generator says of itself against its action."""
    direction = random_like(params, 1)

    @quick_jit
    def measure(params):
        flat = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])
        amounts = jnp.arange(1.0, generator.units + 1)
        act = jax.vmap(generator.act, in_axes=(None, 0))
        steps = 1e-5 * jnp.eye(generator.units)
        knows = generator.knows_conserved
        return {
            "at rest": generator.act(params, jnp.zeros(generator.units, jnp.float64)),
            "tangents": flat(generator.tangents(params)),
            "differences": (flat(act(params, steps)) - flat(act(params, -steps))) / 2e-5,
            "along": generator.along(params, direction),
            "lengths": generator.lengths(params),
            "combined": jax.flatten_util.ravel_pytree(generator.combine(params, amounts))[0],
            "gradient": flat(jax.jacobian(generator.conserved)(params)) if knows else None,
        }

    found = jax.device_get(measure(params))
    for a, b in zip(jax.tree.leaves(found["at rest"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
    tangents = found["tangents"]
    np.testing.assert_allclose(tangents, found["differences"], atol=1e-8)
    assert np.linalg.norm(tangents) > 1
    towards = np.asarray(jax.flatten_util.ravel_pytree(direction)[0])
    np.testing.assert_allclose(found["along"], tangents @ towards, atol=1e-12)
    np.testing.assert_allclose(
        found["lengths"], np.linalg.norm(tangents, axis=1), rtol=1e-12, atol=1e-14
    )
    amounts = np.arange(1.0, generator.units + 1)
    np.testing.assert_allclose(found["combined"], amounts @ tangents, atol=1e-10)
    if not generator.knows_conserved:
        with pytest.raises(ValueError, match="does not know what gradient flow"):
            generator.conserved(params)
    else:
        if isinstance(basis := getattr(generator, "symmetry", generator), Mixing):
            # Of a_ij and a_ji together, as only the symmetric part is conserved.
            size = basis.size
            turned = np.arange(generator.units).reshape(-1, size, size).mT.ravel()
            tangents = (tangents + tangents[turned]) / 2
        factor = 1 if isinstance(generator, Symmetry) and generator.motion == "shift" else 2
        np.testing.assert_allclose(found["gradient"], factor * tangents, atol=1e-12)
