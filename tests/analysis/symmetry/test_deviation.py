"""What gradients keep and optimizers break, on a network of 784-20-10 with batches of 128."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import images, perceptron, start_at

import lopt
from lopt.analysis.symmetry import (
    Deviation,
    SymmetryProbe,
    bias_shift,
    deviation,
    drift,
    rescale,
    scale,
    translation,
)

STEPS = 10
W1, B1, W2, B2 = (f".layers[{i}].{name}" for i in (0, 1) for name in ("weight", "bias"))


def dense(activation):
    task = lopt.tasks.mlp_classification(images(), (20,), activation)
    params = task.init(jax.random.key(0))
    return task, (translation(params, W2, B2), rescale(params, (W1, B1), W2))


def batch_norm(epsilon):
    task = lopt.tasks.batch_norm_classification(images(), (20,), epsilon=epsilon)
    params = task.init(jax.random.key(0))
    one, bias, two, last = (f"['network']{path}" for path in (W1, B1, W2, B2))
    return task, (
        translation(params, two, last),
        scale(params, one, bias),
        bias_shift(params, bias),
        rescale(params, ("['gain'][0]", "['shift'][0]"), two, kind="norm rescale"),
    )


def probe(subject, optimizer, steps=STEPS):
    """Returns the readings of a run, by kind of symmetry."""
    task, generators = subject
    state = start_at(task, optimizer)
    record = SymmetryProbe(generators, units=True)
    _, readings = lopt.unroll(task, optimizer, state, steps, record=record)
    return {g.kind: readings[g.name] for g in generators}


def worst(reading: Deviation) -> float:
    return float(jnp.max(reading.cosine))


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.leaky_relu])
def test_gradients_and_sgd_keep_every_constraint(activation):
    found = probe(dense(activation), optax.sgd(0.1))
    for reading in found.values():
        assert worst(reading.grads) < 1e-14
        assert worst(reading.updates) < 1e-14
        assert float(jnp.max(reading.grads.absolute)) < 1e-13


def test_sigmoid_has_no_rescaling():
    found = probe(dense(jax.nn.sigmoid), optax.sgd(0.1))
    assert worst(found["translation"].grads) < 1e-14
    assert worst(found["rescale"].grads) > 1e-4


def test_batch_norm_keeps_scale_but_for_its_epsilon():
    # Epsilon zero is refused by the task; what is below rounding is as good.
    exact, broken = (probe(batch_norm(epsilon), optax.sgd(0.1)) for epsilon in (1e-30, 1e-5))
    for reading in exact.values():
        assert worst(reading.grads) < 1e-14
        assert worst(reading.updates) < 1e-14
    assert 1e-7 < worst(broken["scale"].grads) < 1e-3
    for kind in ("translation", "bias shift", "norm rescale"):
        assert worst(broken[kind].grads) < 1e-14


def test_momentum_breaks_scale_and_rescale_and_keeps_translation():
    optimizer = optax.sgd(0.1, momentum=0.9)
    found = probe(dense(jax.nn.relu), optimizer)
    assert worst(found["translation"].updates) < 1e-14
    assert worst(found["rescale"].updates) > 1e-3
    assert worst(found["rescale"].grads) < 1e-14
    normed = probe(batch_norm(1e-30), optimizer)
    assert worst(normed["translation"].updates) < 1e-14
    assert worst(normed["scale"].updates) > 1e-3
    assert worst(normed["scale"].grads) < 1e-14


@pytest.mark.standard_promotion
@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.lion(1e-3)], ids=["adam", "lion"])
def test_adam_and_lion_break_both(optimizer):
    found = probe(dense(jax.nn.relu), optimizer)
    for reading in found.values():
        assert worst(reading.grads) < 1e-14
        assert worst(reading.updates) > 1e-2
        # Signed sums cancel; and the first-order change is what conserved quantities do.
        assert float(jnp.max(reading.updates.absolute / jnp.abs(reading.updates.signed))) > 2
        assert float(drift(reading.conserved)[-1]) > 1e-3


def test_measures_are_what_they_say():
    task = perceptron(jax.nn.relu)
    params, direction = task.init(jax.random.key(0)), task.init(jax.random.key(0))
    direction = jax.tree.map(lambda leaf: leaf**2 - 0.1, direction)
    generator = rescale(params, (W1, B1), W2)
    found = deviation(generator, params, direction, units=True)
    tangents = jax.vmap(lambda t: jax.flatten_util.ravel_pytree(t)[0])(generator.tangents(params))
    flat = jax.flatten_util.ravel_pytree(direction)[0]
    along = tangents @ flat
    np.testing.assert_allclose(found.units, along, rtol=1e-12)
    np.testing.assert_allclose(found.signed, jnp.sum(along), rtol=1e-10)
    np.testing.assert_allclose(found.absolute, jnp.sum(jnp.abs(along)), rtol=1e-12)
    # The length of the projection, as units own different entries.
    lengths = jnp.linalg.norm(tangents, axis=1)
    share = jnp.linalg.norm(along / lengths) / jnp.linalg.norm(flat)
    np.testing.assert_allclose(found.cosine, share, rtol=1e-12)
    doubled = deviation(generator, params, jax.tree.map(lambda leaf: 2 * leaf, direction))
    np.testing.assert_allclose(doubled.cosine, found.cosine, rtol=1e-12)
    assert doubled.units is None
    still = jax.tree.map(jnp.zeros_like, params)
    assert deviation(generator, params, still).cosine == 0
    slope = jax.grad(lambda u: deviation(generator, params, u).cosine)(still)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))


def test_a_probe_needs_symmetries_of_different_names():
    generator = dense(jax.nn.relu)[1][0]
    with pytest.raises(ValueError, match="at least one symmetry"):
        SymmetryProbe(())
    with pytest.raises(ValueError, match="2 symmetries named"):
        SymmetryProbe((generator, generator))
