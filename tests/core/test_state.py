"""The state of a learned optimizer looks like params, and axes tell tensors apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.core.tensors import mirror, unmirror

KEY = jax.random.key(0)
SHAPES = {"b": (3,), "w": (4, 3), "same": (4, 3), "s": (), "k": (2, 3, 5), "large": (12, 10)}
RULES = {
    "small_mlp": lopt.small_mlp((4,)),
    "adafactor_mlp": lopt.adafactor_mlp(),
    "dm": lopt.dm((3,)),
    "rnnprop": lopt.rnnprop("mt+gt+mom5", (3,), 3),
}

NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n in ("small_mlp", "dm"))) for n in RULES]


def normal(index, shape, dtype=float):
    return jax.random.normal(jax.random.fold_in(KEY, index), shape, dtype)


def rule(name, **changes):
    """Returns a rule that cuts tensors of more than 64 coordinates, and weights, none zero."""
    learned = dataclasses.replace(RULES[name], block_size=64, **changes)
    theta = learned.init(KEY)
    return learned, jax.tree.map(lambda w: w + 0.02 * normal(w.size, w.shape), theta)


def tree(offset=0):
    return {name: normal(offset + i, shape) for i, (name, shape) in enumerate(SHAPES.items())}


def assert_close(ours, theirs, rtol=1e-10):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13), ours, theirs)


def steps(learned, theta, params, grads, number=2):
    optimizer = learned.optimizer(theta)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(number):
        bent = jax.tree.map(lambda g, i=i: jnp.sin((1 + i) * g), grads)
        updates, state = update(bent, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", NAMES)
def test_every_array_mirrors_its_leaf(name):
    learned, theta = rule(name)
    params = tree()
    optimizer = learned.optimizer(theta)
    _, state = steps(learned, theta, params, tree(10))
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(params))
    seen = []

    def check(array, leaf):
        _, *shape = array.shape
        factored = [leaf.shape[:i] + leaf.shape[i + 1 :] for i in range(leaf.ndim)]
        assert tuple(shape) in (leaf.shape, *factored)
        seen.append(tuple(shape) == leaf.shape)
        return array + 1

    mapped = optax.tree_map_params(optimizer, check, state, params)
    assert any(seen)
    assert mapped.step == state.step == 2
    for ours, theirs in zip(
        jax.tree.leaves((mapped.features, mapped.memory)),
        jax.tree.leaves((state.features, state.memory)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs + 1)
    assert len(seen) == len(jax.tree.leaves((state.features, state.memory)))


def test_mirror_and_back():
    like = {"a": jnp.zeros((2, 1)), "b": (jnp.zeros((1, 1)),)}
    params = {"x": jnp.ones(3), "y": [jnp.ones(2), None]}
    structure = jax.tree.structure(params)
    states = [jax.tree.map(lambda leaf, i=i: leaf + i, like) for i in range(2)]
    mirrored = mirror(states, like, structure)
    assert jax.tree.structure(mirrored["b"][0]) == structure
    assert mirrored["a"]["y"][0][0] == 1
    assert_close(unmirror(mirrored, structure), states)
    with pytest.raises(ValueError, match=r"not a state of these params; begin with"):
        unmirror(mirrored, jax.tree.structure({"x": 0}))
    assert unmirror((), structure) == [(), ()]


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_are_tensors_of_their_own(name):
    """Layers stacked for a scan are updated as if they were apart; two names, two axes."""
    learned, theta = rule(name, stacked=("blocks", "heads"))
    apart, _ = rule(name)
    number = 3
    stacked = {
        "blocks": {"w": normal(0, (number, 4, 5)), "b": normal(1, (number, 5))},
        "head": normal(2, (5, 2)),
        "blocks_2": {"heads": {"w": normal(3, (2, 12, 10)), "s": normal(4, (2,))}},
    }
    stacked["blocks"]["heads"] = {"v": normal(5, (number, 2, 7))}
    grads = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), stacked)

    def unstack(tree):
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]) for i in range(number)]
        for layer in layers:
            layer["heads"] = [
                jax.tree.map(lambda leaf, i=i: leaf[i], layer["heads"]) for i in (0, 1)
            ]
        two = [jax.tree.map(lambda x, i=i: x[i], tree["blocks_2"]["heads"]) for i in (0, 1)]
        return {"layers": layers, "head": tree["head"], "two": two}

    together, state = steps(learned, theta, stacked, grads)
    alone, _ = steps(apart, theta, unstack(stacked), unstack(grads))
    assert_close(unstack(together), alone)
    for leaf in jax.tree.leaves(state.features):
        assert leaf.shape[0] < 10  # the bank, in front of stacked axes
    optax.tree_map_params(learned.optimizer(theta), lambda a, p: a, state, stacked)


def test_stacked_axes_that_are_not_there_are_refused():
    learned, theta = rule("small_mlp", stacked="blocks")
    with pytest.raises(ValueError, match=r"needs more axes than \['blocks'\] has"):
        learned.begin(theta, {"blocks": jnp.ones(())})


@pytest.mark.parametrize("name", NAMES)
def test_leaves_without_gradient_or_size_are_treated_as_optax_does(name):
    learned, theta = rule(name)
    params = {
        "a": normal(0, (3, 2)),
        "none": None,
        "frozen": normal(1, (3, 2)),
        "void": jnp.ones((0, 3)),
    }
    grads = params | {"a": normal(2, (3, 2)), "frozen": None}
    optimizer, adam = learned.optimizer(theta), optax.sgd(0.1)
    state = optimizer.init(params)
    updates, new = jax.jit(optimizer.update)(grads, state, params)
    expected, _ = adam.update(grads, adam.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(expected)
    assert updates["frozen"] is None
    assert updates["void"].shape == (0, 3)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    alone, _ = jax.jit(optimizer.update)(
        {"a": grads["a"]}, optimizer.init({"a": params["a"]}), {"a": params["a"]}
    )
    np.testing.assert_allclose(updates["a"], alone["a"], rtol=1e-10)
    masked = optax.masked(optimizer, {"a": True, "frozen": False, "void": True, "none": None})
    updates, _ = masked.update(params, masked.init(params), params)
    np.testing.assert_array_equal(updates["frozen"], params["frozen"])


def test_the_program_grows_with_shapes_and_not_with_tensors():
    def operations(layers):
        learned, theta = rule("adafactor_mlp")
        params = {f"w{i}": jnp.ones((4, 3)) for i in range(layers)}
        params |= {f"large{i}": jnp.ones((12, 10)) for i in range(layers)}
        optimizer = learned.optimizer(theta)
        state = optimizer.init(params)
        jaxpr = jax.make_jaxpr(optimizer.update)(params, state, params)
        return sum(1 for equation in _equations(jaxpr.jaxpr) if equation.primitive.name in WORK)

    assert operations(12) == operations(3)


WORK = {"rsqrt", "exp", "tanh", "dot_general", "reduce_sum", "max", "div"}


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_what_the_rule_is_given(name):
    """With them the rule's outputs, scaled, are the update of every coordinate."""
    learned, theta = rule(name)
    params, grads = tree(), tree(10)
    _, state = steps(learned, theta, params, grads)
    inputs = jax.jit(learned.inputs)(theta, grads, state, params)
    apply = jax.jit(learned.rule.apply)
    outputs, _ = apply(theta["rule"], inputs.columns, inputs.shared, inputs.memory)
    updates, _ = jax.jit(learned.update)(theta, grads, state, params)
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(updates)])
    np.testing.assert_allclose(learned.scale(outputs), flat, rtol=1e-9, atol=1e-14)
    names = learned.features.names()
    if "gradient" in names and not learned.normalise:
        raw = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        np.testing.assert_allclose(inputs.columns[names.index("gradient")], raw)
    few = inputs.at(jnp.array([4, 1, 10**6]))
    np.testing.assert_array_equal(few.columns[:, :2], inputs.columns[:, jnp.array([4, 1])])
    assert jnp.isnan(few.columns[:, 2]).all()
