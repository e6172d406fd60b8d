"""Generators: tangents, actions and conserved quantities belong together; wrong structures."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from networks import check_follows, perceptron, random_like

from lopt.analysis.symmetry import (
    Blind,
    DiscreteMap,
    FreeGenerator,
    Mixing,
    Place,
    Symmetry,
    bias_exchange,
    bias_shift,
    broken_component,
    deviation,
    early_translation,
    mixing,
    query_key_mixing,
    query_key_rescale,
    rescale,
    scale,
    translation,
    unreached,
    unseen,
)

W1, B1, W2, B2 = (f".layers[{i}].{name}" for i in (0, 1) for name in ("weight", "bias"))


def built(params):
    return [
        translation(params, W2, B2),
        scale(params, W1, B1),
        scale(params, W1, B1, whole=True),
        bias_shift(params, B1),
        rescale(params, (W1, B1), W2),
        rescale(params, W1, W2, degree=2.0),
        query_key_rescale(params, (W1, B1), (W2, B2)),
        mixing(params, (W1, B1), W2),
        bias_exchange(params, B1, W2, B2),
        early_translation(params, W1, W2),
        query_key_mixing(params, (W1, B1), (W2, B2)),
    ]


def shifted(params, amounts):
    return jax.tree.map(lambda leaf: leaf + amounts[0], params)


def leaves_of(params, amounts):
    return jax.tree.leaves(params)


def transposed(params, amounts):
    return jax.tree.map(lambda leaf: leaf.T[None], params)


@pytest.fixture
def params():
    return random_like(perceptron(jnp.tanh).init(jax.random.key(0)), 0)


WIDE = {
    name: jax.random.normal(jax.random.key(i), shape, jnp.float64)
    for i, (name, shape) in enumerate(
        {"w1": (5, 3), "b1": (5,), "w2": (4, 5), "w3": (2, 4), "conv": (5, 2, 3, 3)}.items()
    )
}
LAYERS = [("['w1']", "['b1']"), ("['w2']", None)]
NARROW = {
    name: jax.random.normal(jax.random.key(i), shape, jnp.float64)
    for i, (name, shape) in enumerate(
        {"w1": (4, 2), "b1": (4,), "w2": (5, 4), "b2": (5,), "w3": (2, 5)}.items()
    )
}
FLAT = {"conv": WIDE["conv"], "w2": jax.random.normal(jax.random.key(9), (2, 20), jnp.float64)}


def blind():
    return unseen(WIDE, ("['w1']", "['b1']"), ("['w2']", "['w3']"))


def built_of_others():
    return [
        (unseen(WIDE, ("['w1']", "['b1']"), "['w2']"), WIDE),
        (unseen(WIDE, ("['b1']", "['w1']"), ("['w2']", "['w3']")), WIDE),
        (unseen(WIDE, "['conv']", "['w2']"), WIDE),
        (early_translation(WIDE, "['w1']", ("['w2']", "['w3']")), WIDE),
        (unreached(NARROW, LAYERS[:1], "['w2']", "['b2']"), NARROW),
        (unreached(NARROW, LAYERS[:1], "['w2']"), NARROW),
        (unreached(NARROW, LAYERS, "['w3']"), NARROW),
        (mixing(FLAT, "['conv']", "['w2']"), FLAT),
        (mixing(FLAT, "['conv']", "['w2']", order="first"), FLAT),
    ]


@pytest.mark.parametrize("which", range(11))
def test_everything_follows_from_the_action(params, which):
    check_follows(built(params)[which], params)


@pytest.mark.parametrize("which", range(9))
def test_everything_follows_from_the_action_of_others(which):
    check_follows(*built_of_others()[which])


def test_actions_of_stretches_add_up(params):
    generator = rescale(params, (W1, B1), W2, degree=2.0)
    one, two = jnp.array([0.1, -0.2, 0.3]), jnp.array([0.5, 0.4, -0.3])
    apart = generator.act(generator.act(params, one), two)
    once = generator.act(params, one + two)
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_units_of_a_flattened_image_are_its_channels():
    params = {"conv": jnp.ones((2, 1, 3, 3)), "dense": jnp.ones((1, 6))}
    last = rescale(params, "['conv']", "['dense']")
    first = rescale(params, "['conv']", "['dense']", order="first")
    amounts = jnp.array([1.0, 0.0])
    assert last.combine(params, amounts)["dense"].tolist() == [[-1, 0, -1, 0, -1, 0]]
    assert first.combine(params, amounts)["dense"].tolist() == [[-1, -1, -1, 0, 0, 0]]


def test_units_may_own_a_part_of_their_places(params):
    # The first of four units owns a bias, the others the rows of a weight.
    places = (Place(W1, first=1, slices=3), Place(B2, None))
    lengths = Symmetry("x", "x", 4, "shift", places).lengths(params)
    np.testing.assert_allclose(lengths, [3**0.5, 2, 2, 2], rtol=1e-12)


def test_a_translation_has_a_unit_for_each_column_and_one_for_the_bias(params):
    weight, bias = translation(params, W2, B2).places
    assert (weight.first, weight.slices) == (0, 3)
    assert (bias.first, bias.axis) == (3, None)


def test_what_a_free_generator_does_not_know_it_refuses(params):
    with pytest.raises(ValueError, match=r"quantity=None.*try quantity="):
        early_translation(params, W1, W2).conserved(params)


def test_heads_have_a_basis_each():
    params = {"v": jnp.ones((4, 3)), "o": jnp.ones((2, 4))}
    both = mixing(params, "['v']", "['o']", heads=2)
    assert (both.units, both.size) == (8, 2)
    # The second head's first component takes in its second: a[0, 1] of block 1.
    moved = both.combine(params, jnp.zeros(8).at[5].set(1.0))
    assert moved["v"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert moved["o"].tolist() == [[0, 0, 0, -1], [0, 0, 0, -1]]


def test_a_convolution_mixes_its_channels(key):
    params = {"in": jnp.ones((2, 1, 3, 3)), "out": jax.random.normal(key, (4, 2, 3, 3))}
    both = mixing(params, "['in']", "['out']")
    amounts = jnp.array([0.3, -0.2, 0.1, 0.4])
    moved = both.act(params, amounts)
    products = [jnp.einsum("oi...,ij...->oj...", p["out"], p["in"]) for p in (params, moved)]
    np.testing.assert_allclose(*products, rtol=1e-5, atol=1e-5)


OTHER = jax.tree.map(
    lambda leaf: jnp.zeros([n + 1 for n in leaf.shape], leaf.dtype),
    perceptron(jnp.tanh).init(jax.random.key(0)),
)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: translation(p, ".layers[7].weight"),
            r"array at '\.layers\[7\]\.weight'",
        ),
        (lambda p: translation(p, B2), "weight of shape .outputs, inputs.*Try the weight"),
        (lambda p: rescale(p, (W2, B2), W1), "3 outputs and the other 4 inputs"),
        (lambda p: rescale(p, (W1, B1), W2, degree=0.0), "degree=0.*see scale"),
        (lambda p: rescale(p, (W1, B1), W2, degree=jnp.nan), "degree=nan"),
        (lambda p: rescale(p, (), W2), r"incoming=\(\).*at least one"),
        (lambda p: rescale(p, (W1, W1), W2), "none twice"),
        (lambda p: rescale(p, (W1, W2), W2, order="middle"), "order"),
        (lambda p: rescale(p, (W1, ".nope"), W2), r"array at '\.nope'"),
        (
            lambda p: rescale({"w": jnp.ones(()), "v": jnp.ones((2, 2))}, "['w']", "['v']"),
            "first ax",
        ),
        (lambda p: bias_shift({"b": jnp.ones(0)}, "['b']"), "first axes"),
        (lambda p: translation({"w": jnp.ones((0, 3))}, "['w']"), r"shape \(0, 3\)"),
        (lambda p: query_key_rescale(p, (), ()), r"query=\(\).*at least one"),
        (lambda p: mixing(p, (3,), W2), "incoming"),
        (lambda p: Mixing("x", "x", 5, 1, (W1,), (Place(W2, 1),)), r"heads \* size"),
        (lambda p: Mixing("x", "x", 9, 1, (W1,), ()), "both sides"),
        (lambda p: bias_exchange(p, B1, W2, B2).act({"a": jnp.ones(3)}, jnp.ones(3)), "array at"),
        (lambda p: bias_exchange(p, B1, W2, B2).act(p, jnp.ones(2)), "amounts of shape"),
        (lambda p: early_translation(p, W1, W2).act({"a": jnp.ones(4)}, jnp.ones(4)), "array at"),
        (lambda p: mixing(p, (), W2), r"incoming=\(\).*at least one"),
        (lambda p: mixing(p, (W1, B1), ".nope"), r"array at '\.nope'"),
        (lambda p: mixing(p, (W1, W2), W2), "none twice"),
        (lambda p: query_key_mixing(p, W1, W1), "no array twice"),
        (lambda p: mixing(p, (W2, B2), W1), "3 outputs and the other 4 inputs"),
        (lambda p: mixing(p, (W1, B1), W2).lengths({"a": jnp.ones(3)}), "array at"),
        (lambda p: mixing(p, (W1, B1), W2, order="middle"), "order"),
        (lambda p: mixing(p, (W1, B1), W2, heads=2), "heads=2.*divide the 3 units"),
        (lambda p: mixing(p, (W1, B1), W2).act(p, jnp.zeros(3)), "has 9 units; amounts of shape"),
        (lambda p: query_key_mixing(p, (W1, B1), ()), r"key=\(\).*at least one"),
        (lambda p: bias_exchange(p, B1, ".nope", ".nope"), r"array at '\.nope'"),
        (lambda p: bias_exchange(p, B1, W1, B2), "have shapes"),
        (lambda p: early_translation(p, B1, W2), "two dense layers"),
        (lambda p: early_translation(p, W1, (W2, W1)), "two dense layers"),
        (lambda p: early_translation(p, W1, ()), "at least one"),
        (lambda p: early_translation(p, (W1, B1), W2), "one weight|incoming"),
        (lambda p: bias_exchange(p, B1, W2, B2).act(OTHER, jnp.ones(3)), "needs arrays of shapes"),
        (lambda p: unreached(p, [(W1, B1)], W2, B2), "more units than.*there are 3 and 4"),
        (lambda p: unreached(p, [], W2, B2), "at least one"),
        (lambda p: unreached(p, W1, W2, B2), "pairs|layers"),
        (lambda p: unreached(p, [(W1, B1)], B2), "two dense layers"),
        (lambda p: unreached(p, [(W2, B2)], W1), "two dense layers"),
        (lambda p: unreached(NARROW, [("['w1']", "['b2']")], "['w2']"), "bias of 4 entries"),
        (lambda p: unreached(NARROW, LAYERS[:1], "['w2']", "['b1']"), "bias of 5 entries"),
        (
            lambda p: unreached(NARROW, LAYERS[:1], "['w2']").act(
                NARROW | {"w2": jnp.ones((4, 5))}, jnp.ones(20)
            ),
            "behind 4 units",
        ),
        (lambda p: unseen(p, (W1, B1), B2), "two dense layers"),
        (lambda p: unseen(p, W2, W1), "two dense layers"),
        (lambda p: unseen(p, W1, ".nope"), r"array at '\.nope'"),
        (lambda p: unseen(p, W1, W2), "more units than.*there are 3 and 3"),
        (lambda p: blind().act(WIDE, jnp.zeros(3)), "has 20 units; amounts of shape"),
        (lambda p: blind().along(WIDE | {"w1": jnp.ones((5, 9))}, WIDE), "20 entries"),
        (lambda p: blind().lengths(WIDE | {"w2": jnp.ones((4, 9))}), "moves 5 units"),
        (lambda p: blind().lengths(WIDE | {"w3": jnp.ones((2, 9))}), "matrix of 4 columns"),
        (lambda p: Blind("x", "x", 5, (W1,), ()), "both sides"),
        (lambda p: Place(W1, coefficient=jnp.nan), "coefficient=nan"),
        (lambda p: Place(3), "path=3|path: str"),
        (lambda p: Place(W1, coefficient=0.0), r"coefficient=0\.0"),
        (lambda p: scale(p, W1, ".nothing"), r"array at '\.nothing'"),
        (lambda p: Symmetry("x", "x", 3, "turn", (Place(W1),)), "motion.*turn"),
        (lambda p: Symmetry("x", "x", 3, "shift", (Place(W1), Place(W1))), "none twice"),
        (lambda p: Symmetry("x", "x", 0, "shift", (Place(W1),)), "units=0.*positive integer"),
        (lambda p: FreeGenerator("x", "x", -1, lambda p, a: p), "units=-1.*positive integer"),
        (lambda p: scale(p, W1).act(p, jnp.zeros(2)), "has 3 units; amounts of shape"),
        (lambda p: scale(p, W1).act({"w": jnp.zeros((3, 4))}, jnp.zeros(3)), "Try one of"),
        (lambda p: Symmetry("x", "x", 2, "stretch", (Place(W1),)).lengths(p), "has shape"),
        (lambda p: Symmetry("x", "x", 4, "stretch", (Place(W1),)).lengths(p), "4 slices on axis 0"),
        (
            lambda p: Symmetry("x", "x", 3, "stretch", (Place(W1, axis=-2),)).lengths(p),
            "slices on axis -2",
        ),
        (
            lambda p: Symmetry("x", "x", 3, "stretch", (Place(W1, axis=2),)).lengths(p),
            "slices on axis 2",
        ),
        (
            lambda p: Symmetry("x", "x", 2, "shift", (Place(B1, None, first=2),)).lengths(p),
            r"has 2 units, but Place.*first=2.*try one from 0 to 1",
        ),
        (
            lambda p: Symmetry("x", "x", 4, "shift", (Place(B1, first=2, slices=3),)).lengths(p),
            "3 slices on axis 0",
        ),
        (lambda p: FreeGenerator("x", "x", 1, leaves_of).combine(p, jnp.zeros(1)), "same struct"),
        (lambda p: FreeGenerator("x", "x", 1, leaves_of).along(p, p), "same structure"),
        (lambda p: FreeGenerator("x", "x", 1, shifted).along(p, [p]), r"along\(direction\) must"),
        (lambda p: FreeGenerator("x", "x", 1, transposed).along(p, p), "same structure"),
        (lambda p: DiscreteMap("x", "permute", 3, (Place(W1),))(p, jnp.arange(2)), "3 units"),
        (lambda p: DiscreteMap("x", "turn", 3, (Place(W1),)), "motion.*turn"),
    ],
)
def test_wrong_structures_are_refused(params, build, message):
    # Under the tests' type checker a word that is none of the options never arrives.
    with pytest.raises((ValueError, TypeError), match=message):
        build(params)


@pytest.mark.parametrize("which", range(11))
def test_the_cosine_is_the_share_of_the_projection(params, which):
    # Also where tangents are not orthogonal to one another, as those of mixing and exchange.
    check_cosine(built(params)[which], params)


@pytest.mark.parametrize("which", [0, 1, 4])
def test_the_cosine_of_others_is_the_share_of_the_projection(which):
    check_cosine(*built_of_others()[which])


def check_cosine(generator, params):
    direction = random_like(params, 3)
    size = jnp.linalg.norm(jax.flatten_util.ravel_pytree(direction)[0])
    part = broken_component([generator], params, direction)
    expected = jnp.linalg.norm(jax.flatten_util.ravel_pytree(part)[0]) / size
    np.testing.assert_allclose(deviation(generator, params, direction).cosine, expected, rtol=1e-9)
