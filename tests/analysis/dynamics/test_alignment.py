"""Companions do what they would do alone on the same gradients, and angles to them are angles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import (
    AlignmentRecord,
    Companions,
    OddnessRecord,
    alignment,
    effective_rate,
    reference_rules,
    with_mirror,
)

pytestmark = pytest.mark.standard_promotion


class Nested(lopt.AbstractTask):
    """A noisy quadratic in a pytree of two tensors."""

    def init(self, key):
        a, b = jax.random.split(key)
        return {"w": jax.random.normal(a, (3, 2)), "b": jax.random.normal(b, (2,))}

    def batch(self, key, split="train"):
        return jax.random.normal(key, (2,))

    def loss(self, params, batch):
        return jnp.sum(params["w"] ** 2) + jnp.sum((params["b"] - batch) ** 2)


def run(optimizer, key, record, steps=12, task=None):
    task = task or Nested()
    state = lopt.start(task, optimizer, task.init(key), key)
    return lopt.unroll(task, optimizer, state, steps, record=record)


def test_companions_do_what_a_plain_loop_would_have_them_do(key):
    rules = {**reference_rules(), "AdamW": optax.adamw(0.01)}
    companions = Companions(optax.sgd(0.05, momentum=0.5), rules)

    def record(step):
        return step.grads, step.params, companions.updates(step)

    _, (grads, params, found) = run(companions.optimizer, key, record)
    first = jax.tree.map(lambda leaf: leaf[0], params)
    for name, rule in rules.items():
        state = rule.init(first)
        for i in range(12):
            grad, param = jax.tree.map(lambda leaf, i=i: leaf[i], (grads, params))
            update, state = rule.update(grad, state, param)
            for one, other in zip(
                jax.tree.leaves(update), jax.tree.leaves(found[name]), strict=True
            ):
                np.testing.assert_allclose(one, other[i], rtol=1e-9, atol=1e-15)


def test_companions_change_nothing(key):
    optimizer = optax.adam(0.05)
    end, losses = run(optimizer, key, lopt.loss_of)
    watched, same = run(Companions(optimizer, reference_rules()).optimizer, key, lopt.loss_of)
    np.testing.assert_array_equal(losses, same)
    jax.tree.map(np.testing.assert_array_equal, end.params, watched.params)


def test_an_optimizer_is_aligned_with_itself_and_a_multiple(key):
    companions = Companions(optax.adam(0.03), reference_rules(adam=0.01))
    record = AlignmentRecord(companions)
    _, found = run(companions.optimizer, key, record)
    assert found["Adam"].cosine.shape == (12, 2)
    np.testing.assert_allclose(found["Adam"].cosine, 1, rtol=1e-12)
    np.testing.assert_allclose(found["Adam"].relative, 3, rtol=1e-12)
    np.testing.assert_allclose(found["Adam"].overall_relative, 3, rtol=1e-12)
    # Adam's first step is the sign of the gradient, which is Lion's.
    np.testing.assert_allclose(found["Lion"].overall_cosine[0], 1, rtol=1e-6)
    assert np.all(np.abs(found["Lion"].overall_cosine) <= 1 + 1e-12)


def test_the_angle_of_a_sign_to_its_gradient_is_a_quotient_of_norms():
    # cos = |g|_1 / (sqrt(n) |g|_2).
    grads = {"w": jnp.array([[3.0, -4.0]]), "b": jnp.array([12.0])}
    found = alignment(jax.tree.map(jnp.sign, grads), grads)
    np.testing.assert_allclose(found.cosine, [1.0, 7 / (2**0.5 * 5)])
    np.testing.assert_allclose(found.overall_cosine, 19 / (3**0.5 * 13))
    np.testing.assert_allclose(found.overall_relative, 3**0.5 / 13)


def test_squares_out_of_range_are_no_concern_of_products():
    tiny = jnp.array([3e-150, 4e-150])
    np.testing.assert_allclose(alignment(tiny, tiny).overall_cosine, 1.0)


def test_the_effective_rate_of_sgd_is_its_rate_and_of_momentum_sums_up(key):
    class Slope(lopt.AbstractTask):
        def init(self, key):
            return jnp.zeros(3)

        def batch(self, key, split="train"):
            return ()

        def loss(self, params, batch):
            return jnp.sum(params * jnp.array([1.0, -2.0, 0.5]))

    def record(step):
        return effective_rate(step.updates, step.grads)

    _, found = run(optax.sgd(0.07), key, record, task=Slope())
    np.testing.assert_allclose(found.overall, 0.07, rtol=1e-12)
    np.testing.assert_allclose(found.per_tensor, 0.07, rtol=1e-12)
    # Of a constant gradient: rate (1 - mu^(t + 1)) / (1 - mu).
    _, found = run(optax.sgd(0.07, momentum=0.9), key, record, task=Slope())
    expected = 0.07 * (1 - 0.9 ** np.arange(1, 13)) / 0.1
    np.testing.assert_allclose(found.overall, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "odd"),
    [
        (optax.sgd(0.1, momentum=0.9), True),
        (optax.adam(0.1), True),
        (optax.lion(0.1, weight_decay=0.0), True),
        (optax.rmsprop(0.1), True),
        (optax.adamw(0.1, weight_decay=0.1), False),
    ],
)
def test_odd_rules_have_no_oddness_defect(key, optimizer, odd):
    companions = with_mirror(optimizer)
    _, found = run(companions.optimizer, key, OddnessRecord(companions))
    assert found.shape == (12,)
    assert np.all(found == 0) if odd else np.all(found > 1e-3)


def test_the_defect_of_weight_decay_is_its_share_twice(key):
    # u = -rate (g + decay theta), turned around -rate (-g + decay theta).
    rate, decay = 0.05, 0.3
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    companions = with_mirror(optimizer)
    defect = OddnessRecord(companions)

    def record(step):
        decayed = jax.tree.map(lambda p: 2 * rate * decay * p, step.params)
        norms = [jnp.linalg.norm(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]))
                 for tree in (decayed, step.updates)]  # fmt: skip
        return defect(step), norms[0] / norms[1]

    _, (found, expected) = run(companions.optimizer, key, record)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_learned_optimizers_are_optimizers(key):
    learned = lopt.small_mlp()
    companions = Companions(learned.optimizer(learned.init(key)), {"SGD": optax.sgd(0.1)})
    _, found = run(companions.optimizer, key, AlignmentRecord(companions), steps=3)
    assert np.all(np.isfinite(found["SGD"].cosine))


def test_what_needs_a_loss_gets_it(key):
    companions = with_mirror(optax.polyak_sgd(), {"SGD": optax.sgd(0.1)})
    _, found = run(companions.optimizer, key, AlignmentRecord(companions))
    np.testing.assert_allclose(found["SGD"].overall_cosine, 1, rtol=1e-12)


def test_bad_input_is_named(key):
    with pytest.raises(TypeError, match="trains"):
        Companions(lopt.small_mlp(), reference_rules())
    with pytest.raises(TypeError, match="others"):
        Companions(optax.sgd(0.1), {"x": 3})
    with pytest.raises(ValueError, match="must name one at least"):
        Companions(optax.sgd(0.1), {})
    companions = Companions(optax.sgd(0.1), reference_rules())
    with pytest.raises(ValueError, match=r"give start and unroll companions\.optimizer"):
        run(optax.sgd(0.1), key, AlignmentRecord(companions))
    with pytest.raises(ValueError, match=r"no 'mirror'; try with_mirror"):
        run(companions.optimizer, key, OddnessRecord(companions))
    with pytest.raises(ValueError, match="alignment: updates has structure"):
        alignment({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"updates\['a'\] has shape \(2,\)"):
        alignment({"a": jnp.ones(2)}, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"others.* has one named 'mirror'"):
        with_mirror(optax.sgd(0.1), {"mirror": optax.sgd(0.1)})
    with pytest.raises(ValueError, match=r"reference_rules\(adam=-1.0\)"):
        reference_rules(adam=-1.0)
    with pytest.raises(ValueError, match="effective_rate: updates"):
        effective_rate(jnp.ones(2), jnp.ones(3))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_sizes_far_from_one_do_not_count(size):
    one, other = jnp.array([3.0, 4.0], jnp.float32), jnp.array([1.0, 0.0], jnp.float32)
    found = alignment(size * one, size * other)
    assert found.overall_cosine == pytest.approx(0.6, rel=1e-5)
    assert found.relative[0] == pytest.approx(5.0, rel=1e-5)
    rate = effective_rate(-0.1 * size * one, size * one)
    assert rate.overall == pytest.approx(0.1, rel=1e-5)


def test_what_has_no_tensors_and_what_are_no_companions_is_named():
    with pytest.raises(ValueError, match="alignment: updates and reference hold no arrays"):
        alignment({}, {})
    with pytest.raises(TypeError, match=r"AlignmentRecord\(companions\)|companions"):
        AlignmentRecord(optax.adam(0.01))
