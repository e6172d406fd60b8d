"""The rule that starts at Muon: what it equals, and what it does not depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.analysis import equivariances
from lopt.learned import MatrixAxes, muon_mlp

KEY = jax.random.key(0)


def normal(like, seed):
    return optax.tree.random_like(jax.random.key(seed), like, jax.random.normal)


def any_theta(learned):
    """Returns weights that use every feature and factor."""
    theta = learned.init(KEY)
    return jax.tree.map(lambda a, b: a + 0.2 * b, theta, normal(theta, 1))


def steps(optimizer, params, grads):
    """Returns the updates of all steps, at params that stay."""

    def step(state, grad):
        updates, state = optimizer.update(grad, state, params)
        return state, updates

    return jax.lax.scan(step, optimizer.init(params), grads)[1]


def gradients(params, count, scale=1.0):
    many = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape)), params)
    return jax.tree.map(lambda leaf: scale * leaf, normal(many, 2))


SHAPES = {
    "layers": {"scale": (2, 4), "weight": (2, 4, 6)},
    "square": (4, 4),
    "kernel": (3, 3, 2, 4),
    "tall": (6, 4),
    "embedding": (5, 3),
    "bias": (6,),
    "gain": (),
}
PARAMS = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))


@pytest.mark.standard_promotion
def test_at_first_it_is_the_muon_of_optax():
    axes = MatrixAxes(stacked=("layers",))
    learned = muon_mlp(2, 0.1, axes=axes)
    muon = optax.contrib.muon(0.1, adam_learning_rate=0.02, muon_weight_dimension_numbers=axes)
    grads = gradients(PARAMS, 10)
    ours, theirs = quick_jit(
        lambda theta: [steps(one, PARAMS, grads) for one in (learned.optimizer(theta), muon)]
    )(learned.init(KEY))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)


def test_embeddings_and_norms_are_known_by_words_of_their_names():
    vectors = (
        "pos_embedding",
        "TokEmbedding_0",
        "embedder",
        "wpe.position_embeddings",
        "scale",
        "tokembed",
        "MLP_Biases",
    )
    matrices = ("upscale", "rescale_mlp", "shifted_window_attn", "positionwise_ffn", "kernel")
    found = MatrixAxes()({name: {"kernel": jnp.zeros((2, 3))} for name in (*vectors, *matrices)})
    assert {name for name, one in found.items() if one["kernel"] is None} == {*vectors}
    params = {"lm_head": jnp.ones((2, 3)), "norm1_w": jnp.ones((1, 1))}
    own = MatrixAxes(vectors=("lm_head", "Norm1"))(params)
    assert own == {"lm_head": None, "norm1_w": None}
    assert MatrixAxes(vectors=())({"s": jnp.ones((2, 3))})["s"] is not None
    assert found["upscale"]["kernel"] == optax.contrib.MuonDimensionNumbers((0,), (1,))


def test_updates_have_the_symmetries_of_the_rule():
    def found(theta):
        rules = (muon_mlp(2, axes=MatrixAxes(layout)) for layout in ("in_out", "out_in"))
        rule, turned = (learned.optimizer(theta, 10) for learned in rules)
        return equivariances(rule, KEY, num_steps=3, transposed=turned)

    def broken(found):
        return {name for name, defect in found.items() if not defect < 1e-9}

    start = found(muon_mlp(2).init(KEY))
    assert broken(start) == {"scale-proportional"}
    turns = {"left rotation", "right rotation"}
    assert broken(found(any_theta(muon_mlp(2)))) == {*turns, "scale-proportional"}


def test_steps_have_the_size_that_widths_ask_for():
    shapes = {"in": (32, 4), "hidden": (32, 32), "out": (4, 32)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    learned = muon_mlp(2, 1.0, axes=MatrixAxes("out_in"))
    theta = learned.init(KEY)
    run = quick_jit(lambda theta: steps(learned.optimizer(theta), params, gradients(params, 1)))
    for fans, sizes in [((0.5, 0.0), (8**0.5, 1, 1)), ((0.5, 0.5), (8**0.5, 1, 8**-0.5))]:
        updates = run({**theta, "fans": jnp.array(fans)})
        for name, size in zip(shapes, sizes, strict=True):
            # Newton and Schulz's iteration leaves singular values between about 0.7 and 1.2.
            assert 0.6 < jnp.linalg.norm(updates[name][0], 2) / size < 1.3


def test_the_schedule_starts_at_warm_up_and_cosine_and_learns_length_and_depth():
    learned = muon_mlp(2, peak=0.1)
    theta = learned.init(KEY)

    def rate(step, num_steps, depth=1, theta=theta):
        return float(learned.rate(theta, lopt.learned.schedules.Time.of(step, num_steps), depth))

    assert rate(0, 100) == pytest.approx(0.1 / 5)
    assert [rate(4, 100), rate(5, 100)] == pytest.approx([0.1, 0.1])
    assert rate(52, 99 + 1, 7) == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.47 / 0.95)))
    assert rate(100, 100) == 0.0
    # The logarithm of the rate is linear in those of length and depth.
    other = {**theta, "schedule": theta["schedule"].at[3].set(-1 / 3).at[4].set(-2 / 3)}
    assert rate(50, 100, 2, other) / rate(200, 400, 2, other) == pytest.approx(2)
    assert rate(50, 100, 2, other) / rate(50, 100, 6, other) == pytest.approx(3)
    assert rate(50, 100, 12, other) == rate(50, 100, 100, other)


def test_without_a_length_the_rate_is_the_users():
    theta = muon_mlp(1).init(KEY)
    with pytest.raises(ValueError, match="num_steps=1000"):
        muon_mlp(1).optimizer(theta)
    params = {"bias": jnp.ones(3)}
    grads = gradients(params, 3)
    constant = steps(muon_mlp(1, 1.0).optimizer(theta), params, grads)["bias"]
    falling = muon_mlp(1, optax.linear_schedule(1.0, 0.0, 2)).optimizer(theta)
    shares = jnp.array([1.0, 0.5, 0.0])[:, None]
    np.testing.assert_allclose(steps(falling, params, grads)["bias"], constant * shares)

    make = optax.inject_hyperparams(
        lambda learning_rate: muon_mlp(1, learning_rate).optimizer(theta)
    )
    injected = make(learning_rate=1.0)
    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.array(0.25)
    first = jax.tree.map(lambda leaf: leaf[0], grads)
    np.testing.assert_allclose(injected.update(first, state, params)[0]["bias"], constant[0] / 4)


def test_weights_decay_apart_from_gradients_where_they_are_to():
    params = {"weight": jnp.full((3, 3), 2.0), "bias": jnp.ones(3)}
    grads, theta = gradients(params, 1), muon_mlp(1).init(KEY)

    def update(theta=theta, **options):
        return steps(muon_mlp(1, 0.5, **options).optimizer(theta), params, grads)

    plain, by_default = update(), update(weight_decay=0.1)
    masked = update(
        weight_decay=0.1, weight_decay_mask=lambda params: {"weight": False, "bias": True}
    )
    np.testing.assert_allclose(by_default["weight"], plain["weight"] - 0.5 * 0.1 * 2)
    np.testing.assert_allclose(by_default["bias"], plain["bias"])
    np.testing.assert_allclose(masked["weight"], plain["weight"])
    np.testing.assert_allclose(masked["bias"], plain["bias"] - 0.5 * 0.1)
    more = update(theta | {"decay": theta["decay"].at[0].set(math.log(3) / 3)}, weight_decay=0.1)
    np.testing.assert_allclose(more["weight"], plain["weight"] - 3 * 0.5 * 0.1 * 2, rtol=1e-6)


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_steps_can_get_smaller_as_gradients_vanish(outlier):
    learned, params = muon_mlp(1, 1.0), {"square": jnp.ones((4, 4)), "bias": jnp.ones(3)}
    theta = learned.init(KEY)
    sizes = {kind: weights.at[-1].set(1 / 3) for kind, weights in theta["sizes"].items()}
    scales = jnp.array([1.0] * 20 + [outlier] + [1.0] * 179 + [0.01] * 200)
    grads = jax.tree.map(lambda leaf: jax.vmap(jnp.multiply)(scales, leaf), gradients(params, 400))
    run = quick_jit(lambda theta: steps(learned.optimizer(theta), params, grads))
    pairs = zip(*map(jax.tree.leaves, (run(theta), run(theta | {"sizes": sizes}))), strict=True)
    for one, other in pairs:
        factor = jnp.log(other / one).reshape(400, -1)[:, 0]
        assert jnp.abs(factor[:20]).max() < 0.01
        # One large gradient hardly counts.
        assert abs(factor[199]) < 0.2
        # A hundredth of all others.
        assert outlier > 1 or factor[-1] == pytest.approx(-4 / 3, abs=0.2)


def test_it_is_small_and_layers_of_one_shape_share_a_program():
    learned = muon_mlp()
    theta = learned.init(KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) <= 1000

    def count(layers):
        params = [jnp.ones((4, 4), jnp.float32)] * layers
        state = jax.eval_shape(learned.optimizer(theta, 10).init, params)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert size <= 12 * 16 * layers + 24
        text = str(jax.make_jaxpr(learned.update)(theta, params, state, params))
        return text.count("dot_general"), text.count("tanh")

    assert count(2) == count(5)


def test_it_is_saved_with_its_axes(tmp_path):
    learned = muon_mlp(1, axes=MatrixAxes("out_in", ("layers",)), weight_decay=0.1)
    theta = any_theta(learned)
    lopt.save(tmp_path / "rule.safetensors", learned, theta)
    again, weights = lopt.load(tmp_path / "rule.safetensors")
    assert again == learned
    jax.tree.map(np.testing.assert_array_equal, weights, theta)


def test_a_layout_that_is_none_is_refused():
    with pytest.raises(ValueError, match="out_in"):
        MatrixAxes("rows_first")
