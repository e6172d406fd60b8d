"""Coordinatewise rules against a slow twin: one coordinate at a time, in plain Python."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.learned import MLP, DirectionMagnitude, MomentumFeatures

KEY = jax.random.key(0)
PRESETS = [lopt.small_mlp, lopt.adafactor_mlp]
TIMES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)


def normal(index, shape, dtype=float):
    return jax.random.normal(jax.random.fold_in(KEY, index), shape, dtype)


def build(preset):
    """Returns a rule with large steps, and weights of which none is zero."""
    learned = preset(hidden=(4, 3), exp_multiplier=0.3, step_multiplier=0.5)
    theta = learned.init(KEY)
    return learned, jax.tree.map(lambda w: w + 0.02 * normal(w.size, w.shape), theta)


def momentum_columns(theta, history, param):
    """Yields the columns of `MomentumFeatures` from all gradients up to now."""
    yield history[-1]
    yield param
    for decay in (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999):
        yield average(decay, history)


def average(decay, history):
    """Returns sum_i (1 - decay) decay^(t - i) g_i, the momentum without its recursion."""
    age = reversed(range(len(history)))
    return sum((1 - decay) * decay**a * value for a, value in zip(age, history, strict=True))


def adafactor_columns(theta, history, param):
    """Yields the columns of `AdafactorFeatures` from all gradients up to now."""

    def learned(name, initial):
        return [
            1 - math.exp(10 * (math.log(1 - d) / 10 + float(shift)))
            for d, shift in zip(initial, theta[name], strict=True)
        ]

    momenta = [average(d, history) for d in learned("momentum_decays", (0.9, 0.99, 0.999))]
    (rms,) = (average(d, [g * g for g in history]) for d in learned("rms_decays", (0.999,)))
    rows, cols, factors, momentum_factors = [], [], [], []
    for decay in learned("adafactor_decays", (0.9, 0.99, 0.999)):
        second = average(decay, [g * g + 1e-30 for g in history])
        if param.ndim < 2:
            rows.append(second)
            cols.append(second)
            factors.append(1 / np.sqrt(np.maximum(second + 1e-9, 1e-9)))
            momentum_factors.append(1 / np.sqrt(second + 1e-6))
        else:
            smaller, larger = np.argsort(param.shape, kind="stable")[-2:]
            row = second.mean(larger, keepdims=True)
            col = second.mean(smaller, keepdims=True)
            relative = row / (row.mean(smaller, keepdims=True) + 1e-9)
            factor = 1 / np.sqrt(np.maximum(relative, 1e-9)) / np.sqrt(np.maximum(col, 1e-9))
            rows.append(np.broadcast_to(row, param.shape))
            cols.append(np.broadcast_to(col, param.shape))
            factors.append(factor)
            momentum_factors.append(factor)
    root = 1 / np.sqrt(rms + 1e-6)
    yield history[-1]
    yield param
    yield from momenta
    yield rms
    yield from (m * root for m in momenta)
    yield root
    yield from (history[-1] * factor for factor in factors)
    yield from rows
    yield from cols
    yield from (1 / np.sqrt(row + 1e-8) for row in rows)
    yield from (1 / np.sqrt(col + 1e-8) for col in cols)
    yield from (m * factor for m, factor in zip(momenta, momentum_factors, strict=True))


def perceptron(theta, inputs):
    """Returns the outputs for one coordinate, multiplied out by hand."""
    last = max(int(name[1:]) for name in theta)
    for i in range(last + 1):
        weights, bias = np.asarray(theta[f"w{i}"]), np.asarray(theta[f"b{i}"])
        inputs = [
            sum(x * weights[k, j] for j, x in enumerate(inputs)) + bias[k] for k in range(len(bias))
        ]
        if i < last:
            inputs = [max(0.0, x) for x in inputs]
    return inputs


def twin(columns, theta, history, param, step):
    """Returns the update of one tensor, one coordinate at a time."""
    history, param = [np.atleast_1d(g) for g in history], np.atleast_1d(param)
    features = [
        column / np.sqrt(1e-5 + np.mean(column**2))
        for column in columns(theta["features"], history, param)
    ]
    update = np.zeros(param.shape)
    for place in itertools.product(*(range(n) for n in param.shape)):
        inputs = [feature[place] for feature in features]
        inputs += [math.tanh(step / scale - 1) for scale in TIMES]
        direction, magnitude = perceptron(theta["rule"], inputs)
        update[place] = -direction * math.exp(0.3 * magnitude) * 0.5
    return update


@pytest.mark.parametrize(
    ("preset", "columns"),
    [(lopt.small_mlp, momentum_columns), (lopt.adafactor_mlp, adafactor_columns)],
)
def test_equals_one_coordinate_at_a_time(preset, columns):
    learned, theta = build(preset)
    shapes = {"b": (3,), "cube": (2, 4, 3), "s": (), "square": (3, 3), "w": (4, 2)}
    params = {name: normal(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    optimizer = learned.optimizer(theta)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    histories = {name: [] for name in shapes}
    for step in range(3):
        grads = {name: normal(100 * step + i, s) for i, (name, s) in enumerate(shapes.items())}
        updates, state = update(grads, state, params)
        for name, param in params.items():
            histories[name].append(np.asarray(grads[name]))
            expected = twin(columns, theta, histories[name], np.asarray(param), step)
            np.testing.assert_allclose(
                updates[name], expected.reshape(param.shape), rtol=1e-9, atol=1e-11, err_msg=name
            )
        params = jax.tree.map(jnp.add, params, updates)


def two_steps(learned, theta, params, grads):
    optimizer = learned.optimizer(theta)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    params = jax.tree.map(jnp.add, params, updates)
    return optimizer.update(jax.tree.map(jnp.sin, grads), state, params)[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_permuted_coordinates_have_permuted_updates(preset):
    learned, theta = build(preset)
    vector, matrix = normal(0, (2, 9)), normal(1, (2, 4, 6))
    order, rows, columns = (
        jax.random.permutation(jax.random.fold_in(KEY, n), n) for n in (9, 4, 6)
    )
    run = jax.jit(lambda params, grads: two_steps(learned, theta, params, grads))
    before = run({"m": matrix[0], "v": vector[0]}, {"m": matrix[1], "v": vector[1]})
    permute = lambda m: m[rows][:, columns]  # noqa: E731
    after = run(
        {"m": permute(matrix[0]), "v": vector[0][order]},
        {"m": permute(matrix[1]), "v": vector[1][order]},
    )
    np.testing.assert_allclose(after["v"], before["v"][order], rtol=1e-10)
    np.testing.assert_allclose(after["m"], permute(before["m"]), rtol=1e-9)
    assert not np.allclose(after["v"], before["v"])


@pytest.mark.parametrize("preset", PRESETS)
def test_tensors_do_not_see_one_another(preset):
    learned, theta = build(preset)
    params, grads = ({"a": normal(i, (3,)), "b": normal(i + 2, (2, 2))} for i in (0, 1))
    together = two_steps(learned, theta, params, grads)
    alone = two_steps(learned, theta, params["b"], grads["b"])
    np.testing.assert_allclose(together["b"], alone, rtol=1e-10)


def test_columns_have_unit_second_moment():
    class Identity(lopt.AbstractRule):
        def init(self, key):
            return ()

        def begin(self, theta, shape):
            return ()

        def apply(self, theta, columns, shared, memory):
            return columns[:1], memory

    def first(outputs):
        return outputs[0]

    learned = lopt.Coordinatewise(MomentumFeatures(), Identity(), first)
    grads, params = 1e-3 * normal(0, (5, 4)), normal(1, (5, 4))
    optimizer = learned.optimizer(learned.init(KEY))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected = grads / jnp.sqrt(1e-5 + jnp.mean(grads**2))
    np.testing.assert_allclose(updates, expected, rtol=1e-12)
    raw = lopt.Coordinatewise(MomentumFeatures(), Identity(), first, normalise=False)
    optimizer = raw.optimizer(raw.init(KEY))
    for size in (1, 2**18):
        blocks = lopt.Coordinatewise(
            raw.features, raw.rule, raw.scale, normalise=False, block_size=size
        )
        updates, _ = blocks.update(blocks.init(KEY), grads, optimizer.init(params), params)
        np.testing.assert_array_equal(updates, grads)


def test_bad_input_is_refused():
    learned, theta = build(lopt.small_mlp)
    params = {"a": jnp.ones(3)}
    state = learned.begin(theta, params)
    with pytest.raises(ValueError, match=r"params=None.*pass them"):
        learned.optimizer(theta).update(params, state)
    with pytest.raises(ValueError, match=r"another structure than params.*same pytree"):
        learned.update(theta, {"b": jnp.ones(3)}, state, params)
    narrow = lopt.Coordinatewise(MomentumFeatures(), MLP(18), DirectionMagnitude())
    theta = narrow.init(KEY)
    with pytest.raises(ValueError, match=r"given 8 \+ 11 features; try inputs=19"):
        narrow.update(theta, params, narrow.begin(theta, params), params)
    with pytest.raises(ValueError, match="at least one unit"):
        MLP(19, (4, 0))
    with pytest.raises(ValueError, match="equally many"):
        lopt.adafactor_mlp(momentum_decays=(0.9,))
    with pytest.raises(ValueError, match=r"must be one decay, or one for each"):
        lopt.adafactor_mlp(rms_decays=(0.9, 0.99))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_dtype_of_params(preset, dtype):
    learned, theta = build(preset)
    params = {"b": normal(0, (3,), dtype), "s": normal(1, (), dtype), "x": jnp.ones(2, jnp.float32)}
    grads = jax.tree.map(jnp.cos, params)
    optimizer = learned.optimizer(theta)
    state = optimizer.init(params)
    for _ in range(2):
        updates, new = jax.jit(optimizer.update)(grads, state, params)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        same = jax.tree.map(lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), new, state)
        assert all(jax.tree.leaves(same))
        state = new
    for leaf in jax.tree.leaves(state.features):
        assert leaf.dtype == jnp.float32
    # In half precision the update is that of single precision, rounded.
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, grads))
    state = optimizer.init(single[0])
    for _ in range(2):
        expected, state = optimizer.update(single[1], state, single[0])
    rtol = max(1e-4, float(jnp.finfo(dtype).eps))
    for name, update in updates.items():
        np.testing.assert_allclose(update.astype(float), expected[name], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_nested_trees_with_nothing_in_places(preset):
    learned, theta = build(preset)
    tensors = normal(0, (2, 3)), normal(1, ()), normal(2, (4,))
    grads = tuple(jnp.cos(tensor) for tensor in tensors)

    def nest(tensors):
        a, b, c = tensors
        return {"deep": [(a, None), {"x": b}], "empty": (), "z": c}

    nested = two_steps(learned, theta, nest(tensors), nest(grads))
    flat = two_steps(learned, theta, tensors, grads)
    assert jax.tree.structure(nested) == jax.tree.structure(nest(tensors))
    for ours, theirs in zip(jax.tree.leaves(nested), flat, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert ours.shape == theirs.shape
