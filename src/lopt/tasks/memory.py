"""Sequences that test a network's memory: copying, and recall of what belongs to a key.

Batches are drawn, and there is no data. All splits are the same distribution.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, Scalar, Split, State
from lopt.tasks.language import token_metrics
from lopt.tasks.network_task import AbstractNetwork, AnyNetwork, Build, Rows, as_network
from lopt.tasks.recurrent import RecurrentNetwork


class Sequences(NamedTuple):
    """Sequences of tokens, what is to be said after each, and whether it counts (1) or not (0)."""

    tokens: Int[Array, "*n time"]
    targets: Int[Array, "*n time"]
    asked: Float[Array, "*n time"]


class AbstractSequences(eqx.Module):
    """A distribution of sequences."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """The number of tokens that there are."""

    @abc.abstractmethod
    def draw(self, key: Key) -> Sequences:
        """Returns one sequence."""


class _Copies(AbstractSequences):
    """Symbols, `delay` blanks, a signal, and blanks: the symbols are to be said after the signal.

    Tokens are the symbols, then blank, then signal.
    """

    length: int = eqx.field(static=True)
    symbols: int = eqx.field(static=True)
    delay: int = eqx.field(static=True)

    @property
    @override
    def vocabulary(self) -> int:
        return self.symbols + 2

    @override
    def draw(self, key: Key) -> Sequences:
        said = jax.random.randint(key, (self.length,), 0, self.symbols, jnp.int32)
        blank = jnp.full(self.length + self.delay, self.symbols, jnp.int32)
        before, after = blank[: self.delay], blank[: self.length - 1]
        signal = jnp.full(1, self.symbols + 1, jnp.int32)
        tokens = jnp.concatenate([said, before, signal, after])
        targets = jnp.concatenate([blank, said])
        asked = jnp.arange(len(tokens)) >= self.length + self.delay
        return Sequences(tokens, targets, asked.astype(jnp.float32))


class _Pairs(AbstractSequences):
    """Pairs of a key and a value, then one of these keys: its value is to be said.

    Tokens are the keys, no key twice in a sequence, then the values.
    """

    pairs: int = eqx.field(static=True)
    keys: int = eqx.field(static=True)
    values: int = eqx.field(static=True)

    @property
    @override
    def vocabulary(self) -> int:
        return self.keys + self.values

    @override
    def draw(self, key: Key) -> Sequences:
        key, value_key, query_key = jax.random.split(key, 3)
        keys = jax.random.permutation(key, jnp.arange(self.keys, dtype=jnp.int32))[: self.pairs]
        drawn = jax.random.randint(value_key, (self.pairs,), 0, self.values, jnp.int32)
        values = self.keys + drawn
        query = jax.random.randint(query_key, (1,), 0, self.pairs, jnp.int32)
        tokens = jnp.concatenate([jnp.stack([keys, values], axis=1).reshape(-1), keys[query]])
        asked = jnp.arange(len(tokens)) == len(tokens) - 1
        targets = jnp.where(asked, values[query], tokens)
        return Sequences(tokens, targets, asked.astype(jnp.float32))


class SequenceTask(AbstractTask):
    """Trains a network on drawn sequences: the mean cross entropy where an answer is asked.

    Metrics are "loss" and "accuracy".

    Attributes:
        sequences: the distribution.
        network: from tokens to logits after each.
        batch_size: sequences per step.
    """

    sequences: AbstractSequences
    network: AbstractNetwork
    batch_size: int = eqx.field(static=True, default=128)

    def __check_init__(self) -> None:
        check_integer("SequenceTask", "batch_size", self.batch_size, hint="batch_size=128")

    @override
    def init(self, key: Key) -> Params:
        return self.network.init(key)

    @override
    def batch(self, key: Key, split: Split = "train") -> Sequences:
        return jax.vmap(self.sequences.draw)(jax.random.split(key, self.batch_size))

    @override
    def loss(self, params: Params, batch: Sequences) -> Scalar:
        return self.metrics(params, (), batch)["loss"]

    @override
    def metrics(self, params: Params, state: State, batch: Sequences) -> dict[str, Scalar]:
        logits = self.network.apply(params, state, Rows(batch.tokens), False)[0]
        asked = batch.asked.astype(logits.dtype)
        names = zip(("loss", "accuracy"), token_metrics(logits, batch.targets), strict=True)
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
        symbols: how many there are.
        delay: blanks before the copy is asked for.
        batch_size: sequences per step.
        network: from tokens below symbols + 2 to as many logits after each; by default an lstm of
            64 units.
    """
    for name, value in (("length", length), ("symbols", symbols)):
        check_integer("copying", name, value, hint=f"{name}=8")
    check_integer("copying", "delay", delay, 0, hint="delay=0")
    return _sequence_task(_Copies(length, symbols, delay), batch_size, network)


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
        values: how many there are.
        batch_size: sequences per step.
        network: from tokens below keys + values to as many logits after each; by default an lstm
            of 64 units.
    """
    check_integer("associative_recall", "values", values, hint="values=8")
    check_integer("associative_recall", "keys", keys, hint="keys=8")
    check_integer("associative_recall", "pairs", pairs, 1, keys, hint="pairs=4")
    return _sequence_task(_Pairs(pairs, keys, values), batch_size, network)


def _sequence_task(
    sequences: AbstractSequences, batch_size: int, network: AnyNetwork | None
) -> SequenceTask:
    size = sequences.vocabulary
    default = Build(RecurrentNetwork, size, size, "lstm", 64, 32)
    chosen = as_network(default if network is None else network)
    return SequenceTask(sequences, chosen, batch_size)
