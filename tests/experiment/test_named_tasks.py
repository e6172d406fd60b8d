"""Tasks by name: the table, data and substitutes, costs that are kept, and the recipe on them."""

import jax
import numpy as np
import pytest

from lopt.core.task import AbstractTask
from lopt.experiment.data import catalogue
from lopt.experiment.data.catalogue import cost, draw_tasks, known_cost, list_tasks, show_task
from lopt.experiment.data.datasets import data_loaded
from lopt.experiment.data.named_tasks import is_task, load, named_task, task_names
from lopt.experiment.settings import ShowTaskSettings, TasksSettings


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LOPT_DATA_DIR", raising=False)
    return tmp_path


def test_a_substitute_has_the_shape_that_was_asked_for_and_is_noted():
    with data_loaded() as loaded:
        colour, grey, small = map(load, ("cifar10", "mnist", "imagenet_resized/16x16"))
        again = load("cifar10")
    assert colour.train.arrays.images.shape[1:] == (32, 32, 3)
    assert grey.train.arrays.images.shape[1:] == (28, 28, 1)
    assert small.train.arrays.images.shape[1:] == (16, 16, 3)
    assert again.train.arrays.images is colour.train.arrays.images
    assert [one["instead_of"] for one in loaded] == ["cifar10", "mnist", "imagenet_resized/16x16"]
    assert {one["name"] for one in loaded} == {"digits"}
    # What is kept is noted again, for the next run.
    with data_loaded() as loaded:
        load("cifar10")
    assert loaded[0]["instead_of"] == "cifar10"


def test_texts_stand_for_corpora():
    with data_loaded() as loaded:
        text = load("lm1b", tokens="bytes", length=20)
        labelled = load("imdb_reviews/bytes", tokens="classes", length=16)
    assert (text.train.length, text.num_classes) == (20, 256)
    assert labelled.train.arrays[0].shape[1] == 16
    assert [one["name"] for one in loaded] == ["bundled", "source_classification"]
    for name, tokens in (("lm2b", "bytes"), ("cifar11", None)):
        with pytest.raises(ValueError, match=r"try '(lm1b|cifar10)'"):
            load(name, tokens=tokens)


def test_names_with_underscores_and_seeds_are_read():
    assert task_names()["fashion_mnist_mlp_layer_norm"] == ("fashion_mnist", "mlp_layer_norm")
    assert isinstance(named_task("quadratic_family_seed3"), AbstractTask)
    assert isinstance(named_task("Beale"), AbstractTask)
    assert is_task("mlp_family_seed12")
    assert not is_task("mlp_family_seed-1")
    with pytest.raises(ValueError, match="try 'digits_conv'"):
        named_task("digit_conv")
    with pytest.raises(ValueError, match="try 'mlp_family_seed7'"):
        named_task("mlp_famly_seed7")


def test_a_resnet_of_fourteen_layers():
    task = named_task("digits_resnet14").draw(jax.random.key(0))
    params = jax.eval_shape(task.init, jax.random.key(0))
    # Seven pairs: the stem with the last layer, and two in each of six blocks; shortcuts aside.
    assert len(params.layers) - sum(len(block.shortcut) for block in params.blocks) + 1 == 14


def test_costs_are_measured_once(monkeypatch):
    found = cost("Beale")
    assert found.params == 2
    assert found.step_time > 0
    assert np.isfinite(found.initial_loss)
    monkeypatch.setattr(catalogue, "measure", None)
    assert cost("Beale") == known_cost("Beale") == found
    catalogue._path("Beale").write_text("{}")
    assert known_cost("Beale") is None


def test_tasks_are_drawn_within_a_budget(monkeypatch):
    def measure(name):
        return catalogue.Cost(1, float(int(name.rpartition("_seed")[2]) % 10), 1.0)

    monkeypatch.setattr(catalogue, "measure", measure)
    families = ("mlp_family", "quadratic_family")
    names = draw_tasks(6, 3.0, 1, families)
    assert len(set(names)) == 6
    assert all(cost(name).step_time <= 3 for name in names)
    assert names == draw_tasks(6, 3.0, 1, families) != draw_tasks(6, 3.0, 2, families)
    with pytest.raises(ValueError, match=r"found 0 tasks.*budget=-10"):
        draw_tasks(1, -1.0, 0, families)
    with pytest.raises(ValueError, match="try 'mlp_family'"):
        draw_tasks(1, 1.0, 0, ("mlp_famly",))


def test_lists_filter_and_a_task_that_fails_is_said_in_a_line(monkeypatch):
    rows = list_tasks(TasksSettings(family=("mlp_family",), count=3)).json()
    assert "mlp_family_seed2" in str(rows)
    assert "mlp_family_seed3" not in str(rows)

    def measure(name):
        return catalogue.Cost(2, 9.0 if name == "Branin" else 1.0, 1.0)

    monkeypatch.setattr(catalogue, "measure", measure)
    shown = str(list_tasks(TasksSettings(pattern="B*", max_step_time=2.0)).json())
    assert "Beale" in shown
    assert "Branin" not in shown
    monkeypatch.setattr(catalogue, "measure", lambda name: catalogue.Cost(error="no subwords"))
    name = "word_rnn_language_model_family_seed0"
    assert "cannot be built: no subwords" in str(show_task(ShowTaskSettings(name)).json())
