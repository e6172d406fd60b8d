"""Expressions: evaluation, their errors, and that they are pytrees whose constants can be tuned."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_trees import assert_same, random_expression, sampled, value

from lopt.symbolic.expression import (
    Call,
    Constant,
    Expression,
    Variable,
    evaluate,
    make_expression,
    walk,
)

G, M = Variable("gradient"), Variable("m", 1)


def test_a_rule_by_hand():
    rule = make_expression(("subtract", ("multiply", -0.5, ("tanh", G)), ("divide", M, 4.0)))
    g, m = np.asarray([0.3, -2.0]), np.asarray([1.0, 8.0])
    expected = -0.5 * np.tanh(g) - m / 4
    np.testing.assert_allclose(rule({G: jnp.asarray(g), M: jnp.asarray(m)}), expected)
    np.testing.assert_allclose(value(rule, {G: g, M: m}), expected)
    assert rule.complexity == 8
    assert rule.variables == (G, M)


@pytest.mark.parametrize("seed", range(16))
def test_jax_and_numpy_agree(seed):
    rule = random_expression(seed)
    for columns, good in sampled(rule):
        found = rule({k: jnp.asarray(x) for k, x in columns.items()})
        assert_same(np.asarray(found), value(rule, columns), good)


def test_32_bits_stay_32_bits():
    rule = make_expression(("divide", ("multiply", -0.5, ("pow", G, 2.0)), ("max", M, 0.1)))
    narrow = eqx.tree_at(lambda e: e.constants, rule, jnp.asarray(rule.constants, jnp.float32))
    columns = {G: jnp.ones(3, jnp.float32), M: jnp.ones(3, jnp.float32)}
    assert narrow(columns).dtype == jnp.float32


def test_constants_can_be_trained_and_mapped():
    rule = make_expression(("multiply", 2.0, ("tanh", ("multiply", 3.0, G))))
    x = jnp.asarray([0.1, -0.4])

    def loss(rule):
        return jnp.sum(rule({G: x}) ** 2)

    slope = eqx.filter_grad(loss)(rule).constants
    expected = jax.grad(lambda c: jnp.sum((c[0] * jnp.tanh(c[1] * x)) ** 2))(jnp.asarray([2.0, 3]))
    np.testing.assert_allclose(slope, expected)
    several = eqx.tree_at(lambda e: e.constants, rule, jnp.asarray([[2.0, 3.0], [1.0, 1.0]]))
    np.testing.assert_allclose(
        eqx.filter_vmap(loss)(several), [loss(rule), np.sum(np.tanh(x) ** 2)]
    )


def test_a_shared_constant_is_one():
    rule = Expression(Call("add", (Constant(0), Call("multiply", (Constant(0), G)))), np.ones(1))
    assert rule({G: jnp.asarray(2.0)}) == 3


def test_constants_keep_64_bits_where_jax_has_32():
    with jax.enable_x64(False):
        assert make_expression(("multiply", 0.1, G)).constants.tolist() == [0.1]


def test_walk_takes_parents_first_and_arguments_in_order():
    tree = make_expression(("add", ("negative", G), ("multiply", 2.0, M))).root
    shown = [getattr(node, "operator", node) for node in walk(tree)]
    assert shown == ["add", "negative", G, "multiply", Constant(0), M]


def test_missing_feature_is_named():
    with pytest.raises(KeyError, match=r"needs the feature m\[t-1\]; there are gradient"):
        evaluate(M, (), {G: np.ones(2)})


def test_wrong_trees_are_refused():
    with pytest.raises(ValueError, match="no operator 'cosh'"):
        Call("cosh", (G,))
    with pytest.raises(ValueError, match="divide takes 2 arguments, not 1"):
        Call("divide", (G,))
    with pytest.raises(ValueError, match=r"holds 1 numbers, but its tree uses \[0, 1\]"):
        Expression(Call("add", (Constant(0), Constant(1))), np.ones(1))
    with pytest.raises(ValueError, match=r"holds 2 numbers, but its tree uses \[0\]"):
        Expression(Constant(0), np.ones(2))
