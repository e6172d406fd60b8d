"""Every common way of using Optax, with a coordinatewise, a matrix and a tensorwise design."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt

pytestmark = pytest.mark.standard_promotion  # Optax's own pieces

KEY = jax.random.key(0)
STEPS = 4
RULES = {
    "adafactor_mlp": lopt.adafactor_mlp(),
    "lopt-1": lopt.learned.FallBack(lopt.learned.muon_mlp(2, weight_decay=0.1)),
    "velo_small": lopt.velo_small(),
}
# A tensorwise one takes as long as the others together.
SLOW = {"velo_small": [pytest.mark.slow]}
each = pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, [])) for n in RULES])


def weights(name):
    """Returns weights of which none is zero."""
    theta = RULES[name].init(KEY)
    return jax.tree.map(lambda w: w + 0.02 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), theta)


def make(name, **options):
    return RULES[name].optimizer(weights(name), STEPS, **options)


def network(key=KEY):
    shapes = {"hidden": {"b": (4,), "w": (3, 4)}, "last": {"b": (), "w": (4,)}}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [0.5 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    )


X = jax.random.normal(jax.random.key(1), (16, 3))
Y = jnp.sin(X.sum(1))


def loss_of(params, x=X, y=Y):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return jnp.mean((hidden @ params["last"]["w"] + params["last"]["b"] - y) ** 2)


def step(optimizer, params, state):
    value, grads = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


def train(optimizer, params=None, steps=STEPS):
    """Returns params after some steps, and the state."""
    params = network() if params is None else params
    state, one = optimizer.init(params), quick_jit(lambda *args: step(optimizer, *args))
    for _ in range(steps):
        params, state = one(params, state)
    return params, state


def close(ours, theirs, rtol=1e-9):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), ours, theirs)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@each
def test_rate_and_decay_are_those_of_a_chain(name):
    schedule = optax.linear_schedule(0.9, 0.1, STEPS)
    ours = make(name, learning_rate=schedule, weight_decay=0.1, mask=matrices)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        make(name),
        optax.add_decayed_weights(-0.1, matrices),
        optax.scale_by_learning_rate(schedule, flip_sign=False),
    )
    params, _ = train(optax.chain(optax.clip_by_global_norm(0.5), ours))
    close(params, train(theirs)[0])
    assert loss_of(params) != loss_of(network())


def test_a_rule_that_is_adam_takes_what_adamw_takes():
    learned = lopt.learnable(optax.adam, learning_rate=1.0)
    theta = learned.init(KEY)
    tree = matrices(network())
    for mask in (None, matrices, tree, {"hidden": True, "last": False}):
        ours = learned.optimizer(theta, learning_rate=0.01, weight_decay=0.1, mask=mask)
        close(train(ours)[0], train(optax.adamw(0.01, weight_decay=0.1, mask=mask))[0], 1e-6)
    decay = optax.linear_schedule(0.5, 0.1, STEPS)
    ours = learned.optimizer(theta, learning_rate=0.01, weight_decay=decay)
    close(train(ours)[0], train(optax.adamw(0.01, weight_decay=decay))[0], 1e-6)


def test_another_rate_decay_or_theta_is_not_compiled_again():
    learned, traces = lopt.LearnableSGD(0.1), []

    @jax.jit
    def run(optimizer, params):
        traces.append(optimizer)
        return step(optimizer, params, optimizer.init(params))[0]

    ends = []
    for rate, decay, weight in ((1.0, 0.1, 0.0), (0.5, 0.1, 0.0), (1.0, 0.2, 0.0), (1.0, 0.1, 0.1)):
        theta = jax.tree.map(lambda w, by=weight: w + by, learned.init(KEY))
        optimizer = learned.optimizer(
            theta, learning_rate=rate, weight_decay=jnp.asarray(decay), mask=matrices
        )
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(optimizer))
        ends.append(float(run(optimizer, network())["hidden"]["w"].sum()))
    assert len(traces) == 1
    assert len(set(ends)) == 4
    # Params are needed for what decays alone.
    grads = {"w": jnp.ones(2)}
    optimizer = learned.optimizer(learned.init(KEY), learning_rate=0.5)
    np.testing.assert_allclose(optimizer.update(grads, optimizer.init(grads))[0]["w"], -0.05)
    optimizer = learned.optimizer(learned.init(KEY), weight_decay=0.5)
    with pytest.raises(ValueError, match=r"params=None.*pass them"):
        optimizer.update(grads, optimizer.init(grads))


def test_rates_are_injected():
    learned, theta = RULES["adafactor_mlp"], weights("adafactor_mlp")
    schedule = optax.exponential_decay(1.0, 2, 0.5)
    made = optax.inject_hyperparams(learned.optimizer)
    expected = make("adafactor_mlp", learning_rate=schedule, weight_decay=0.1)
    params, state = train(made(theta, learning_rate=schedule, weight_decay=0.1))
    close(params, train(expected)[0], 1e-7)
    assert set(state.hyperparams) == {"learning_rate", "weight_decay"}
    # A number is changed between steps.
    optimizer = made(theta, learning_rate=1.0)
    params = network()
    state = optimizer.init(params)
    grads = jax.grad(loss_of)(params)
    update = quick_jit(optimizer.update)
    whole, _ = update(grads, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.25, jnp.float64)
    quarter, _ = update(grads, state, params)
    close(jax.tree.map(lambda u: u / 4, whole), quarter)


@each
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    optimizer = optax.MultiSteps(make(name), 2)

    @quick_jit
    def half(params, state, x, y):
        grads = jax.grad(loss_of)(params, x, y)
        updates, state = optimizer.update(grads, state, params, value=loss_of(params))
        return optax.apply_updates(params, updates), state

    params = network()
    state = optimizer.init(params)
    for _ in range(2):
        for rows in (slice(0, 8), slice(8, 16)):
            params, state = half(params, state, X[rows], Y[rows])
    close(params, train(make(name), steps=2)[0], 1e-7)


@each
def test_parts_of_a_model_have_optimizers_of_their_own(name):
    labels = {"hidden": "learned", "last": "sgd"}
    both = optax.multi_transform({"learned": make(name), "sgd": optax.sgd(0.1)}, labels)
    masked = optax.chain(
        optax.masked(make(name), {"hidden": True, "last": False}),
        optax.masked(optax.sgd(0.1), {"hidden": False, "last": True}),
    )
    params, _ = train(both)
    close(train(masked)[0], params)
    # The rule sees its part alone: it is given the gradients that it had in the run.
    alone = {"hidden": network()["hidden"]}
    now, optimizer = network(), make(name)
    state, last = optimizer.init(alone), optax.sgd(0.1)
    one = quick_jit(optimizer.update)
    for _ in range(STEPS):
        value, grads = jax.value_and_grad(loss_of)(now)
        alone = {"hidden": now["hidden"]}
        updates, state = one({"hidden": grads["hidden"]}, state, alone, value=value)
        updates["last"] = last.update(grads["last"], last.init(now["last"]))[0]
        now = optax.apply_updates(now, updates)
    close(params, now)


@each
def test_what_is_not_finite_is_left_out(name):
    optimizer = optax.apply_if_finite(make(name), 3)
    params = network()
    state = optimizer.init(params)
    update = quick_jit(lambda g, s, v: optimizer.update(g, s, params, value=v))
    grads = jax.grad(loss_of)(params)
    broken = grads | {"last": {"b": jnp.asarray(jnp.nan), "w": grads["last"]["w"]}}
    updates, skipped = update(broken, state, loss_of(params))
    if name != "lopt-1":  # whose guard has no step of its own for such a gradient
        assert skipped.total_notfinite == 1
        close(skipped.inner_state, state.inner_state)
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates))
    updates, _ = update(grads, skipped, loss_of(params))
    plain = make(name)
    update = quick_jit(plain.update)
    expected, _ = update(grads, plain.init(params), params, value=loss_of(params))
    close(updates, expected, 1e-7)


@each
def test_wrappers_of_contrib_train(name):
    free = optax.contrib.schedule_free(make(name), 0.1, b1=0.5)
    params, state = train(free)
    average = optax.contrib.schedule_free_eval_params(state, params)
    assert loss_of(average) < loss_of(network())
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1.0)
    # The rate is halved at every step, as no loss is below zero.
    _, state = train(optax.chain(make(name), plateau))
    halved = make(name, learning_rate=optax.exponential_decay(0.5, 1, 0.5))
    close(train(optax.chain(make(name), plateau))[0], train(halved)[0], 1e-6)


@each
def test_arguments_are_donated(name):
    optimizer = make(name, learning_rate=0.5)
    expected = train(optimizer)
    donating = jax.jit(
        lambda params, state: step(optimizer, params, state),
        donate_argnums=(0, 1),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    params = network()
    state = optimizer.init(params)
    for _ in range(STEPS):
        before = jax.tree.leaves((params, state))
        params, state = donating(params, state)
        assert all(leaf.is_deleted() for leaf in before if leaf.ndim > 1)
    close((params, state), expected)


@each
def test_seeds_are_mapped_over(name):
    optimizer, keys = make(name), jax.random.split(KEY, 3)

    @quick_jit
    @jax.vmap
    def run(params):
        return jax.lax.scan(
            lambda carry, _: (step(optimizer, *carry), None),
            (params, optimizer.init(params)),
            length=STEPS,
        )[0]

    many = run(jax.vmap(network)(keys))
    one = train(optimizer, network(keys[1]))
    close(jax.tree.map(lambda leaf: leaf[1], many), one, 1e-7)


@each
def test_half_precision_has_a_state_in_single(name):
    theta = jax.tree.map(lambda w: w.astype(jnp.float32), weights(name))
    optimizer = RULES[name].optimizer(
        theta, STEPS, learning_rate=0.5, weight_decay=0.1, mask=matrices
    )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network())
    grads = jax.tree.map(jnp.cos, params)
    state, value = optimizer.init(params), jnp.ones((), jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        updates, new = quick_jit(optimizer.update)(grads, state, params, value=value)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    wide = {leaf.dtype for leaf in jax.tree.leaves(new) if leaf.ndim}
    assert wide == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, grads))
    update = quick_jit(optimizer.update)
    exact, _ = update(single[1], optimizer.init(single[0]), single[0], value=value)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a.astype(float), b, rtol=0.02, atol=1e-4)


@each
def test_leaves_without_a_gradient_stay_with_their_state(name):
    optimizer = make(name, learning_rate=0.5, weight_decay=0.1)
    params = network()
    state, value = optimizer.init(params), jnp.ones(())
    grads = jax.grad(loss_of)(params)
    frozen = {"hidden": grads["hidden"], "last": None}
    updates, new = quick_jit(optimizer.update)(frozen, state, params, value=value)
    assert updates["last"] == {"b": None, "w": None}
    assert jax.tree.structure(new) == jax.tree.structure(state)
    alone = {"hidden": params["hidden"]}
    expected, _ = quick_jit(optimizer.update)(
        {"hidden": grads["hidden"]}, optimizer.init(alone), alone, value=value
    )
    close(updates["hidden"], expected["hidden"])


WRONG = {
    "missing": ({"a": {"x": jnp.ones(2)}}, r"grads\['a'\]\['y'\] is not there, .* is \(3,\)"),
    "more": (
        {"a": {"x": jnp.ones(2), "y": jnp.ones(3)}, "b": jnp.ones(1)},
        r"grads\['b'\] is \(1,\), params\['b'\] is not there",
    ),
    "shape": (
        {"a": {"x": jnp.ones(2), "y": jnp.ones(4)}},
        r"grads\['a'\]\['y'\] is \(4,\), params\['a'\]\['y'\] is \(3,\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*RULES, "LearnableAdam"])
def test_the_first_path_that_differs_is_named(name, wrong):
    learned = RULES.get(name, lopt.LearnableAdam())
    optimizer = learned.optimizer(learned.init(KEY), 9)
    params, (grads, said) = {"a": {"x": jnp.ones(2), "y": jnp.ones(3)}}, WRONG[wrong]
    with pytest.raises(ValueError, match=f"another structure than params: {said}; differentiate"):
        optimizer.update(grads, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (jnp.ones(2, int), "int64"),
        (jnp.ones(2, complex), "complex128"),
        (jnp.tanh, "ufunc|function|PjitFunction"),
        (jax.random.key(0), "key<fry>"),
    ],
)
def test_only_floats_are_trained(leaf, said):
    optimizer = lopt.LearnableAdam().optimizer(lopt.LearnableAdam().init(KEY))
    with pytest.raises(ValueError, match=rf"init\(params\): params\['n'\] is ({said}), and only"):
        optimizer.init({"n": leaf, "w": jnp.ones(2)})


@pytest.mark.parametrize("other", [optax.adam(0.1), make("adafactor_mlp"), make("lopt-1")])
def test_a_state_of_another_is_refused(other):
    optimizer, params = make("velo_small"), network()
    with pytest.raises(ValueError, match=r"begin with optimizer\.init\(params\)"):
        optimizer.update(params, other.init(params), params, value=jnp.ones(()))
