"""Data that the host reads when a step draws it."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.tasks import DataSubset, Labelled, classification, streamed_data
from lopt.tasks.classification import MultilayerPerceptron

WIDTHS = 4, (5,), 3, jax.nn.relu


def examples(count=60):
    values = np.random.default_rng(0).normal(size=(count, 2, 2, 1)).astype(np.float32)
    return [Labelled(value, np.int32(i % 3)) for i, value in enumerate(values)]


def task(source):
    data = streamed_data(source, num_classes=3)
    return classification(data, lopt.tasks.Build(MultilayerPerceptron, *WIDTHS), batch_size=6)


def trained(task, key, steps=5):
    optimizer = optax.sgd(0.1)
    return lopt.unroll(task, optimizer, lopt.start(task, optimizer, task.init(key), key), steps)


def test_a_stream_of_grain_trains_as_a_list_does(key):
    listed = examples()
    stream = grain.MapDataset.source(listed).map(lambda one: one)
    ours, theirs = trained(task(listed), key), trained(task(stream), key)
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert bool(jnp.isfinite(ours[1]).all())


def test_splits_are_disjoint_and_whole(key):
    data = streamed_data([{"i": np.int32(i)} for i in range(47)])
    seen = [
        set(np.asarray(data.split(name).draw(key, 2000).arrays["i"]).tolist())
        for name in ("train", "valid_inner", "valid_outer", "test")
    ]
    assert [len(one) for one in seen] == [35, 4, 4, 4]
    assert set.union(*seen) == set(range(47))


def test_it_maps_over_keys_and_subsets(key):
    few = DataSubset(task(examples()), 4)
    keys = jax.random.split(key, 3)
    batches = jax.vmap(lambda key: few.draw(keys[0]).batch(key))(keys)
    assert batches.arrays.images.shape == (3, 6, 2, 2, 1)
    for i, one in enumerate(keys):
        alone = few.draw(keys[0]).batch(one)
        np.testing.assert_array_equal(batches.arrays.images[i], alone.arrays.images)
    assert len(np.unique(np.asarray(batches.arrays.images)[..., 0, 0, 0])) <= 4


def test_it_is_judged_on_batches(key):
    found = lopt.core.judge(task(examples()), task(examples()).init(key), (), key)
    assert set(found) == {"loss", "accuracy"}


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="9 examples"):
        streamed_data(examples(9))
