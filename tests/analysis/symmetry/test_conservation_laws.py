"""Exact discrete laws, published closed forms, and gradient flow, against recorded runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import images, normalised, perceptron, start_at

import lopt
from lopt.analysis.symmetry import (
    GradientFlow,
    HeavyBall,
    Ledger,
    LedgerProbe,
    SymmetryProbe,
    continuous_law,
    exact_law,
    regime,
    rescale,
    scale,
    symmetries,
    translation,
)

W1, B1, W2, B2 = (f".layers[{i}].{name}" for i in (0, 1) for name in ("weight", "bias"))


def record(task, generators, optimizer, steps):
    state = start_at(task, optimizer)
    probe = LedgerProbe(generators)
    after, ledgers = lopt.unroll(task, optimizer, state, steps, record=probe)
    return after, ledgers


def subjects():
    relu = lopt.tasks.mlp_classification(images(), (20,))
    params = relu.init(jax.random.key(0))
    normed = normalised(0.0, 32)
    return {
        "dense": (relu, (translation(params, W2, B2), rescale(params, (W1, B1), W2))),
        "norm": (normed, (scale(normed.init(jax.random.key(0)), W1, B1),)),
        "squared": squared(),
    }


def squared():
    task = perceptron(lambda z: jax.nn.relu(z) ** 2, size=32)
    params = task.init(jax.random.key(0))
    return task, (rescale(params, (W1, B1), W2, degree=2.0),)


@pytest.mark.parametrize(
    ("name", "momentum", "dampening"),
    [
        *(
            (name, momentum, 0.0)
            for name in ("dense", "norm", "squared")
            for momentum in (0.0, 0.9)
        ),
        *(("dense", momentum, 0.3) for momentum in (0.0, 0.9)),
    ],
)
def test_exact_laws_hold_over_fifty_steps(name, momentum, dampening):
    task, generators = subjects()[name]
    optimizer = HeavyBall(0.1 if name != "squared" else 0.01, 1e-3, momentum, dampening)
    _, ledgers = record(task, generators, optimizer.optimizer(), 50)
    for generator in generators:
        ledger = ledgers[generator.name]
        predicted = exact_law(generator, optimizer, ledger)
        assert float(jnp.max(jnp.abs(predicted - ledger.conserved))) < 1e-11
        assert float(jnp.max(jnp.abs(ledger.conserved - ledger.conserved[0][None]))) > 1e-4
        # One wrong constant is seen.
        wrong = HeavyBall(optimizer.learning_rate, 2e-3, momentum, dampening)
        assert float(jnp.max(jnp.abs(exact_law(generator, wrong, ledger) - predicted))) > 1e-6


@pytest.mark.standard_promotion
def test_the_ledger_of_one_step_is_exact_for_any_optimizer():
    task, generators = subjects()["dense"]
    _, ledgers = record(task, generators, optax.adamw(1e-2), 10)
    for generator in generators:
        ledger = ledgers[generator.name]
        after = jax.vmap(lambda one, g=generator: one.next_conserved(g))(ledger)
        np.testing.assert_allclose(after[:-1], ledger.conserved[1:], atol=1e-12)
        assert float(jnp.max(jnp.abs(ledger.first_order))) > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("name", "decay"), [("dense", 0.05), ("norm", 0.05)])
def test_closed_forms_are_within_a_fifth(name, decay, momentum):
    task, generators = subjects()[name]
    optimizer = HeavyBall(0.1 * (1 - momentum), decay, momentum)
    _, ledgers = record(task, generators, optimizer.optimizer(), 200)
    for generator in generators:
        ledger = ledgers[generator.name]
        predicted = continuous_law(generator, optimizer, ledger)
        # Of the change itself, and not only of what has hardly changed.
        change = ledger.conserved[-1] - ledger.conserved[0]
        missed = predicted[-1] - ledger.conserved[-1]
        assert float(jnp.linalg.norm(change) / jnp.linalg.norm(ledger.conserved[0])) > 0.05
        assert float(jnp.linalg.norm(missed) / jnp.linalg.norm(change)) < 0.2


def test_the_settings_of_the_reference():
    task, generators = subjects()["dense"]
    for momentum, bound in ((0.0, 1e-3), (0.9, 5e-3)):
        optimizer = HeavyBall(0.1, 1e-3, momentum)
        _, ledgers = record(task, generators[:1], optimizer.optimizer(), 50)
        ledger = ledgers[generators[0].name]
        error = continuous_law(generators[0], optimizer, ledger) / ledger.conserved - 1
        assert float(jnp.max(jnp.abs(error))) < bound


@pytest.mark.parametrize(
    ("momentum", "decay", "expected"),
    [(0.9, 1e-3, "overdamped"), (0.5, 5.0, "underdamped"), (0.5, 0.0, "overdamped")],
)
def test_each_regime_solves_its_equation(momentum, decay, expected):
    # Without a source: against a finely integrated heavy ball in continuous time.
    task, generators = squared()
    generator, optimizer = generators[0], HeavyBall(0.1, decay, momentum)
    assert regime(generator, optimizer) == expected
    _check_equation(task, generator, optimizer)


def test_the_critical_regime_solves_its_equation():
    task, generators = squared()
    # gamma^2 = w^2: (1 - b)^2 / (s (1 + b)) = 4 l, with s = 0.1 and b = 0.5.
    optimizer = HeavyBall(0.1, 0.25 / (0.1 * 1.5 * 4), 0.5)
    assert regime(generators[0], optimizer) == "critical"
    _check_equation(task, generators[0], optimizer)
    assert regime(generators[0], HeavyBall(0.1, 1e-3)) == "first order"


def _check_equation(task, generator, optimizer):
    """The response to a constant source from a start of 2, against small explicit steps."""
    steps, source = 40, 0.7
    ones = jnp.ones((steps, generator.units), jnp.float64)
    updates = ones * (source / 2 * optimizer.learning_rate**2)
    ledger = Ledger(2 * ones, ones, ones, ones, ones, updates, ones)
    predicted = continuous_law(generator, optimizer, ledger)[:, 0]
    size, fine = optimizer.learning_rate, 2000
    inertia = size * (1 + optimizer.momentum)
    gamma, square = (1 - optimizer.momentum) / inertia, 4 * optimizer.weight_decay / inertia
    y, speed, expected = 2.0, 0.0, [2.0]
    for _ in range(steps - 1):
        for _ in range(fine):
            speed += size / fine * (source - 2 * gamma * speed - square * y)
            y += size / fine * speed
        expected.append(y)
    np.testing.assert_allclose(predicted, expected, rtol=2e-2, atol=2e-2)


SMOOTH = {
    "squared": (lambda: perceptron(lambda z: jax.nn.relu(z) ** 2, size=32), 0.01, 2),
    "linear": (lambda: perceptron(lambda z: z, size=32), 0.05, 3),
    "norm": (lambda: normalised(0.0, 32, jnp.tanh), 0.05, 3),
}
KINKED = {
    "relu": (lambda: perceptron(jax.nn.relu, size=32), 0.02, 2),
    "leaky": (lambda: perceptron(jax.nn.leaky_relu, 2, size=32), 0.02, 3),
}


def flow_drifts(task, size, least, key):
    """Returns how far each conserved quantity moves at most, under gradient flow and under SGD."""
    found = symmetries(task, key).generators
    generators = tuple(g for g in found if g.knows_conserved)
    assert len(generators) >= least
    drifts = []
    for estimator in (GradientFlow(task, size, 60), task):
        optimizer = optax.sgd(size)
        state = lopt.start(estimator, optimizer, start_at(task, optimizer).params, key)
        probe = SymmetryProbe(generators)
        after, readings = lopt.unroll(estimator, optimizer, state, 50, record=probe)
        paths = [readings[generator.name].conserved for generator in generators]
        drifts.append([float(jnp.max(jnp.abs(path - path[:1]))) for path in paths])
        assert float(optax.tree.norm(optax.tree.sub(after.params, state.params))) > 0.05
    return drifts


@pytest.mark.parametrize(
    "name", ["squared", *(pytest.param(n, marks=pytest.mark.slow) for n in ("linear", "norm"))]
)
def test_gradient_flow_drifts_zero_along_every_declared_symmetry(name, key):
    # The fourth law, on a fresh batch in each step.
    build, size, least = SMOOTH[name]
    flow, sgd = flow_drifts(build(), size, least, key)
    assert max(flow) < 1e-12
    assert max(sgd) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", KINKED)
def test_across_kinks_it_drifts_a_hundredth_of_what_sgd_does(name, key):
    build, size, least = KINKED[name]
    flow, sgd = flow_drifts(build(), size, least, key)
    assert max(flow) < 1e-2 * max(sgd)


def test_sgd_drifts_in_proportion_to_its_learning_rate(key):
    task, generators = subjects()["dense"]
    moved = []
    for rate, steps in ((0.04, 25), (0.02, 50)):
        _, ledgers = record(task, generators, optax.sgd(rate), steps)
        conserved = ledgers[generators[1].name].conserved
        moved.append(float(jnp.linalg.norm(conserved[-1] - conserved[0])))
    assert 1.5 < moved[0] / moved[1] < 2.6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0.*positive"),
        ({"learning_rate": 0.1, "weight_decay": -1.0}, "weight_decay=-1.0.*at least 0"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "momentum=1.0.*below 1"),
        ({"learning_rate": 0.1, "dampening": -0.1}, "dampening=-0.1"),
    ],
)
def test_constants_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HeavyBall(**fields)


def test_a_flow_needs_a_step():
    with pytest.raises(ValueError, match=r"step_size=0.*try 0\.01"):
        GradientFlow(squared()[0], 0.0)
    with pytest.raises(ValueError, match="iterations=0"):
        GradientFlow(squared()[0], 0.1, 0)
