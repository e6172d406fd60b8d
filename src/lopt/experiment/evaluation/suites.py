"""Suites of evaluations: what a rule was trained on, near it, far from it, and sweeps.

"Trained on" is what the recipe `digits` draws: perceptrons with 32 hidden units on 8x8 images in
batches of 128, for 200 steps. All data comes with lopt's dependencies.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from lopt import tasks
from lopt.core.task import AbstractTaskFamily
from lopt.experiment.data.datasets import available, load_images
from lopt.experiment.data.text import load_text
from lopt.experiment.evaluation.evaluation import Evaluation

HORIZON, WIDTH, BATCH = 200, 32, 128
LONG = 10 * HORIZON


def halved(data: tasks.Data, examples: tasks.Examples) -> tasks.Data:
    """Returns data with choices made on one half of some examples, and the other as the test."""
    first, count, half = examples.first, examples.count, examples.count // 2
    rows = (first, half), (first + half, count - half)
    parts = [tasks.Examples(examples.arrays, *row, examples.length) for row in rows]
    return eqx.tree_at(lambda d: [d.valid_outer, d.test], data, parts)


def held_out(data: tasks.Data) -> tasks.Data:
    """Returns data whose training images no meta-training has seen: those of valid_outer and test.

    Choices are made on one half of valid_inner, and test is the other.
    """
    splits = data.valid_outer.arrays, data.test.arrays
    train = tasks.Examples(jax.tree.map(lambda *parts: jnp.concatenate(parts), *splits))
    return eqx.tree_at(lambda d: d.train, halved(data, data.valid_inner), train)


def quick(
    data: tasks.Data,
    horizon: int = HORIZON,
    hidden: int = WIDTH,
    batch: int = BATCH,
    seeds: int = 5,
) -> list[Evaluation]:
    """Returns what a rule for perceptrons with one hidden layer was trained on, and tasks near."""
    unseen = held_out(data)

    def mlp(
        *widths: int, on: tasks.Data = data, activation: Any = jax.nn.relu, size: int = batch
    ) -> Any:
        return tasks.mlp_classification(on, widths or (hidden,), activation, size)

    every = [
        ("trained on", "digits, new initialisations", mlp()),
        ("held out", "unseen images", mlp(on=unseen)),
        ("held out", "unseen images, tanh", mlp(on=unseen, activation=jnp.tanh)),
        ("near", "4 times as wide", mlp(4 * hidden)),
        ("near", "4 hidden layers", mlp(*4 * (hidden,))),
        ("near", "GELU", mlp(activation=jax.nn.gelu)),
        ("near", "batches of 8", mlp(size=8)),
        ("near", "126 examples", tasks.DataSubset(mlp(), 126)),
    ]
    return [
        Evaluation(name, task, horizon, seeds, trained_on=group == "trained on", group=group)
        for group, name, task in every
    ]


def _far(data: tasks.Data) -> list[Evaluation]:
    text, mlp = load_text("bundled", length=17), tasks.mlp_classification
    found = {
        "convolutions": tasks.conv_classification(data, (4, 8), 3, (16,), batch_size=32),
        "autoencoder": tasks.mlp_autoencoder(data, (32, 8, 32)),
        "GRU on text": tasks.rnn_language_model(text, "gru", 32, batch_size=8, vocabulary=128),
        "transformer on text": tasks.char_transformer(text, 16, 2, 4, 8),
        "Rosenbrock": tasks.Rosenbrock(10, 0.1),
        "Ackley": tasks.Ackley(10),
        "Beale": tasks.Beale(),
        "Styblinski and Tang": tasks.StyblinskiTang(10),
        "16x16 images": mlp(load_images("digits", size=16), (64,)),
    }
    evaluations = [Evaluation(name, task, HORIZON, group="far") for name, task in found.items()]
    return [*evaluations, Evaluation("10 times as long", mlp(data, (WIDTH,)), LONG, group="far")]


def _sweeps(data: tasks.Data) -> list[Evaluation]:
    def mlp(width: int = WIDTH, batch: int = BATCH) -> AbstractTaskFamily:
        return tasks.mlp_classification(data, (width,), batch_size=batch)

    # What changes, its values, that of meta-training, and the task at one.
    rows: tuple[tuple[str, tuple[int, ...], int, Callable[[int], AbstractTaskFamily]], ...] = (
        ("width", (8, 16, 32, 64, 128, 256), WIDTH, mlp),
        ("batch size", (8, 32, 128, 512), BATCH, lambda size: mlp(batch=size)),
        ("data size", (79, 158, 315, 630, 1260), 1260, lambda size: tasks.DataSubset(mlp(), size)),
        ("horizon", (50, 100, 200, 500, 1000), HORIZON, lambda _: mlp()),
    )
    return [
        Evaluation(
            f"{group} {place}",
            build(place),
            place if group == "horizon" else HORIZON,
            trained_on=place == trained,
            group=group,
            place=float(place),
        )
        for group, places, trained, build in rows
        for place in places
    ]


def validation(_: tasks.Data) -> list[Evaluation]:
    """Returns what choices for `lopt-1` are made on, but of no data whose files are not found.

    The test is one half of valid_outer: test images have no part in it.
    """
    relu, gelu = jax.nn.relu, jax.nn.gelu
    rows: tuple[tuple[str, tuple[int, ...], Any, int, int], ...] = (
        ("digits", (24,), relu, 200, 200),
        ("digits", (48, 48), relu, 300, 400),
        ("mnist", (64,), relu, 400, 500),
        ("digits", (24,), relu, 400, 0),
        ("digits", (24,) * 4, gelu, 150, 0),
        ("fashion_mnist", (32,), relu, 200, 0),
        ("mnist", (32,), relu, 1000, 0),
        ("fashion_mnist", (64,) * 3, relu, 600, 0),
        ("fashion_mnist", (64,) * 6, relu, 1000, 0),
        ("fashion_mnist", (32,) * 10, jnp.tanh, 300, 0),
    )
    found: list[tuple[str, AbstractTaskFamily, int]] = []
    names = [name for name in ("digits", "mnist", "fashion_mnist") if available(name)]
    loaded = {name: load_images(name, size=8) for name in names}
    data = {name: halved(one, one.valid_outer) for name, one in loaded.items()}
    for name, widths, activation, steps, examples in rows:
        if name in data:
            one: AbstractTaskFamily
            one = tasks.mlp_classification(data[name], widths, activation, batch_size=64)
            title = f"{name}, {len(widths)} x {widths[0]} {activation.__name__}"
            if examples:
                one, title = tasks.DataSubset(one, examples), f"{title}, {examples} examples"
            found.append((title, one, steps))
    encode = tasks.mlp_autoencoder(data[names[-1]], (32, 8, 32), batch_size=32)
    text = load_text("bundled", length=17)
    text = halved(text, text.valid_outer)
    found += [
        (f"{names[-1]}, autoencoder", encode, 300),
        ("text, transformer", tasks.char_transformer(text, 16, 3, 2, 8), 300),
    ]
    return [Evaluation(title, task, steps, group="validation") for title, task, steps in found]


# `quick` is a part of `standard`; `far` is, too.
SUITES: dict[str, tuple[Callable[[tasks.Data], list[Evaluation]], ...]] = {
    "quick": (quick,),
    "standard": (quick, _far, _sweeps),
    "far": (_far,),
    "validation": (validation,),
}


def suite(name: str) -> tuple[Evaluation, ...]:
    """Returns the evaluations of a suite: "quick", "standard", "far" or "validation"."""
    if name not in SUITES:
        raise ValueError(f"--suite {name} must be one of: {', '.join(SUITES)}.")
    data = load_images("digits")
    return tuple(one for part in SUITES[name] for one in part(data))
