"""Models of Flax, Equinox and Haiku, and checkpoints of orbax: each run equals the plain loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from toys import quick_jit

import lopt

pytestmark = pytest.mark.standard_promotion  # Optax's AdamW, in the guard

KEY = jax.random.key(0)
STEPS = 3
X = jax.random.normal(jax.random.key(1), (16, 3), jnp.float32)
Y = jnp.sin(X.sum(1, keepdims=True))
RULES = {
    "lopt-1": lopt.learned.FallBack(lopt.learned.muon_mlp(2)),
    "velo_small": lopt.velo_small(),
}
each = pytest.mark.parametrize("name", RULES)


def make(name, **options):
    return RULES[name].optimizer(RULES[name].init(KEY), STEPS, **options)


def plain(loss, params, optimizer, steps=STEPS, state=None):
    """Returns params and state after some steps of the plain loop."""

    @quick_jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def close(ours, theirs, rtol=1e-5):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 5, rngs=rngs)
        self.last = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.hidden(x)))


@each
def test_flax_nnx(name):
    model = Net(nnx.Rngs(0))
    graph, start = nnx.split(model)
    start = jax.tree.map(jnp.array, start)
    optimizer = nnx.Optimizer(model, make(name, learning_rate=0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads, value=loss)

    for _ in range(STEPS):
        step(model, optimizer)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params)(X) - Y) ** 2)

    params, _ = plain(loss, start, make(name, learning_rate=0.5))
    close(nnx.state(model, nnx.Param), params)
    assert loss(params) != loss(start)


class Perceptron(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(jnp.tanh(linen.Dense(5)(x)))


def test_flax_linen():
    model = Perceptron()
    params = model.init(KEY, X)["params"]

    def loss(params):
        return jnp.mean((model.apply({"params": params}, X) - Y) ** 2)

    # A train state passes no loss, which lopt-1 does not need.
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make("lopt-1"))
    step = quick_jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    for _ in range(STEPS):
        state = step(state)
    close(state.params, plain(loss, params, make("lopt-1"))[0])
    assert loss(state.params) < loss(params)


@each
def test_equinox_with_a_frozen_layer(name):
    model = eqx.nn.MLP(3, 1, 5, 1, jnp.tanh, key=KEY, dtype=jnp.float32)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    frozen = jax.tree.map(lambda leaf: True, params)
    frozen = eqx.tree_at(
        lambda m: m.layers[0], frozen, jax.tree.map(lambda _: False, params.layers[0])
    )
    optimizer = make(name)

    def loss(moving, still):
        predict = eqx.combine(eqx.combine(moving, still), static)
        return jnp.mean((jax.vmap(predict)(X) - Y) ** 2)

    @quick_jit
    def step(params, state):
        moving, still = eqx.partition(params, frozen)
        value, grads = jax.value_and_grad(loss)(moving, still)
        updates, state = optimizer.update(grads, state, params, value=value)
        return eqx.apply_updates(params, updates), state

    end, state = params, optimizer.init(params)
    for _ in range(STEPS):
        end, state = step(end, state)
    moving, still = eqx.partition(params, frozen)
    close(end.layers[0], params.layers[0], 0)
    expected, _ = plain(lambda moving: loss(moving, still), moving, make(name))
    close(end.layers[1], expected.layers[1])


@each
def test_dicts_of_haiku(name):
    sizes = {"mlp/~/linear_0": (3, 5), "mlp/~/linear_1": (5, 1)}
    params = {
        module: {
            "w": jnp.cos(jnp.arange(i * o, dtype=jnp.float32)).reshape(i, o),
            "b": jnp.zeros(o),
        }
        for module, (i, o) in sizes.items()
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def loss(params):
        first, last = (params[module] for module in sizes)
        hidden = jnp.tanh(X @ first["w"] + first["b"][None])
        return jnp.mean((hidden @ last["w"] + last["b"][None] - Y) ** 2)

    def loss_of_pairs(pairs):
        return loss({module: {"w": w, "b": b} for module, (w, b) in zip(sizes, pairs, strict=True)})

    # Names do not matter, nor does the order of leaves.
    pairs = [(layer["w"], layer["b"]) for layer in params.values()]
    ours, theirs = plain(loss, params, make(name))[0], plain(loss_of_pairs, pairs, make(name))[0]
    for layer, (w, b) in zip(ours.values(), theirs, strict=True):
        close((layer["w"], layer["b"]), (w, b))
    assert loss(ours) < loss(params)


@each
def test_a_run_resumed_from_orbax_is_the_uninterrupted_one(name, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer = make(name, learning_rate=optax.linear_schedule(1.0, 0.0, 2 * STEPS))
    params = {"w": jnp.linspace(-1.0, 1.0, 3, dtype=jnp.float32)[:, None]}

    def loss(params):
        return jnp.mean((jnp.tanh(X @ params["w"]) - Y) ** 2)

    whole = plain(loss, params, optimizer, 2 * STEPS)
    half = plain(loss, params, optimizer)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "half", half)
        saver.wait_until_finished()
        like = jax.eval_shape(lambda: (params, optimizer.init(params)))
        back = saver.restore(tmp_path / "half", like)
    assert jax.tree.structure(back) == jax.tree.structure(half)
    close(plain(loss, back[0], optimizer, STEPS, back[1]), whole, 0)
