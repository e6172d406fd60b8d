"""Language models on text: a transformer and recurrent networks that predict the next token."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt.core.checks import check_integer
from lopt.core.types import Key, Scalar
from lopt.tasks.classification import initial_weights, label_metrics
from lopt.tasks.data import Data, Rows
from lopt.tasks.network_task import AnyNetwork, Build, NetworkTask, Predict, as_network
from lopt.tasks.recurrent import Kind, RecurrentNetwork, embedded


class NextToken(eqx.Module):
    """The objective of a language model: each token of an example, from those before it.

    Metrics are "loss", the mean cross entropy in nats per token, the same as "bits", and
    "accuracy". The first token of an example is not predicted.

    Attributes:
        vocabulary: the number of logits. Tokens of vocabulary - 1 and above count as one.
    """

    vocabulary: int | None = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer("language_model", "vocabulary", self.vocabulary, hint="vocabulary=256")

    def __call__(self, predict: Predict, rows: Rows) -> dict[str, Scalar]:
        """Returns the metrics of a network on a batch of windows, of shape (n, length)."""
        tokens = jnp.minimum(rows.arrays, (self.vocabulary or 1) - 1)
        losses, right = label_metrics(predict(tokens[:, :-1]), tokens[:, 1:])
        loss, accuracy = (rows.mean(jnp.mean(one, axis=1)) for one in (losses, right))
        return {"loss": loss, "bits": loss / math.log(2), "accuracy": accuracy}


def language_model(
    data: Data, network: AnyNetwork, batch_size: int = 32, vocabulary: int | None = None
) -> NetworkTask:
    """Returns the prediction of the next token by a network of any kind: see `NextToken`.

    Args:
        data: a text, from `text_data` or `lopt.load_text`.
        network: from tokens to logits after each of them; in Equinox, of one sequence.
        batch_size: windows per step.
        vocabulary: the number of logits, by default that of tokens in the data.
    """
    if not isinstance(data.train.arrays, jax.Array) or (data.train.length or 0) < 2:
        raise ValueError(
            f"language_model(data) has examples of length {data.train.length}; must be windows of "
            "at least 2 tokens, try text_data(tokens, length=64)."
        )
    size = data.num_classes if vocabulary is None else vocabulary
    return NetworkTask(data, as_network(network), NextToken(size), batch_size)


def rnn_language_model(
    data: Data,
    kind: Kind = "lstm",
    width: int = 64,
    embed: int = 32,
    batch_size: int = 32,
    vocabulary: int | None = None,
    **network: Any,
) -> NetworkTask:
    """Returns the prediction of the next token by a `RecurrentNetwork`.

    Other arguments are those of `language_model`.

    Args:
        kind: "vanilla", "gru" or "lstm".
        width: the number of units.
        embed: the length of the embedding of a token.
        network: what else `RecurrentNetwork` takes.
    """
    size = data.num_classes if vocabulary is None else vocabulary
    build = Build(RecurrentNetwork, size, size, kind, width, embed, **network)
    return language_model(data, build, batch_size, size)


class Block(eqx.Module):
    """One block of a transformer: attention, then a perceptron, each added to its inputs."""

    scales: Float[Array, "2 width"]
    shifts: Float[Array, "2 width"]
    attend: Float[Array, "triple width"]  # queries, keys, values
    joined: Float[Array, "width width"]
    up: Float[Array, "hidden width"]
    down: Float[Array, "width hidden"]
    up_bias: Float[Array, " hidden"]
    down_bias: Float[Array, " width"]
    heads: int = eqx.field(static=True)
    causal: bool = eqx.field(static=True, default=True)

    def __call__(self, inputs: Float[Array, "time width"]) -> Float[Array, "time width"]:
        """Returns the outputs, of the shape of the inputs."""
        time, width = inputs.shape
        normal = normalise(inputs, self.scales[0], self.shifts[0])
        parts = (normal @ self.attend.T).reshape(time, 3, self.heads, width // self.heads)
        queries, keys, values = jnp.moveaxis(parts, (1, 2), (0, 1))
        scores = queries @ keys.swapaxes(1, 2) / math.sqrt(width // self.heads)
        if self.causal:  # a token sees itself and what is before it
            seen = jnp.tril(jnp.ones((time, time), bool))[None]
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        shares = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.moveaxis(shares @ values, 0, 1).reshape(time, width)
        inputs = inputs + mixed @ self.joined.T
        normal = normalise(inputs, self.scales[1], self.shifts[1])
        hidden = jax.nn.gelu(normal @ self.up.T + self.up_bias[None])
        return inputs + hidden @ self.down.T + self.down_bias[None]


def normalise(
    inputs: Float[Array, "time width"], scale: Float[Array, " width"], shift: Float[Array, " width"]
) -> Float[Array, "time width"]:
    """Returns inputs of mean 0 and variance 1 at each time, scaled and shifted (layer norm)."""
    inputs = inputs - jnp.mean(inputs, axis=1, keepdims=True)
    variance = jnp.mean(inputs**2, axis=1, keepdims=True)
    return inputs * jax.lax.rsqrt(variance + 1e-5) * scale[None] + shift[None]


def initial_blocks(
    owner: str,
    ends: Sequence[tuple[int, ...]],
    width: int,
    depth: int,
    heads: int,
    key: Key,
    hidden: int | None = None,
    causal: bool = True,
) -> tuple[list[Float[Array, "output input"]], tuple[Block, ...]]:
    """Draws the weights of a transformer: those of shapes `ends`, and blocks.

    Weights start normal with standard deviation 1 / sqrt(fan in), cut at two of them; those that
    are added to the inputs of a block 1 / sqrt(2 depth) times as large, as in GPT-2.
    """
    for name, size in {"width": width, "depth": depth, "heads": heads}.items():
        check_integer(owner, name, size, hint=f"{name}=4")
    if width % heads:
        raise ValueError(
            f"{owner}(heads={heads}) must divide width={width}; try "
            f"width={heads * -(-width // heads)}."
        )
    inner = 4 * width if hidden is None else hidden
    own = [(3 * width, width), (width, width), (inner, width), (width, inner)]
    drawn = initial_weights([*ends, *own * depth], key, None)
    residual, dtype = (2 * depth) ** -0.5, drawn[0].dtype
    ones, zeros = jnp.ones((2, width), dtype), jnp.zeros((2, width), dtype)
    parts = zip(*(drawn[len(ends) + i :: 4] for i in range(4)), strict=True)
    blocks = tuple(
        Block(
            scales=ones,
            shifts=zeros,
            attend=attend,
            joined=residual * joined,
            up=up,
            up_bias=jnp.zeros(inner, dtype),
            down=residual * down,
            down_bias=zeros[0],
            heads=heads,
            causal=causal,
        )
        for attend, joined, up, down in parts
    )
    return drawn[: len(ends)], blocks


class Transformer(eqx.Module):
    """From tokens to logits after each: a causal transformer, normalised before each block.

    Attributes:
        embedding: of each token.
        positions: added to it, learned; None for sinusoidal ones.
    """

    embedding: Float[Array, "vocabulary width"]
    positions: Float[Array, "longest width"] | None
    blocks: tuple[Block, ...]
    scale: Float[Array, " width"]
    shift: Float[Array, " width"]
    outputs: Float[Array, "vocabulary width"]

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        longest: int,
        key: Key,
        hidden: int | None = None,
        positions: Literal["learned", "sinusoidal"] = "learned",
    ) -> None:
        check_integer("Transformer", "vocabulary", vocabulary, hint="vocabulary=4")
        ends = [(vocabulary, width), (vocabulary, width), (longest, width)]
        drawn, self.blocks = initial_blocks("Transformer", ends, width, depth, heads, key, hidden)
        self.embedding, self.outputs, learned = drawn
        self.positions = learned if positions == "learned" else None
        self.scale, self.shift = jnp.ones(width, learned.dtype), jnp.zeros(width, learned.dtype)

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "time vocabulary"]:
        """Returns the logits of one sequence."""
        values = embedded(self.embedding, tokens)
        if self.positions is None:
            values = values + jnp.asarray(_sinusoids(*values.shape), values.dtype)
        else:
            values = values + self.positions[: len(tokens)]
        for block in self.blocks:
            values = block(values)
        return normalise(values, self.scale, self.shift) @ self.outputs.T


def _sinusoids(time: int, width: int) -> Float[np.ndarray, "time width"]:
    """Returns sines and cosines of t / 10000^(i / width), for even i (Vaswani et al. 2017)."""
    angles = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]


def char_transformer(
    data: Data,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    batch_size: int = 32,
    hidden: int | None = None,
    positions: Literal["learned", "sinusoidal"] = "learned",
) -> NetworkTask:
    """Returns the prediction of the next token by a `Transformer`.

    Other arguments are those of `language_model`.

    Args:
        width: the length of the vectors that stand for a token; a multiple of `heads`.
        depth: the number of blocks of attention and a perceptron.
        heads: the number of attention heads.
        hidden: units of the perceptrons, by default 4 width.
        positions: "learned" or "sinusoidal".

    Example:
        >>> import jax, numpy as np, lopt
        >>> data = lopt.tasks.text_data(np.arange(1000) % 7, length=9)
        >>> task = lopt.tasks.char_transformer(data, width=8, depth=1, heads=2)
        >>> metrics = task.metrics(task.init(jax.random.key(0)), (), task.everything("test"))
        >>> sorted(metrics)
        ['accuracy', 'bits', 'loss']
    """
    longest = max(1, (data.train.length or 0) - 1)
    sizes = data.num_classes, width, depth, heads, longest
    network = Build(Transformer, *sizes, hidden=hidden, positions=positions)
    return language_model(data, network, batch_size)
