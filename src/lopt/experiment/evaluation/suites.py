"""Suites of evaluations: what a rule was trained on, near it, far from it, and sweeps.

"Trained on" is what the recipe `digits` draws: perceptrons with 32 hidden units on 8x8 images in
batches of 128, for 200 steps. All data comes with lopt's dependencies.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from lopt.core.task import AbstractTaskFamily
from lopt.experiment.data.datasets import load_images
from lopt.experiment.data.text import load_text
from lopt.experiment.evaluation.evaluation import Evaluation
from lopt.tasks import (
    Ackley,
    Beale,
    Data,
    DataSubset,
    Examples,
    Rosenbrock,
    StyblinskiTang,
    char_transformer,
    conv_classification,
    mlp_autoencoder,
    mlp_classification,
    rnn_language_model,
)

HORIZON, WIDTH, BATCH = 200, 32, 128


def held_out(data: Data) -> Data:
    """Returns data whose training images no meta-training has seen; tested on valid_inner."""
    splits = data.valid_outer.arrays, data.test.arrays
    train = Examples(jax.tree.map(lambda *parts: jnp.concatenate(parts), *splits))
    return eqx.tree_at(lambda d: (d.train, d.test), data, (train, data.valid_inner))


def _mlp(
    data: Data, *widths: int, batch: int = BATCH, activation: str = "relu"
) -> AbstractTaskFamily:
    chosen = getattr(jnp if activation == "tanh" else jax.nn, activation)
    return mlp_classification(data, widths or (WIDTH,), chosen, batch)


def _subset(data: Data, size: int) -> AbstractTaskFamily:
    return DataSubset(_mlp(data), size)


def _text() -> Data:
    return load_text("bundled", length=33)


def _quick(data: Data) -> list[Evaluation]:
    unseen, make = held_out(data), functools.partial(Evaluation, horizon=HORIZON)
    return [
        make("trained on", _mlp(data), trained_on=True, group="trained on"),
        make("unseen images", _mlp(unseen), group="held out"),
        make(
            "unseen images, 24 units, tanh", _mlp(unseen, 24, activation="tanh"), group="held out"
        ),
        make("wide", _mlp(data, 4 * WIDTH), group="near"),
        make("deep", _mlp(data, *4 * (WIDTH,)), group="near"),
        make("gelu", _mlp(data, activation="gelu"), group="near"),
        make("batches of 8", _mlp(data, batch=8), group="near"),
        make("126 examples", _subset(data, 126), group="near"),
    ]


# Far tasks: name, how to build one from the digits, steps.
FAR: tuple[tuple[str, Callable[[Data], AbstractTaskFamily], int], ...] = (
    (
        "convolutions",
        lambda data: conv_classification(data, (4, 8), 3, (16,), batch_size=32),
        HORIZON,
    ),
    ("autoencoder", lambda data: mlp_autoencoder(data, (32, 8, 32)), HORIZON),
    ("GRU on text", lambda data: rnn_language_model(_text(), "gru", 32, batch_size=16), HORIZON),
    (
        "transformer on text",
        lambda data: char_transformer(_text(), width=32, depth=2, heads=4, batch_size=16),
        HORIZON,
    ),
    ("Rosenbrock", lambda data: Rosenbrock(10, 0.1), HORIZON),
    ("Ackley", lambda data: Ackley(10), HORIZON),
    ("Beale", lambda data: Beale(), HORIZON),
    ("Styblinski and Tang", lambda data: StyblinskiTang(10), HORIZON),
    ("16x16 images", lambda data: _mlp(load_images("digits", size=16), 64), HORIZON),
    ("10 times as long", _mlp, 10 * HORIZON),
)


def _far(data: Data) -> list[Evaluation]:
    return [Evaluation(name, build(data), steps, group="far") for name, build, steps in FAR]


def _sweeps(data: Data) -> list[Evaluation]:
    builds: dict[str, tuple[Callable[[int], AbstractTaskFamily], tuple[int, ...], int]] = {
        "width": (lambda width: _mlp(data, width), (8, 16, 32, 64, 128, 256), WIDTH),
        "batch size": (lambda size: _mlp(data, batch=size), (8, 32, 128, 512), BATCH),
        "data size": (lambda size: _subset(data, size), (79, 158, 315, 630, 1260), 1260),
        "horizon": (lambda _: _mlp(data), (50, 100, 200, 500, 1000), HORIZON),
    }
    return [
        Evaluation(
            f"{group} {place}",
            build(place),
            place if group == "horizon" else HORIZON,
            trained_on=place == trained,
            group=group,
            place=float(place),
        )
        for group, (build, places, trained) in builds.items()
        for place in places
    ]


# `quick` is a part of `standard`; `far` is, too.
SUITES: dict[str, tuple[Callable[[Data], list[Evaluation]], ...]] = {
    "quick": (_quick,),
    "standard": (_quick, _far, _sweeps),
    "far": (_far,),
}


def suite(name: str) -> tuple[Evaluation, ...]:
    """Returns the evaluations of a suite: "quick", "standard" or "far"."""
    if name not in SUITES:
        raise ValueError(f"--suite {name} must be one of: {', '.join(SUITES)}.")
    data = load_images("digits")
    return tuple(one for part in SUITES[name] for one in part(data))
