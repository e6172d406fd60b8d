"""Sequences that test a network's memory: copying, and recall of what belongs to a key.

Batches are drawn, and there is no data. All splits are the same distribution.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, Scalar, Split, State
from lopt.tasks.classification import label_metrics
from lopt.tasks.network_task import AbstractNetwork, AnyNetwork, Build, Rows, as_network
from lopt.tasks.recurrent import RecurrentNetwork


class Sequences(NamedTuple):
    """Sequences of tokens, what is to be said after each, and whether it counts (1) or not (0)."""

    tokens: Int[Array, "*n time"]
    targets: Int[Array, "*n time"]
    asked: Float[Array, "*n time"]


def _copies(length: int, symbols: int, delay: int, key: Key) -> Sequences:
    """Symbols, `delay` blanks, a signal, and blanks: the symbols are to be said after the signal.

    Tokens are the symbols, then blank, then signal.
    """
    said = jax.random.randint(key, (length,), 0, symbols, jnp.int32)
    blank = jnp.full(length + delay, symbols, jnp.int32)
    signal = jnp.full(1, symbols + 1, jnp.int32)
    tokens = jnp.concatenate([said, blank[:delay], signal, blank[: length - 1]])
    asked = jnp.arange(len(tokens)) >= length + delay
    return Sequences(tokens, jnp.concatenate([blank, said]), asked.astype(jnp.float32))


def _pairs(pairs: int, keys: int, values: int, key: Key) -> Sequences:
    """Pairs of a key and a value, then one of these keys: its value is to be said.

    Tokens are the keys, no key twice in a sequence, then the values.
    """
    key, value_key, query_key = jax.random.split(key, 3)
    drawn = jax.random.permutation(key, jnp.arange(keys, dtype=jnp.int32))[:pairs]
    found = keys + jax.random.randint(value_key, (pairs,), 0, values, jnp.int32)
    query = jax.random.randint(query_key, (1,), 0, pairs, jnp.int32)
    tokens = jnp.concatenate([jnp.stack([drawn, found], axis=1).reshape(-1), drawn[query]])
    asked = jnp.arange(len(tokens)) == len(tokens) - 1
    targets = jnp.where(asked, found[query], tokens)
    return Sequences(tokens, targets, asked.astype(jnp.float32))


class SequenceTask(AbstractTask):
    """Trains a network on drawn sequences: the mean cross entropy where an answer is asked.

    Metrics are "loss" and "accuracy".

    Attributes:
        sequences: from a key to a sequence.
        network: from tokens to logits after each.
        batch_size: sequences per step.
    """

    sequences: Build
    network: AbstractNetwork
    batch_size: int = eqx.field(static=True, default=128)

    def __check_init__(self) -> None:
        check_integer("SequenceTask", "batch_size", self.batch_size, hint="batch_size=128")

    @override
    def init(self, key: Key) -> Params:
        return self.network.init(key)

    @override
    def batch(self, key: Key, split: Split = "train") -> Sequences:
        return jax.vmap(self.sequences)(jax.random.split(key, self.batch_size))

    @override
    def loss(self, params: Params, batch: Sequences) -> Scalar:
        return self.metrics(params, (), batch)["loss"]

    @override
    def metrics(self, params: Params, state: State, batch: Sequences) -> dict[str, Scalar]:
        logits = self.network.apply(params, state, Rows(batch.tokens), False)[0]
        asked = batch.asked.astype(logits.dtype)
        names = zip(("loss", "accuracy"), label_metrics(logits, batch.targets), strict=True)
        return {name: jnp.sum(asked * one) / jnp.sum(asked) for name, one in names}


def copying(
    length: int = 8,
    symbols: int = 8,
    delay: int = 0,
    batch_size: int = 128,
    network: AnyNetwork | None = None,
) -> SequenceTask:
    """Returns the copying of a sequence after it has ended.

    Args:
        length: of what is copied; sequences have 2 length + delay tokens.
        delay: blanks before the copy is asked for.
        network: from tokens below symbols + 2 to as many logits after each; by default an lstm of
            64 units.
    """
    for name, value in (("length", length), ("symbols", symbols)):
        check_integer("copying", name, value, hint=f"{name}=8")
    check_integer("copying", "delay", delay, 0, hint="delay=0")
    return _sequence_task(Build(_copies, length, symbols, delay), symbols + 2, batch_size, network)


def associative_recall(
    pairs: int = 4,
    keys: int = 8,
    values: int = 8,
    batch_size: int = 128,
    network: AnyNetwork | None = None,
) -> SequenceTask:
    """Returns the recall of the value that came with a key (Ba et al. 2016, arXiv:1610.06258).

    Args:
        pairs: of key and value in a sequence, of 2 pairs + 1 tokens.
        keys: how many there are, at least `pairs`.
        network: from tokens below keys + values to as many logits after each; by default an lstm
            of 64 units.
    """
    check_integer("associative_recall", "values", values, hint="values=8")
    check_integer("associative_recall", "keys", keys, hint="keys=8")
    check_integer("associative_recall", "pairs", pairs, 1, keys, hint="pairs=4")
    return _sequence_task(Build(_pairs, pairs, keys, values), keys + values, batch_size, network)


def _sequence_task(
    sequences: Build, vocabulary: int, batch_size: int, network: AnyNetwork | None
) -> SequenceTask:
    default = Build(RecurrentNetwork, vocabulary, vocabulary, "lstm", 64, 32)
    chosen = as_network(default if network is None else network)
    return SequenceTask(sequences, chosen, batch_size)
