"""Quadratics and synthetic problems of TaskSet: ranges, optima, steps, names in JSON."""

import dataclasses
import json
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import lopt
from lopt.tasks.taskset import QuadraticConfig, SyntheticConfig, from_json, sample, to_json
from lopt.tasks.taskset.synthetic import LANDSCAPES, PROBLEMS, WRAPPERS

KEY = jax.random.key(0)
SMALL = {"dim": 4, "batch": 3, "samples": 6}
COMMON = {
    "bowl": {"condition": 9.0, "angle": math.pi / 4},
    "fully_connected": {"activation": "tanh", "widths": (3, 4)},
    "norm": {"power": 2.0},
}


def config(problem, wrapper=None, **fields):
    sizes = {name: SMALL[name] for name in PROBLEMS[problem].integers}
    return SyntheticConfig(problem, wrapper, 3, **(sizes | COMMON.get(problem, {}) | fields))


def build(problem, wrapper=None, **fields):
    return config(problem, wrapper, **fields).build(dict)


def share_is(count, share, total):
    return abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize("compat", ["clean", "taskset"])
def test_quadratics_are_in_range(compat):
    configs = [sample("quadratic_family", seed, compat) for seed in range(1000)]
    kinds = Counter(c.matrix.kind for c in configs)
    assert all(share_is(kinds[kind], 0.25, 1000) for kind in kinds)
    assert len(kinds) == 4
    assert share_is(sum(c.noise is not None for c in configs), 0.5, 1000)
    assert share_is(sum(c.log for c in configs), 0.5, 1000)
    assert share_is(sum(c.initial.kind == "normal" for c in configs), 0.5, 1000)
    # Half of a log-uniform is below the geometric mean of its ends.
    assert share_is(sum(c.dim < math.sqrt(6000) for c in configs), 0.5, 1000)
    for c in configs:
        assert 2 <= c.dim <= 3000
        assert 0 <= c.seed < 100_000
        assert 1e-5 <= c.scale <= 1e3
        for entries, ends in ((c.matrix, MATRICES), (c.noise, NOISES)):
            if entries is not None:
                assert_in_range(entries, ends)
        assert_in_range(c.initial, {"normal": (2,), "uniform": (-5, 2.5, 5)})


MATRICES = {"normal": (2,), "uniform": (-3, 1, 5), "linspace_eigen": (0.01, 50, 100)}
NOISES = {"normal": (0.05,), "uniform": (-0.15, 0.05, 0.25), "linspace_eigen": (0.01, 2, 10)}


def assert_in_range(entries, ends):
    if entries.kind == "normal":
        assert 0 <= entries.second <= ends["normal"][0]
    elif entries.kind == "logspace_eigen":
        assert entries.first == 1e-5
        assert 1 <= entries.second <= (1000 if ends is MATRICES else 10)
    else:
        low, high, width = ends[entries.kind]
        assert low <= entries.first <= high
        assert 0 <= entries.second - entries.first <= width


@pytest.mark.parametrize("compat", ["clean", "taskset"])
def test_synthetic_problems_are_in_range(compat):
    configs = [sample("losg_tasks_family", seed, compat) for seed in range(1000)]
    kinds = Counter(c.wrapper or c.problem for c in configs)
    assert set(kinds) == {*PROBLEMS, *WRAPPERS}
    assert all(share_is(count, 1 / 14, 1000) for count in kinds.values())
    assert {c.landscape for c in configs} == {*LANDSCAPES, None}
    for c in configs:
        for field, (low, high) in PROBLEMS[c.problem].integers.items():
            assert low <= getattr(c, field) <= high
        assert c.noise == 0 or 0.01 <= c.noise <= 10
        assert c.angle in (None, 0.0, math.pi / 4, math.pi / 3)
        assert c.condition is None or 0.01 <= c.condition <= 100
        assert c.power is None or 0.1 <= c.power <= 5
        assert c.zeros is None or 0.9 <= c.zeros <= 0.99
        assert c.scale is None or 0.001 <= c.scale <= 1000
        assert c.widths is None or (2 <= len(c.widths) <= 5)
        assert c.widths is None or all(4 <= width <= 32 for width in c.widths)
        assert c.clipped == (compat == "clean")
        assert not (c.wrapper and c.problem == "sparse_softmax_regression")
    noisy = [c for c in configs if c.problem == "quadratic" and not c.wrapper]
    assert share_is(sum(c.noise > 0 for c in noisy), 0.5, len(noisy))
    if compat == "taskset":
        assert all(c.noise == 0 for c in configs if c.wrapper)


@pytest.mark.parametrize("name", ["quadratic_family", "losg_tasks_family"])
def test_json_round_trip(name):
    for seed in range(100):
        found = sample(name, seed)
        assert from_json(json.loads(json.dumps(to_json(found)))) == found


@pytest.mark.parametrize("kind", ["normal", "uniform", "linspace_eigen", "logspace_eigen"])
def test_quadratic(kind):
    drawn = sample("quadratic_family", 0)
    entries = dataclasses.replace(drawn.matrix, kind=kind, first=0.5, second=2.0)
    initial = dataclasses.replace(entries, kind="uniform", first=1.0)
    made = QuadraticConfig(entries, initial, log=False, dim=3, seed=7, scale=0.5, noise=entries)
    task = made.build(dict)
    if "eigen" in kind:
        np.testing.assert_allclose(task.matrix, task.matrix.T)
        spread = np.linspace if kind[:3] == "lin" else np.geomspace
        np.testing.assert_allclose(np.linalg.eigvalsh(task.matrix), spread(0.5, 2, 3))
    x, noise = task.init(KEY), task.batch(KEY)
    assert jnp.all((x >= 1) & (x <= 2))
    expected = 0.5 * np.sum(((task.matrix + noise) @ x) ** 2)
    np.testing.assert_allclose(task.loss(x, noise), expected)
    assert task.loss(0 * x, noise) == 0
    assert not np.allclose(noise, task.batch(jax.random.key(1)))
    logarithm = dataclasses.replace(made, log=True, noise=None).build(dict)
    without = np.sum((logarithm.matrix @ x) ** 2)
    np.testing.assert_allclose(logarithm.loss(x, ()), 0.5 * np.log(without + 1e-8))
    check_grads(jax.jit(lambda x: logarithm.loss(x, ())), (x,), order=1)


def test_solutions():
    """Where the loss is zero, or as little as it can be."""
    quadratic = build("quadratic")
    weights, target = quadratic.arrays
    solution = jnp.linalg.solve(weights, target)
    np.testing.assert_allclose(quadratic.loss(solution, ()), 0, atol=1e-12)
    np.testing.assert_allclose(build("norm").loss(solution * 0, ()) > 0.1, True)
    norm = build("norm")
    solved = jnp.linalg.solve(*norm.arrays[:2])
    np.testing.assert_allclose(norm.loss(solved, ()), 2e-6, rtol=1e-3)  # sqrt(4) 1e-6
    x = jnp.array([1.0, 0.5])
    turned = np.array([[1.0, -1.0], [1.0, 1.0]]) @ np.asarray(x) / math.sqrt(2)
    np.testing.assert_allclose(build("bowl").loss(x, ()), (9 * turned[0] ** 2 + turned[1] ** 2) / 2)
    assert build("dependency_chain").init(KEY).shape == (5,)
    assert build("dependency_chain").loss(jnp.zeros(5), ()) == 0
    assert build("min_max_well").loss(jnp.array([1.0, -1.0, 1.0, 1.0]), ()) == 0
    for name in ("sum_of_quadratics", "projection_quadratic"):
        task = build(name)
        np.testing.assert_array_equal(task.examples.arrays[:3], -task.examples.arrays[3:])
        rows = task.examples.arrays
        np.testing.assert_allclose(task.loss(jnp.zeros(4), rows), 0, atol=1e-12)
        np.testing.assert_allclose(jax.grad(task.loss)(jnp.zeros(4), rows), 0, atol=1e-12)
        assert task.loss(jnp.ones(4), rows) > 0
    snake = build("outward_snake")
    path = [0.3]
    for _ in range(3):
        path.append(math.pi * math.cos(path[-1]))
    inputs, labels = snake.batch(KEY)
    radius = np.linalg.norm(path)
    np.testing.assert_allclose(
        snake.loss(jnp.array(path), (inputs, labels)), inputs[:, 0].sum() / radius, rtol=1e-5
    )
    for landscape in LANDSCAPES:
        task = build("optimization_test_problems", landscape=landscape)
        own, offset = task.arrays
        np.testing.assert_allclose(task.loss(own.minimiser, ()), own.minimum + offset, atol=1e-12)
        assert own.minimum + offset > -1e-9
        if task.box is not None:
            many = np.asarray(jax.vmap(task.init)(jax.random.split(KEY, 500)))
            low, high = (np.broadcast_to(end, (2,)) for end in task.box)
            assert np.all((many >= low) & (many <= high))
            assert np.all(np.ptp(many, axis=0) > 0.9 * (high - low))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name):
    fields = {"landscape": "branin"} if name.startswith("optimization") else {}
    task = build(name, **fields)
    params, batch = task.init(KEY), task.batch(KEY)
    check_grads(jax.jit(lambda x: task.loss(x, batch)), (params,), order=1)
    as_single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert task.loss(as_single, batch).dtype == jnp.float32


def test_wrapped_problems():
    plain, batch = build("quadratic"), ()
    x = plain.init(KEY)
    grad = jax.grad(plain.loss)(x, batch)
    noisy = build("quadratic", noise=0.5)
    estimates = jax.vmap(lambda key: noisy.estimate(x, (), key)[0])(jax.random.split(KEY, 2000))
    np.testing.assert_allclose(estimates.loss, plain.loss(x, batch))
    np.testing.assert_allclose(estimates.grads.mean(axis=0), grad, atol=4 * 0.5 / 2000**0.5)
    np.testing.assert_allclose(estimates.grads.std(axis=0), 0.5, rtol=0.1)
    sparse = build("quadratic", "sparse_problems", zeros=0.9, sparse_noise=0.0)
    grads = jax.vmap(lambda key: sparse.estimate(x, (), key)[0].grads)(jax.random.split(KEY, 2000))
    assert np.all((grads == 0) | np.isclose(grads, grad[None]))
    assert share_is(int(np.sum(grads == 0)), 0.9, grads.size)
    scaled = build("quadratic", "rescale_problems", scale=100.0)
    np.testing.assert_allclose(scaled.init(KEY), 100 * x)
    np.testing.assert_allclose(scaled.estimate(100 * x, (), KEY)[0].grads, grad / 100)
    log = build("quadratic", "log_objective")
    value = plain.loss(x, batch)
    found = log.estimate(x, (), KEY)[0]
    np.testing.assert_allclose(found.loss, np.log(value / 1e-6 + 1))
    np.testing.assert_allclose(found.grads, grad / (value + 1e-6))
    both = [build("sum_of_quadratics", "log_objective", clipped=clip) for clip in (True, False)]
    rows = jnp.ones((3, 4))  # where the loss at 1/2 is negative
    assert [bool(jnp.isfinite(t.loss(x * 0 + 0.5, rows))) for t in both] == [True, False]


def train(task, key, steps=20):
    optimizer = optax.sign_sgd(1e-4)
    state = lopt.start(task, optimizer, task.init(key), key)
    return lopt.unroll(task, optimizer, state, steps)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quadratic_family", "losg_tasks_family"])
def test_fifty_configurations_take_twenty_steps(name):
    for seed in range(50):
        found = sample(name, seed)
        if found.dim and found.dim > 300:
            found = dataclasses.replace(found, dim=300)
        losses = train(found.build(dict), KEY)
        assert np.all(np.isfinite(losses)), found
        jax.clear_caches()


@pytest.mark.parametrize("name", ["sum_of_quadratics", "fully_connected"])
def test_tasks_of_one_shape_are_one_program(name):
    tasks = [dataclasses.replace(config(name), seed=seed).build(dict) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    losses = jax.vmap(lambda task: train(task, KEY, 3))(stacked)
    assert np.all(np.isfinite(losses))
    for task, own in zip(tasks, losses, strict=True):
        np.testing.assert_allclose(train(task, KEY, 3), own, rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: config("bowl", angle=None), "bowl.*needs angle"),
        (lambda: SyntheticConfig("cup", None, 0), "no problem 'cup'; try"),
        (
            lambda: config("optimization_test_problems", landscape="hill"),
            "no landscape 'hill'; try",
        ),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
