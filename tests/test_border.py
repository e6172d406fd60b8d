"""The law of the border: `learned.optimizer(theta)` is an Optax optimizer like any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt

KEY = jax.random.key(0)
nesterov = functools.partial(optax.sgd, nesterov=True)

HAND_MADE = {
    "LearnableSGD": lopt.LearnableSGD(),
    "LearnableAdam": lopt.LearnableAdam(),
    "sgd": lopt.learnable(optax.sgd, learning_rate=1e-3),
    "momentum": lopt.learnable(optax.sgd, learning_rate=1e-3, momentum=0.9),
    "nesterov": lopt.learnable(nesterov, learning_rate=1e-3, momentum=0.9),
    "rmsprop": lopt.learnable(optax.rmsprop, learning_rate=5e-3, decay=0.9),
    "adamw": lopt.learnable(optax.adamw, learning_rate=1e-3, b1=0.9, weight_decay=1e-4),
    "lion": lopt.learnable(optax.lion, learning_rate=1e-3, b1=0.9, b2=0.99),
    "adafactor": lopt.learnable(optax.adafactor, learning_rate=5e-3),
    "decay": lopt.learned.inverse_time_momentum(1e-3, 0.9, power=0.1),
}
RULES = {"small_mlp": lopt.small_mlp((4,)), "adafactor_mlp": lopt.adafactor_mlp()}

PARAMS = {
    "a": jnp.array([0.5, -1.0, 2.0]),
    "deep": [{"w": jnp.ones((2, 3))}, (jnp.array(0.3, float),)],
}
GRADS = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), PARAMS)
VALUE = jnp.array(1.7, float)

APART = lopt.learned.per_tensor(1e-3, like=PARAMS)
ALL = HAND_MADE | RULES | {"per tensor": lopt.learnable(optax.adam, learning_rate=APART, b1=0.9)}
each = pytest.mark.parametrize("name", ALL)


def assert_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, theirs)


@each
def test_is_an_optax_optimizer(name):
    learned = ALL[name]
    theta = learned.init(KEY)
    optimizer = learned.optimizer(theta)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    leaves = jax.tree.leaves(optimizer)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    for weight in jax.tree.leaves(theta):
        assert any(weight is leaf for leaf in leaves)
    # As an argument of a compiled function, as a closure, and compiled itself.
    state = optimizer.init(PARAMS)
    expected = jax.jit(optimizer.update)(GRADS, jax.jit(optimizer.init)(PARAMS), PARAMS)
    passed = jax.jit(lambda o, *args: o.update(*args))(optimizer, GRADS, state, PARAMS)
    assert_close(passed, expected)
    # With extra arguments that it does not know, and with the loss.
    with_extra = jax.jit(
        lambda state: optimizer.update(GRADS, state, PARAMS, value=VALUE, unheard_of=jnp.ones(2))
    )
    assert_close(with_extra(state), expected)
    updates, _ = expected
    assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(updates))


@each
def test_other_weights_do_not_retrace_and_matter(name):
    learned, traces = ALL[name], 0

    @jax.jit
    def step(optimizer, grads, state, params):
        nonlocal traces
        traces += 1
        updates, state = optimizer.update(grads, state, params, value=VALUE)
        return optax.apply_updates(params, updates), state

    params, theta = PARAMS, learned.init(KEY)
    state = learned.optimizer(theta).init(params)
    ends = []
    for i in range(3):
        other = jax.tree.map(lambda leaf, i=i: leaf + 0.1 * i, theta)
        assert_like(state, step(learned.optimizer(other), GRADS, state, params)[1])
        ends.append(step(learned.optimizer(other), GRADS, state, params)[0]["a"])
        params, state = step(learned.optimizer(theta), GRADS, state, params)
    assert traces == 1
    first = step(learned.optimizer(theta), GRADS, state, params)[0]["a"]
    large = jax.tree.map(lambda leaf: leaf + 0.2, theta)
    assert jnp.abs(step(learned.optimizer(large), GRADS, state, params)[0]["a"] - first).max() > 0
    assert traces == 1


def assert_like(ours, theirs):
    """Checks structure, shapes and dtypes, weak types included."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_of_params_are_kept(name, dtype):
    learned = ALL[name]
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), learned.init(KEY))
    params, grads = jax.tree.map(lambda leaf: leaf.astype(dtype), (PARAMS, GRADS))
    optimizer = learned.optimizer(theta)
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for _ in range(2):
        updates, new = update(grads, state, params)
        assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
            lambda p: (p.shape, p.dtype), params
        )
        assert_like(new, state)
        state = new


@each
def test_composes_with_chain(name):
    learned = ALL[name]
    theta = learned.init(KEY)

    @jax.jit
    def chained(theta, grads, params):
        optimizer = optax.chain(optax.clip(0.1), learned.optimizer(theta), optax.scale(0.5))
        return optimizer.update(grads, optimizer.init(params), params, value=VALUE)[0]

    clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -0.1, 0.1), GRADS)
    optimizer = learned.optimizer(theta)
    alone, _ = optimizer.update(clipped, optimizer.init(PARAMS), PARAMS, value=VALUE)
    assert_close(chained(theta, GRADS, PARAMS), jax.tree.map(lambda leaf: 0.5 * leaf, alone))


@each
def test_states_mirror_params(name):
    optimizer = ALL[name].optimizer(ALL[name].init(KEY))
    state = optimizer.init(PARAMS)
    mapped = optax.tree_map_params(optimizer, lambda leaf, p: leaf + 0 * leaf, state, PARAMS)
    assert_like(mapped, state)


TWINS = {
    "LearnableSGD": optax.sgd(0.01),
    "LearnableAdam": optax.adam(1e-3, eps_root=1e-8),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "nesterov": optax.sgd(1e-3, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(5e-3, decay=0.9),
    "adamw": optax.adamw(1e-3, weight_decay=1e-4),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(5e-3),
    "decay": optax.sgd(lambda step: 1e-3 / (1 + step / 5000) ** 0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", TWINS)
def test_initial_weights_are_the_optimizer_as_it_was(name):
    def run(optimizer):
        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(3):
            grads = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    with jax.numpy_dtype_promotion("standard"):
        ours = jax.jit(run)(HAND_MADE[name].optimizer(HAND_MADE[name].init(KEY)))
        theirs = jax.jit(lambda: run(TWINS[name]))()
    moved = optax.tree.norm(optax.tree.sub(theirs, PARAMS))
    assert moved > 0
    assert optax.tree.norm(optax.tree.sub(ours, theirs)) < 1e-6 * moved


GOALS = {
    # As in Optax's own tests: from (-1, 10, 1) to (1, -1, 1), and from (0, 0) to (1, 1).
    "parabola": (
        lopt.tasks.Quadratic(2 * jnp.ones(3), jnp.array([1.0, -1.0, 1.0])),
        jnp.array([-1.0, 10.0, 1.0]),
        jnp.array([1.0, -1.0, 1.0]),
    ),
    "rosenbrock": (lopt.tasks.Rosenbrock(), jnp.zeros(2), jnp.ones(2)),
}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_ones_converge(name, goal):
    task, begin, end = GOALS[goal]
    learned = HAND_MADE[name]
    theta = learned.init(KEY)
    if (name, goal) == ("LearnableSGD", "rosenbrock"):
        theta = {"learning_rate": jnp.log(2e-3)}  # one hundredth is beyond its edge of stability
    optimizer = learned.optimizer(theta)
    state = lopt.start(task, optimizer, begin, KEY)
    state, losses = lopt.unroll(task, optimizer, state, 40_000)
    assert jnp.isfinite(losses).all()
    np.testing.assert_allclose(state.params, end, rtol=3e-2, atol=3e-2)
