"""TaskSet's families on text: distributions, round trips, and tasks that train."""

import collections
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.tasks import array_data, taskset, text_data
from lopt.tasks.taskset.text_families import CORPORA, REVIEWS

KEY = jax.random.key(0)
CLASSES = "rnn_text_classification_family"
CHARACTERS, WORDS = "char_rnn_language_model_family", "word_rnn_language_model_family"
NAMES = [CLASSES, CHARACTERS, WORDS]


def load(name, tokens, length):
    """Returns noise; a text has room for what is trained on at least."""
    rng = np.random.default_rng(0)
    if tokens == "classes":
        made = rng.integers(0, 300, (40, length)), rng.integers(0, 3, 40)
        return array_data(tuple(part.astype(np.int32) for part in made), num_classes=3)
    vocabulary = 256 if tokens == "bytes" else 8192
    return text_data(rng.integers(0, vocabulary, 30 * length), length, vocabulary)


def assert_shares(found, weights):
    """Checks that each share is within four standard errors of its binomial."""
    counts, total = collections.Counter(found), sum(weights.values())
    assert counts.keys() <= weights.keys()
    for name, weight in weights.items():
        share = weight / total
        error = (share * (1 - share) / len(found)) ** 0.5
        assert abs(counts[name] / len(found) - share) <= 4 * error, (name, counts)


def assert_log_uniform(found, low, high):
    """Checks range and mean logarithm of rounded numbers."""
    assert low <= min(found)
    assert max(found) <= high
    spread = math.log(high / low)
    error = spread / (12 * len(found)) ** 0.5
    assert abs(np.mean(np.log(found)) - math.log(low * high) / 2) < 4 * error + 0.01


@pytest.mark.parametrize("compat", ["clean", "taskset"])
@pytest.mark.parametrize("name", NAMES)
def test_distributions(name, compat):
    configs = [taskset.sample(name, seed, compat) for seed in range(1000)]
    for config in configs[:50]:
        assert taskset.from_json(json.loads(json.dumps(taskset.to_json(config)))) == config
    assert_log_uniform([config.embed for config in configs], 8, 128)
    assert_log_uniform([config.core.width for config in configs], 32, 128)
    assert_shares([config.trainable_start for config in configs], {True: 1, False: 1})
    kinds = collections.Counter(config.core.kind for config in configs)
    assert_shares([config.core.kind for config in configs], dict.fromkeys(kinds, 1))
    assert len(kinds) == 3
    for kind, count in (("gru", 6), ("vanilla", 2)):
        matrices = [len(c.core.initializers) for c in configs if c.core.kind == kind]
        assert_shares(matrices, {1: 4, count: 1})
    assert {len(c.core.initializers) for c in configs if c.core.kind == "lstm"} == {1}
    assert all((c.core.activation is None) == (c.core.kind != "vanilla") for c in configs)
    texts = [config.text for config in configs]
    assert_log_uniform([text.batch_size for text in texts], 8, 512)
    most = {CLASSES: 128, CHARACTERS: 160, WORDS: 256}[name]
    assert_log_uniform([text.length for text in texts], 8 if name == CLASSES else 10, most)
    parts = [text.train_examples for text in texts]
    assert_shares([part is None for part in parts], {True: 4, False: 1})
    assert all(part is None or 1000 <= part <= 50000 for part in parts)
    as_published = name == CLASSES and compat == "taskset"
    shares = {False: 1} if as_published else {True: 1, False: 4}
    assert_shares([text.just_train for text in texts], shares)
    data_sets = dict.fromkeys(CORPORA, 1)
    if name == CLASSES:
        kinds = ("bytes", "subwords8k")
        data_sets = {f"{review}/{kind}": 1 for review in REVIEWS for kind in kinds}
    data_sets = {"imdb_reviews/subwords8k": 1} if as_published else data_sets
    assert_shares([text.data_set for text in texts], data_sets)
    vocabularies = [config.vocabulary for config in configs]
    if name == CHARACTERS:
        assert 100 <= min(vocabularies) <= max(vocabularies) <= 256
        assert_shares([v < 255.5 for v in vocabularies], {False: 0.8005, True: 0.1995})
    elif name == WORDS:
        assert_log_uniform(vocabularies, 1000, 30000)
    else:
        assert 100 <= min(vocabularies) <= max(vocabularies) <= 8185
        assert_shares([c.read_out for c in configs], {"last": 1, "avg": 1, "max": 1})


@pytest.mark.parametrize("name", NAMES)
def test_published_seed(name):
    """The first numbers that NumPy's old generator gives from the bare seed."""
    config = taskset.sample(name, 7, "taskset")
    first = np.random.RandomState(7).uniform(math.log(8), math.log(128))
    assert config.embed == round(math.exp(first))


def small(config):
    """Returns a configuration whose task costs little: all sizes, and no more, are cut.

    Widths are the same for all, so that programs of initialisers are compiled once.
    """
    values = taskset.to_json(config)
    values["text"] |= {"batch_size": 4, "length": 6}
    values["core"]["width"] = 5
    values["embed"] = 4
    values["vocabulary"] = min(values["vocabulary"], 300)
    return taskset.from_json(values)


@pytest.mark.parametrize(("name", "seed"), [*zip(NAMES * 2, range(6), strict=True)])
def test_tasks_train(name, seed):
    config = small(taskset.sample(name, seed))
    task = config.build(load)
    optimizer = optax.sgd(1e-3)
    state = lopt.start(task, optimizer, task.init(KEY), KEY)
    state, losses = lopt.unroll(task, optimizer, state, 20)
    assert bool(jnp.isfinite(losses).all())
    assert bool(jnp.isfinite(task.loss(state.params, task.everything("test"))))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fifty_tasks_take_twenty_finite_steps(name):
    # Gradients span tens of orders of magnitude: steps of one length are finite for all.
    optimizer = optax.sign_sgd(1e-5)
    for seed in range(50):
        task = small(taskset.sample(name, seed)).build(load)
        state = lopt.start(task, optimizer, task.init(KEY), KEY)
        _, losses = lopt.unroll(task, optimizer, state, 20)
        assert bool(jnp.isfinite(losses).all()), seed


def test_parts_of_a_text():
    values = taskset.to_json(small(taskset.sample(CHARACTERS, 0)))
    values["text"] |= {"train_examples": 3, "just_train": True, "length": 10}
    task = taskset.from_json(values).build(load)
    assert int(task.data.train.count) == int(task.data.test.count) == 30
    values["text"] |= {"train_examples": 5000}
    assert int(taskset.from_json(values).build(load).data.train.count) == 210
