"""Weights with their inputs first: the same symmetries are found of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import CLASSES, Inputs, check_follows, cross_entropy, double, model_task, random_like
from test_find import Flattened, Gated, PreNorm, kinds, motions

import lopt
from lopt.analysis.symmetry import (
    HeavyBall,
    LedgerProbe,
    ModelLoss,
    exact_law,
    leaves_by_path,
    missing_ranks,
    symmetries,
)
from lopt.analysis.symmetry.layout import layouts_of


def kernels(model):
    """Returns the arrays of a model, those of weights named and laid out as Flax's are."""
    modules = {}
    for path, leaf in leaves_by_path(eqx.filter(model, eqx.is_inexact_array)).items():
        module, name = path.rsplit(".", 1)
        modules.setdefault(module, {})
        if name == "weight" and leaf.ndim > 1:
            modules[module]["kernel"] = jnp.moveaxis(leaf, (0, 1), (-1, -2))
        else:
            modules[module][name] = leaf
    return modules


def laid_out(model, shape):
    """Returns the task of a model in which weights have their inputs first."""
    model = double(model)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(modules, batch):
        def own(path, leaf):
            module, name = jax.tree_util.keystr(path).rsplit(".", 1)
            if name == "weight" and leaf.ndim > 1:
                return jnp.moveaxis(modules[module]["kernel"], (-1, -2), (0, 1))
            return modules[module][name]

        return cross_entropy(
            eqx.combine(jax.tree_util.tree_map_with_path(own, arrays), rest), batch
        )

    return ModelLoss(kernels(model) | {"num_heads": 2}, loss, Inputs(shape))


NETWORKS = {
    "linear": (lambda key: eqx.nn.MLP(5, CLASSES, 4, 2, lambda z: z, key=key), (5,)),
    "few inputs": (lambda key: eqx.nn.MLP(2, CLASSES, 4, 1, lambda z: z, key=key), (2,)),
    "channels": (Flattened, (1, 3)),
    "gated": (Gated, (4,)),
    "attention": (PreNorm, (5, 4)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "channels")) for n in NETWORKS],
)
def test_the_same_is_found_of_either_layout(name, key):
    build, shape = NETWORKS[name]
    own, turned = model_task(build(key), shape), laid_out(build(key), shape)
    expected, found = symmetries(own, key), symmetries(turned, key)
    assert kinds(found) == kinds(expected)
    assert motions(found) == motions(expected)
    assert sorted(g.kind for g in found.nearly) == sorted(g.kind for g in expected.nearly)
    params = random_like(turned.init(key), 0)
    for generator in found.generators:
        check_follows(generator, params)
        with pytest.raises(ValueError, match="needs an array at"):
            generator.lengths({"other": jnp.ones(2)})
    if name in ("linear", "few inputs"):
        assert {g.kind for g in found.generators} >= {"mixing", "bias exchange"}
        ranks = missing_ranks(turned, key, found.generators)
        assert ranks.unexplained == 0
        assert ranks.nullity == missing_ranks(own, key).nullity


def test_what_is_moved_back_has_the_numbers_and_laws_it_had(key):
    model = double(Flattened(key))
    own, turned = model_task(model, (1, 3)), laid_out(model, (1, 3))
    (before,), (after,) = (symmetries(task, key).of_kind("rescale") for task in (own, turned))
    params = turned.init(key)
    np.testing.assert_allclose(before.conserved(own.init(key)), after.conserved(params), rtol=1e-12)
    sgd = HeavyBall(0.1, 1e-3)
    state = lopt.start(turned, sgd.optimizer(), params, key)
    _, ledgers = lopt.unroll(turned, sgd.optimizer(), state, 50, record=LedgerProbe((after,)))
    ledger = ledgers[after.name]
    np.testing.assert_allclose(exact_law(after, sgd, ledger), ledger.conserved, atol=1e-12)


def test_of_weights_that_multiply_from_the_right(key):
    # Biases tell of the first two; the square one in the middle is like them.
    sizes = [(4, 5), (5, 5), (5, CLASSES)]
    model = {}
    for i, (shape, one) in enumerate(zip(sizes, jax.random.split(key, 3), strict=True)):
        model[f"w{i}"] = jax.random.normal(one, shape, jnp.float64)
        model[f"b{i}"] = jnp.ones(shape[1], jnp.float64)

    def loss(model, batch):
        rows, labels = batch
        for i in range(2):
            rows = jax.nn.relu(rows @ model[f"w{i}"] + model[f"b{i}"][None])
        logits = jax.nn.log_softmax(rows @ model["w2"] + model["b2"][None])
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    found = symmetries(ModelLoss(model, loss, Inputs((4,))), key)
    assert kinds(found) == [("rescale", 5), ("rescale", 5), ("translation", 6)]
    assert motions(found) == ["permute", "permute"]


LAYOUTS = {
    "biases": ({"w": (3, 4), "b": (4,)}, [["w"]]),
    "biases, outputs first": ({"w": (4, 3), "b": (4,)}, [[]]),
    "most biases": ({"w1": (3, 4), "b1": (4,), "w2": (4, 4), "b2": (4,), "z": (4, 2)}, ["w1 w2 z"]),
    "a bias that is a row": ({"w": (3, 4), "b": (1, 4)}, ["w"]),
    "names alone": ({"kernel": (3, 3), "weight": (4, 3)}, [[], "kernel weight"]),
    "nothing": ({"u": (3, 4), "v": (4, 5)}, [[], "u v"]),
    "squares and a gain": ({"w": (4, 4), "b": (4,), "gain": (4, 1, 1)}, [[], "w"]),
    "a gain": ({"kernel": (3, 3, 2, 4), "bias": (4,), "gain": (4, 1, 1)}, ["kernel"]),
    "a norm of rows": ({"weight": (1, 5), "bias": (1, 5)}, [[], "bias weight"]),
    "nothing in it": ({"w": (3, 4), "b": (4,), "z": (0, 3)}, ["w"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_biases_tell_the_layout(name):
    shapes, expected = LAYOUTS[name]
    params = {each: jnp.zeros(shape) for each, shape in shapes.items()}
    found = layouts_of(params)
    assert len(found) == len(expected)
    for layout, paths in zip(found, expected, strict=True):
        paths = paths.split() if isinstance(paths, str) else paths
        assert sorted(path[2:-2] for path in layout.weights) == sorted(paths)
        seen = layout.outputs_first(params)
        for each in paths:
            assert seen[each].shape[:2] == shapes[each][:-3:-1]
        back = layout.inputs_first(seen, params)
        assert {each: leaf.shape for each, leaf in back.items()} == shapes


def test_what_either_layout_gives_counts_once(key):
    one, other = jax.random.split(key)
    model = {"u": jax.random.normal(one, (5, 4)), "v": jax.random.normal(other, (CLASSES, 5))}

    def loss(model, batch):
        logits = jax.nn.log_softmax(jax.nn.relu(batch[0] @ model["u"].T) @ model["v"].T)
        return -jnp.mean(jnp.take_along_axis(logits, batch[1][:, None], axis=1))

    found = symmetries(ModelLoss(double(model), loss, Inputs((4,))), key)
    assert kinds(found) == [("rescale", 5), ("translation", 5)]
    assert motions(found) == ["permute"]


def test_modules_of_equinox_have_their_outputs_first(key):
    model = eqx.nn.MLP(3, 3, 3, 1, use_bias=False, use_final_bias=False, key=key)
    (layout,) = layouts_of(eqx.filter(model, eqx.is_inexact_array))
    assert not layout.weights


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_where_nothing_tells_both_are_tried(right, rows, key):
    # A bias of a square weight, and a weight without.
    one, other = jax.random.normal(key, (2, 3, 3), jnp.float64)
    model = {"first": {"w": one, "b": jnp.ones((1, 3) if rows else 3)}, "z": other}

    def loss(model, batch):
        inputs, labels = batch
        first, last = model["first"]["w"], model["z"]
        first, last = (first, last) if right else (first.T, last.T)
        bias = model["first"]["b"].reshape(1, 3)
        logits = jax.nn.log_softmax(jax.nn.relu(inputs @ first + bias) @ last)
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    found = symmetries(ModelLoss(double(model), loss, Inputs((3,))), key)
    assert kinds(found) == [("rescale", 3), ("translation", 3)]
    assert motions(found) == ["permute"]
    assert found.of_kind("translation")[0].name.endswith(", inputs first") == right
    for generator in found.generators:
        check_follows(generator, random_like(double(model), 0))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_flax_networks_are_understood(key):
    linen = pytest.importorskip("flax.linen")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, image):
            image = linen.relu(linen.Conv(3, (2, 2), param_dtype=jnp.float64)(image))
            row = linen.Dense(5, param_dtype=jnp.float64)(image.reshape(-1))
            row = linen.relu(linen.LayerNorm(param_dtype=jnp.float64)(row))
            return linen.Dense(CLASSES, param_dtype=jnp.float64)(row)

    network = Network()
    variables = network.init(key, jnp.zeros((3, 3, 1), jnp.float64))

    def loss(model, batch):
        images, labels = batch
        logits = jax.nn.log_softmax(jax.vmap(lambda image: network.apply(model, image))(images))
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    found = symmetries(ModelLoss(variables, loss, Inputs((3, 3, 1))), key)
    assert kinds(found) == [
        *(("norm rescale", 5), ("rescale", 3)),
        # The 27 inputs and the bias before the norm, the 5 and the bias before the softmax.
        *(("translation", 6), ("translation", 28)),
    ]
    assert [(g.kind, g.units) for g in found.nearly] == [("scale", 1)]
    views = [place.view for g in found.of_kind("rescale") for place in g.places if place.view]
    assert views == [(9, 3, 5)]  # 9 positions of 3 channels, to 5 units


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_of_flax_is_understood(heads, key):
    linen = pytest.importorskip("flax.linen")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, rows):
            rows = linen.Dense(6, param_dtype=jnp.float64)(rows)
            attention = linen.MultiHeadDotProductAttention(heads, param_dtype=jnp.float64)
            return linen.Dense(CLASSES, param_dtype=jnp.float64)((rows + attention(rows)).mean(0))

    network = Network()

    def loss(model, batch):
        sequences, labels = batch
        logits = jax.nn.log_softmax(jax.vmap(lambda rows: network.apply(model, rows))(sequences))
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    variables = network.init(key, jnp.zeros((4, 5), jnp.float64))
    task = ModelLoss(variables, loss, Inputs((4, 5)))
    found = symmetries(task, key)
    assert kinds(found) == [
        *(("bias exchange", 6), ("bias shift", 6), ("mixing", 36 // heads)),
        *(("query-key mixing", 36 // heads), ("query-key rescale", 6), ("rescale", 6)),
        ("translation", 7),
    ]
    assert sum(each.units == 2 for each in found.maps) == heads - 1
    params = random_like(task.init(key), 0)
    for generator in found.generators:
        check_follows(generator, params)
