"""Symmetries are found: in the library's tasks, in Equinox models and in foreign losses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from networks import Attentive, Inputs, double, images, model_task, perceptron

import lopt
from lopt.analysis.symmetry import (
    FreeGenerator,
    ModelLoss,
    Place,
    check_symmetry,
    homogeneous_degree,
    missing_ranks,
    rescale,
    scale,
    symmetries,
    translation,
    unit_map,
)
from lopt.analysis.symmetry.structure import layers_of


def kinds(found):
    return sorted((generator.kind, generator.units) for generator in found.generators)


def motions(found):
    return sorted(each.motion for each in found.maps)


def test_of_a_perceptron(key):
    data = images(4)
    relu = symmetries(lopt.tasks.mlp_classification(data, (6, 5)), key)
    assert kinds(relu) == [("rescale", 5), ("rescale", 6), ("translation", 6)]
    assert motions(relu) == ["permute", "permute"]
    tanh = symmetries(lopt.tasks.mlp_classification(data, (6,), jnp.tanh), key)
    assert kinds(tanh) == [("translation", 7)]
    assert motions(tanh) == ["flip", "permute"]
    # What was refused is there with its slope.
    refused = tanh.evidence["rescale of .layers[0].weight and .layers[1].weight"]
    assert not refused.holds
    assert refused.slope > 1e-4
    assert "translation of .layers[1].weight: slope" in str(tanh)


@pytest.mark.slow
def test_of_batch_norm_scale_holds_nearly(key):
    task = lopt.tasks.batch_norm_classification(images(4), (6, 5))
    found = symmetries(task, key)
    assert kinds(found) == [
        *(("bias shift", 5), ("bias shift", 6), ("norm rescale", 5), ("norm rescale", 6)),
        ("translation", 6),
    ]
    assert sorted((g.kind, g.units) for g in found.nearly) == [("scale", 5), ("scale", 6)]
    # Units with their norms, and the sign of a row with that of its gain.
    assert motions(found) == ["flip", "flip", "permute", "permute"]
    assert len(found.of_kind("scale")) == 2


@pytest.mark.slow
def test_of_convolutions_and_the_dense_layer_behind_them(key):
    task = lopt.tasks.conv_classification(images(8), (3, 4), 3, (5,), batch_size=32)
    found = symmetries(task, key)
    assert kinds(found) == [
        *(("rescale", 3), ("rescale", 4), ("rescale", 5), ("translation", 6)),
    ]
    views = [place.view for g in found.generators for place in g.places if place.view]
    assert (5, 4, 4) in views  # a dense layer of 5 on 2 x 2 positions of 4 channels, units last
    assert motions(found) == ["permute"] * 3


def test_of_linear_units_all_of_the_null_space(key):
    task = perceptron(lambda z: z)
    found = symmetries(task, key)
    assert kinds(found) == [
        *(("bias exchange", 3), ("early translation", 4), ("mixing", 9), ("rescale", 3)),
        ("translation", 4),
    ]
    ranks = missing_ranks(task, key, found.generators)
    assert (ranks.nullity, ranks.unexplained) == (17, 0)


LINEAR = {
    # Inputs, units, hidden layers and outputs; missing ranks; what is proposed besides those above.
    "more units than classes": ((6, 4, 1, 3), 43 - 14, [("unseen", 28)]),
    "two hidden layers": ((4, 3, 2, 3), 39 - 10, []),
    "few inputs": ((2, 4, 1, 6), 42 - 15, [("unreached", 24)]),
    "few inputs, two hidden layers": ((1, 3, 2, 4), 34 - 6, [("unreached", 9), ("unreached", 12)]),
    "two hidden layers of many units": ((5, 4, 2, 3), 59 - 12, [("unseen", 20), ("unseen", 24)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_of_more_linear_units_all_of_the_null_space(name, key):
    (inputs, width, depth, outputs), nullity, more = LINEAR[name]
    model = eqx.nn.MLP(inputs, outputs, width, depth, lambda z: z, key=key)
    task = model_task(model, (inputs,))
    found = symmetries(task, key)
    assert [kind for kind in kinds(found) if kind[0] in ("unreached", "unseen")] == more
    assert len(found.of_kind("early translation")) == (depth if width >= outputs else 0)
    ranks = missing_ranks(task, key, found.generators)
    assert (ranks.nullity, ranks.unexplained) == (nullity, 0)


class Flattened(eqx.Module):
    """A linear convolution of three channels, and a dense layer behind its flattened image."""

    conv: eqx.nn.Conv1d
    dense: eqx.nn.Linear

    def __init__(self, key):
        one, other = jax.random.split(key)
        self.conv = eqx.nn.Conv1d(1, 3, 2, key=one)
        self.dense = eqx.nn.Linear(6, 3, key=other)

    def __call__(self, row):
        return self.dense(self.conv(row).reshape(-1))


def test_of_linear_channels_behind_a_flattened_image(key):
    found = symmetries(model_task(Flattened(key), (1, 3)), key)
    (mixed,) = found.of_kind("mixing")
    assert mixed.units == 9
    assert mixed.outgoing[0].view == (3, 3, 2)  # channels first, then positions


class Tied(eqx.Module):
    """An autoencoder whose decoder is its encoder transposed."""

    weight: jax.Array
    bias: jax.Array
    offset: jax.Array

    def __call__(self, row):
        return self.weight.T @ jnp.tanh(self.weight @ row + self.bias) + self.offset


def test_of_tied_weights(key):
    model = Tied(jax.random.normal(key, (5, 4)), jnp.zeros(5), jnp.zeros(4))
    task = ModelLoss(
        double(model),
        lambda model, batch: jnp.mean((jax.vmap(model)(batch[0]) - batch[0]) ** 2),
        Inputs((4,)),
    )
    found = symmetries(task, key)
    assert found.generators == ()
    assert sorted(each.name for each in found.maps) == [
        "permutation of .weight, .bias",
        "sign flips of .weight, .bias",
    ]


class Stream(eqx.Module):
    """Tied embeddings around a residual block."""

    embedding: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    block: eqx.nn.MLP

    def __call__(self, token):
        row = self.embedding.weight[token]
        return self.embedding.weight @ (row + self.block(self.norm(row)))


@pytest.mark.slow
def test_of_a_residual_stream_with_tied_embeddings(key):
    one, other = jax.random.split(key)
    embedding, block = eqx.nn.Embedding(7, 6, key=one), eqx.nn.MLP(6, 6, 8, 1, key=other)
    model = double(Stream(embedding, eqx.nn.LayerNorm(6), block))

    def loss(model, tokens):
        scores = jax.nn.log_softmax(jax.vmap(model)(tokens))
        return -jnp.mean(scores[jnp.arange(len(tokens)), (3 * tokens + 1) % 7])

    found = symmetries(ModelLoss(model, loss, lambda k: jax.random.randint(k, (8,), 0, 7)), key)
    assert kinds(found) == [("norm rescale", 6), ("rescale", 8)]
    assert motions(found) == ["permute", "permute"]
    [stream] = [each for each in found.maps if each.units == 6]
    assert ".embedding.weight" in stream.name


@pytest.mark.slow
def test_of_attention_and_layer_norm(key):
    found = symmetries(model_task(Attentive(jax.random.key(1)), (4, 4)), key)
    blocks = {(g.kind, g.units) for g in found.generators if g.name.endswith("2 heads")}
    assert blocks == {("query-key mixing", 18), ("mixing", 8)}
    endings = [each.name.rsplit(", ", 1)[1] for each in found.maps if "heads" in each.name]
    assert endings == ["within 2 heads", "within 2 heads", "2 heads"]
    pairs = [each for each in found.maps if each.motion == "flip" and "query" in each.name]
    assert [len(each.places) for each in pairs] == [4]
    names = {(g.kind, g.name) for g in found.generators}
    assert ("query-key rescale", "query-key rescale of .attention.query_proj.weight") in names
    assert ("translation", "translation of .hidden.weight") in names  # the layer norm's
    assert ("translation", "translation of .output.weight") in names  # the softmax's
    assert ("norm rescale", "norm rescale of .norm.weight and .output.weight") in names
    value = "rescale of .attention.value_proj.weight and .attention.output_proj.weight"
    assert ("rescale", value) in names
    assert [g.name for g in found.nearly] == ["scale of all .hidden.weight"]


@pytest.mark.slow
def test_of_a_foreign_loss_by_numbers_alone(key):
    # Squared ReLU, in a dict, on a squared error: rescaling of degree 2 and nothing else.
    first, second, bias = (
        jax.random.normal(k, s)
        for k, s in zip(jax.random.split(key, 3), ((4, 3), (2, 4), (4,)), strict=True)
    )

    def loss(model, batch):
        hidden = jax.nn.relu(batch[0] @ model["a"]["w"].T + model["a"]["b"][None]) ** 2
        return jnp.mean((hidden @ model["z"].T - 1) ** 2)

    task = ModelLoss({"a": {"w": first, "b": bias}, "z": second}, loss, Inputs((3,)))
    found = symmetries(task, key)
    assert [(g.kind, g.units, g.places[-1].coefficient) for g in found.generators] == [
        ("rescale", 4, -2.0)
    ]


def test_symmetries_of_ones_own_are_proposed_besides(key):
    task = lopt.tasks.mlp_classification(images(4), (6,))
    wrong = scale(task.init(key), ".layers[0].weight", name="mine")
    found = symmetries(task, key, others=[wrong])
    assert not found.evidence["mine"].holds
    assert "mine" not in [g.name for g in found.generators]


@pytest.mark.slow
def test_single_precision_is_precise_enough(key):
    model = eqx.nn.MLP(4, 3, 5, 1, jax.nn.relu, dtype=jnp.float32, key=key)

    def loss(model, batch):
        return jnp.mean(
            jax.nn.logsumexp(jax.vmap(model)(batch[0].astype(jnp.float32)), axis=1)
            - jnp.mean(jax.vmap(model)(batch[0].astype(jnp.float32)), axis=1)
        )

    found = symmetries(ModelLoss(model, loss, Inputs((4,))), key)
    assert kinds(found) == [("rescale", 5), ("translation", 6)]


@pytest.mark.parametrize(
    ("activation", "degree"),
    [
        (jax.nn.relu, 1.0),
        (lambda z: z, 1.0),
        (jax.nn.relu6, None),
        (jax.nn.gelu, None),
        (jnp.tanh, None),
        (lambda z: jnp.abs(z) ** 1.5, 1.5),
        (jnp.zeros_like, None),
    ],
)
def test_degrees_of_units(activation, degree):
    assert homogeneous_degree(activation) == degree


W1, B1, W2 = ".layers[0].weight", ".layers[0].bias", ".layers[1].weight"


def test_one_of_others_that_is_proposed_anyway_counts_once(key):
    task = lopt.tasks.mlp_classification(images(4), (6,))
    same = rescale(task.init(key), (W1, B1), W2)
    found = symmetries(task, key, others=[same, same])
    assert kinds(found) == [("rescale", 6), ("translation", 7)]


def test_one_of_others_with_the_name_of_a_different_one_is_refused(key):
    task = lopt.tasks.mlp_classification(images(4), (6,))
    params = task.init(key)
    # Named as that of degree 1, which the task has.
    wrong = rescale(params, (W1, B1), W2, degree=2.0)
    with pytest.raises(ValueError, match=r"named 'rescale of .*try name="):
        symmetries(task, key, others=[wrong])
    named = rescale(params, (W1, B1), W2, degree=2.0, name="squares")
    found = symmetries(task, key, others=[named])
    assert kinds(found) == [("rescale", 6), ("translation", 7)]
    assert not found.evidence["squares"].holds
    other = translation(params, W2, name="squares")
    with pytest.raises(ValueError, match=r"named 'squares'"):
        symmetries(task, key, others=[named, other])


def square(model, batch):
    return jnp.mean((jax.vmap(model)(batch[0]) - 1) ** 2)


@pytest.mark.parametrize("sizes", [(4, "scalar"), (4, 1), (1, 1)])
def test_layers_of_one_input_or_one_output_are_layers(key, sizes):
    model = eqx.nn.MLP(*sizes, 5, 1, jax.nn.relu, dtype=jnp.float64, key=key)
    task = ModelLoss(model, square, Inputs((sizes[0],)))
    assert ("rescale", 5) in kinds(symmetries(task, key))


def test_gains_are_no_layers_and_numbers_belong_to_names():
    layers = {"w": (4, 3), "w1": (1, 4), "w_2": (2, 1), "kernel3": (5, 2), "w5": (2, 5)}
    biases = {"b": (4,), "b1": (1,), "b_2": (2,), "bias3": (5,), "b4": (2,), "b5": (3,)}
    shapes = layers | biases | {"gain": (4, 1, 1), "scale": (4,), "conv": (4, 3, 1, 1)}
    found = layers_of({name: jnp.zeros(shape) for name, shape in shapes.items()})
    pairs = {layer.weight[2:-2]: layer.bias and layer.bias[2:-2] for layer in found}
    numbered = {"w1": "b1", "w_2": "b_2", "kernel3": "bias3"}
    assert pairs == {"w": "b", "w5": None, "conv": None} | numbered


def test_a_tolerance_wider_than_nearly_is_heeded(key):
    # A symmetry but for a small force along it.
    def loss(model, batch):
        logits = batch[0] @ model["w"].T
        own = jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])
        return own + 0.02 * jnp.mean(model["w"])

    model = {"w": jax.random.normal(key, (3, 4), jnp.float64)}
    task = ModelLoss(model, loss, Inputs((4,)))
    name = "translation of ['w']"
    strict = symmetries(task, key).evidence[name]
    assert 1e-3 < strict.slope < 0.05
    assert strict.moved is None
    assert strict.tested
    assert not strict.holds
    assert str(strict).endswith("and it was not moved")
    wide = symmetries(task, key, tolerance=0.2)
    assert wide.evidence[name].moved is not None
    assert name in [g.name for g in wide.generators]
    assert not wide.nearly


def test_a_free_generator_may_be_proposed(key):
    task = lopt.tasks.mlp_classification(images(4), (6,))
    good = rescale(task.init(key), (W1, B1), W2)
    free = FreeGenerator("free", "rescale", good.units, good.act)
    found = symmetries(task, key, others=[free, free])
    assert [g.name for g in found.generators].count("free") == 1


@pytest.mark.slow
def test_signs_and_places_of_each_unit_are_told_from_those_of_all(key):
    # Channels first: seen with channels last, only the sign of all units at once may change.
    params = {"w1": jax.random.normal(key, (2, 2)), "w2": jax.random.normal(key, (2, 8))}

    def loss(model, batch):
        hidden = jnp.einsum("oc,ncp->nop", model["w1"], batch[0])
        return jnp.mean((hidden.reshape(len(hidden), -1) @ model["w2"].T - batch[0][:, :, 0]) ** 2)

    task = ModelLoss(double(params), loss, Inputs((2, 4)))
    for seed in range(3):
        names = [each.name for each in symmetries(task, jax.random.key(seed)).maps]
        assert names
        assert all(name.endswith("units first") for name in names)

    # Each unit sees the next one: turned around they are the same, two exchanged they are not.
    def ring(model, batch):
        hidden = jnp.tanh(batch[0] @ model["w1"].T)
        hidden = hidden * jnp.roll(hidden, 1, axis=1) ** 2 + hidden
        return jnp.mean((hidden @ model["w2"].T - 1) ** 2)

    params = {"w1": jax.random.normal(key, (3, 4)), "w2": jax.random.normal(key, (2, 3))}
    task = ModelLoss(double(params), ring, Inputs((4,)))
    turn = unit_map("permute", (Place("['w1']"), Place("['w2']", axis=1)), 3)
    with pytest.raises(ValueError, match="does not have the symmetry"):
        check_symmetry(turn, task, key)


@pytest.mark.slow
def test_of_attention_without_biases_as_wide_as_its_inputs(key):
    model = double(eqx.nn.MultiheadAttention(2, 4, key=key))

    def loss(model, batch):
        return jnp.mean((jax.vmap(lambda rows: model(rows, rows, rows))(batch[0]) - batch[0]) ** 2)

    task = ModelLoss(model, loss, Inputs((5, 4)))
    found = symmetries(task, key)
    assert kinds(found) == [
        *(("mixing", 8), ("query-key mixing", 8), ("query-key rescale", 4), ("rescale", 4)),
    ]
    assert motions(found) == ["flip", "flip", "permute", "permute", "permute"]
    other = translation(task.init(key), ".query_proj.weight", name=found.generators[-1].name)
    with pytest.raises(ValueError, match="has a symmetry named"):
        symmetries(task, key, others=[other])


class Gated(eqx.Module):
    """A norm that is read by a gate and by what it gates."""

    norm: eqx.nn.LayerNorm
    gate: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        first, *rest = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(4)
        self.gate, self.value = (eqx.nn.Linear(4, 5, key=each) for each in rest)
        self.out = eqx.nn.Linear(5, 3, key=first)

    def __call__(self, row):
        seen = self.norm(row)
        return self.out(jax.nn.sigmoid(self.gate(seen)) * self.value(seen))


class PreNorm(eqx.Module):
    """Attention behind a norm, which queries, keys and values read."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    out: eqx.nn.Linear

    def __init__(self, key):
        one, other = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=one)
        self.out = eqx.nn.Linear(4, 3, key=other)

    def __call__(self, rows):
        seen = jax.vmap(self.norm)(rows)
        return self.out(jnp.mean(rows + self.attention(seen, seen, seen), axis=0))


@pytest.mark.parametrize(
    ("network", "shape"), [(Gated, (4,)), pytest.param(PreNorm, (5, 4), marks=pytest.mark.slow)]
)
def test_of_units_that_several_layers_read(network, shape, key):
    found = symmetries(model_task(network(key), shape), key)
    (read,) = found.of_kind("norm rescale")
    assert read.units == 4
    assert read in found.generators
    paths = {place.path for place in read.places if place.coefficient < 0}
    assert len(paths) == (2 if network is Gated else 3)
    if network is Gated:
        rescaled = {place.path for g in found.of_kind("rescale") for place in g.places}
        assert rescaled == {".value.weight", ".value.bias", ".out.weight"}
