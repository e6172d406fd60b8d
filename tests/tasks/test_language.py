"""Windows of text, recurrent networks, transformers, and tasks that test a network's memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.core.types import SPLITS
from lopt.tasks import (
    DataSubset,
    Examples,
    Mixture,
    RecurrentNetwork,
    Transformer,
    associative_recall,
    char_transformer,
    copying,
    rnn_language_model,
    text_data,
)
from lopt.tasks.classification import label_metrics
from lopt.tasks.network_task import Build, InitApply
from lopt.tasks.recurrent import RecurrentCore

KEY = jax.random.key(0)


@pytest.mark.parametrize(("total", "length"), [(100, 1), (103, 10), (57, 3)])
def test_windows_are_consecutive_and_cross_no_split(total, length):
    data = text_data(np.arange(total), length)
    tenth = total // 10
    ends = np.array([0, total - 3 * tenth, total - 2 * tenth, total - tenth, total])
    assert data.num_classes == total
    for i, name in enumerate(SPLITS):
        examples = data.split(name)
        drawn = np.asarray(examples.draw(KEY, 500).arrays)
        assert drawn.shape == (500, length)
        assert np.all(np.diff(drawn) == 1)
        starts = set(drawn[:, 0].tolist())
        assert starts <= set(range(ends[i], ends[i + 1] - length + 1))
        assert {ends[i], ends[i + 1] - length} <= starts or ends[i + 1] - ends[i] > 50
        whole = examples.everything()
        counted = np.asarray(whole.arrays)[np.asarray(whole.weights) > 0].reshape(-1)
        count = (ends[i + 1] - ends[i]) // length * length
        np.testing.assert_array_equal(counted, np.arange(ends[i], ends[i] + count))


def test_windows_of_a_part_stay_in_it():
    examples = Examples(np.arange(50), 7, 12, length=5)
    drawn = np.asarray(examples.draw(KEY, 300).arrays)
    assert (drawn.min(), drawn.max()) == (7, 18)
    whole = examples.everything()
    assert np.asarray(whole.arrays)[np.asarray(whole.weights) > 0].tolist() == [
        [7, 8, 9, 10, 11],
        [12, 13, 14, 15, 16],
    ]


def test_texts_in_mixtures_and_subsets():
    texts = [text_data(np.arange(60) + 60 * i, 4, 200) for i in range(2)]
    tasks = [rnn_language_model(data, "gru", 4, 3, 50) for data in texts]
    mixture = Mixture(tasks)
    assert len(mixture.architectures()) == 1
    seen = set()
    for key in jax.random.split(KEY, 6):
        tokens = np.asarray(mixture.draw(key).batch(key).arrays)
        assert np.all(np.diff(tokens) == 1)
        assert np.all(tokens < 42) or np.all((tokens >= 60) & (tokens < 102))
        seen.add(bool(tokens[0, 0] < 42))
    assert len(seen) == 2
    tokens = np.asarray(DataSubset(tasks[0], 6).draw(KEY).batch(KEY).arrays)
    assert len(np.unique(tokens[:, 0])) == 3
    with pytest.raises(ValueError, match="shorter than an example"):
        DataSubset(tasks[0], 3)
    with pytest.raises(ValueError, match=r"smallest=3.*shorter than an example"):
        DataSubset(tasks[0], 30, smallest=3)
    longer = rnn_language_model(text_data(np.arange(60), 5, 200), "gru", 4, 3, 50)
    assert len(Mixture([tasks[0], longer]).groups) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text_data(np.arange(50), 6), "ten times.*try length=5"),
        (lambda: text_data(np.arange(5), 1), "try a longer text"),
        (lambda: text_data(np.arange(50), 0), "length=0"),
        (lambda: text_data(np.arange(50), 5, 40), "vocabulary=50"),
        (lambda: text_data(np.arange(50) - 1, 5), "from -1"),
        (lambda: char_transformer(text_data(np.arange(50), 5), 8, 1, 3), r"must divide.*width=9"),
        (lambda: char_transformer(text_data(np.arange(50), 1)), "at least 2 tokens"),
        (lambda: rnn_language_model(lopt.tasks.array_data(np.zeros(50, int))), "windows of"),
        (lambda: RecurrentCore("gru", 2, 2, KEY, init=(jnp.add,) * 2), "one for each.*6"),
        (lambda: associative_recall(9, 8), "at most 8"),
        (lambda: copying(delay=-1), "delay=-1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def run_slowly(core, inputs):
    """One input after the other, from the equations."""
    weights, hidden, bias = map(np.asarray, (core.inputs, core.hidden, core.bias))
    start = np.zeros((2, hidden.shape[1])) if core.start is None else np.asarray(core.start)
    h, c, outputs, n = start[0], start[-1], [], hidden.shape[1]
    w, u, b = (part.reshape(-1, n, *part.shape[1:]) for part in (weights, hidden, bias))
    for x in np.asarray(inputs):
        if core.kind == "vanilla":
            h = np.tanh(w[0] @ x + u[0] @ h + b[0])
        elif core.kind == "gru":
            z, r = (sigmoid(w[i] @ x + u[i] @ h + b[i]) for i in range(2))
            h = (1 - z) * h + z * np.tanh(w[2] @ x + u[2] @ (r * h) + b[2])
        else:
            i, g, f, o = (w[k] @ x + u[k] @ h + b[k] for k in range(4))
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("kind", ["vanilla", "gru", "lstm"])
@pytest.mark.parametrize("trainable", [False, True])
def test_cores_equal_a_plain_loop(kind, trainable):
    core = RecurrentCore(kind, 3, 4, KEY, trainable_start=trainable)
    leaves, structure = jax.tree.flatten(eqx.filter(core, eqx.is_array))
    assert len(leaves) == 3 + trainable
    drawn = [np.random.default_rng(i).normal(size=leaf.shape) for i, leaf in enumerate(leaves)]
    core = structure.unflatten(list(map(jnp.asarray, drawn)))
    inputs = jax.random.normal(KEY, (6, 3), float)
    np.testing.assert_allclose(core(inputs), run_slowly(core, inputs), rtol=1e-10)


def test_initial_weights_of_cores():
    """Each matrix is drawn by its own function, of shape (outputs, inputs)."""
    shapes = []

    def constant(value):
        return lambda key, shape: shapes.append(shape) or jnp.full(shape, value, float)

    core = RecurrentCore("gru", 3, 4, KEY, init=tuple(map(constant, range(6))))
    np.testing.assert_array_equal(core.inputs[::4, 0], [0, 1, 2])
    np.testing.assert_array_equal(core.hidden[::4, 0], [3, 4, 5])
    assert shapes == [(4, 3)] * 3 + [(4, 4)] * 3
    core = RecurrentCore("lstm", 3, 4, KEY, init=(constant(1.0),))
    assert (shapes[-1], core.inputs.shape, core.hidden.shape) == ((16, 7), (16, 3), (16, 4))


def test_read_outs():
    tokens = jnp.array([1, 0, 3, 9])  # 9 stands for the last, 3
    networks = {
        how: RecurrentNetwork(4, 5, "gru", 3, 2, KEY, how) for how in ("all", "last", "avg", "max")
    }
    logits = networks["all"](tokens)
    assert logits.shape == (4, 5)
    np.testing.assert_allclose(logits, networks["all"](jnp.array([1, 0, 3, 3])))
    np.testing.assert_allclose(networks["last"](tokens), logits[-1], rtol=1e-6)
    np.testing.assert_allclose(networks["avg"](tokens), logits.mean(axis=0), rtol=1e-6)
    core = networks["max"].core(networks["max"].embedding[jnp.array([1, 0, 3, 3])])
    expected = networks["max"].weight @ core.max(axis=0)
    np.testing.assert_allclose(networks["max"](tokens), expected, rtol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_transformers_are_causal_and_see_positions(positions):
    network = Transformer(9, 8, 2, 2, 6, KEY, positions=positions)
    tokens = jnp.array([3, 1, 3, 1, 5, 2])
    logits = network(tokens)
    for place in range(6):
        other = network(tokens.at[place].set(8))
        np.testing.assert_array_equal(other[:place], logits[:place])
        changed = jnp.any(jnp.abs(other[place:] - logits[place:]) > 1e-6, axis=1)
        assert bool(jnp.all(changed))
    same = network(jnp.full(6, 4))
    assert float(jnp.abs(same[1] - same[4]).max()) > 1e-4


def test_attention_equals_the_definition():
    network = Transformer(5, 6, 1, 3, 4, KEY)
    block = eqx.tree_at(lambda block: block.down, network.blocks[0], replace_fn=jnp.zeros_like)
    inputs = np.asarray(jax.random.normal(KEY, (4, 6), float))
    normal = (inputs - inputs.mean(1, keepdims=True)) / np.sqrt(inputs.var(1, keepdims=True) + 1e-5)
    q, k, v = np.split(normal @ np.asarray(block.attend, float).T, 3, axis=1)
    mixed = np.zeros((4, 6))
    for head in range(3):
        part = slice(2 * head, 2 * head + 2)
        for time in range(4):
            shares = np.exp(k[: time + 1, part] @ q[time, part] / np.sqrt(2))
            mixed[time, part] = shares / shares.sum() @ v[: time + 1, part]
    block = jax.tree.map(lambda leaf: leaf.astype(float), block)
    expected = inputs + mixed @ np.asarray(block.joined).T
    np.testing.assert_allclose(block(jnp.asarray(inputs)), expected, rtol=1e-8)


def test_metrics_of_language_models():
    data = text_data(np.arange(80) % 4, 5)
    uniform = InitApply(
        lambda key: {"a": jnp.zeros(())}, lambda params, x: jnp.zeros((*x.shape, 4)) + params["a"]
    )
    task = lopt.tasks.language_model(data, uniform, 3)
    metrics = task.metrics({"a": jnp.zeros(())}, (), task.everything("test"))
    np.testing.assert_allclose(metrics["loss"], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(metrics["bits"], 2, rtol=1e-6)
    right = InitApply(
        lambda key: {"a": jnp.ones(())},
        lambda params, x: 100 * params["a"] * jax.nn.one_hot((x + 1) % 4, 4),
    )
    task = lopt.tasks.language_model(data, right, 3)
    metrics = task.metrics(task.init(KEY), (), task.batch(KEY))
    assert float(metrics["loss"]) < 1e-6
    assert float(metrics["accuracy"]) == 1


@pytest.mark.parametrize("task", [copying(3, 4, 2, 16), associative_recall(3, 5, 4, 64)])
def test_memory_tasks_can_be_solved(task):
    batch = task.batch(KEY)
    tokens, asked = np.asarray(batch.tokens), np.asarray(batch.asked) > 0
    vocabulary = len(task.init(KEY).bias)
    assert tokens.min() >= 0
    assert tokens.max() < vocabulary
    answers = np.zeros_like(tokens)
    for row, line in enumerate(tokens.tolist()):
        if len(line) == 8:  # copies
            assert line[3:] == [4, 4, 5, 4, 4]
            answers[row, 5:] = line[:3]
        else:
            assert len(set(line[:6:2])) == 3
            assert all(key < 5 <= value for key, value in zip(line[:6:2], line[1:6:2], strict=True))
            answers[row, -1] = dict(zip(line[:6:2], line[1:6:2], strict=True))[line[-1]]
    assert asked.sum(axis=1).tolist() == [3 if tokens.shape[1] == 8 else 1] * len(tokens)
    logits = 1e3 * jax.nn.one_hot(answers, vocabulary)
    losses, right = label_metrics(logits, batch.targets)
    assert float(jnp.abs(losses[jnp.asarray(asked)]).max()) == 0
    assert bool(jnp.all((right == 1) | (batch.asked == 0)))


def test_language_models_learn():
    """A text that repeats is predicted, by a transformer of another kind in each of two cases."""
    data = text_data(np.arange(600) % 6, 7)
    for task in (
        char_transformer(data, 16, 1, 2, 16, positions="sinusoidal"),
        rnn_language_model(data, "gru", 16, 8, 16),
    ):
        optimizer = optax.sgd(0.3, momentum=0.9)
        state = lopt.start(task, optimizer, task.init(KEY), KEY)
        _, losses = quick_jit(
            lambda task, state, optimizer=optimizer: lopt.unroll(task, optimizer, state, 60)
        )(task, state)
        assert float(losses[-1]) < 0.2 * float(losses[0])


def test_networks_can_be_given():
    network = Build(Transformer, 10, 8, 1, 2, 16)
    task = copying(3, 8, 0, 4, network)
    assert jnp.isfinite(task.loss(task.init(KEY), task.batch(KEY)))
