"""Recurrent networks on tokens: vanilla, gated recurrent units, long short-term memory.

A core is a scan over the sequence; what depends on the inputs alone is computed before it, in one
product of matrices.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.checks import check_integer
from lopt.core.types import Key
from lopt.tasks.classification import Init, Initialise, initial_weights

Kind: TypeAlias = Literal["vanilla", "gru", "lstm"]
ReadOut: TypeAlias = Literal["all", "last", "avg", "max"]

# How many matrices `init` draws, and how many rows of each a unit has.
MATRICES: dict[Kind, int] = {"vanilla": 2, "gru": 6, "lstm": 1}


class RecurrentCore(eqx.Module):
    """A recurrent network, from inputs x_1, ..., x_T to outputs h_1, ..., h_T.

    With s the sigmoid, h and c what came before, and h' and c' what follows:

    vanilla: h' = activation(W x + U h + b)
    gru:     z = s(W_z x + U_z h + b_z);  r = s(W_r x + U_r h + b_r)
             h' = (1 - z) h + z tanh(W_h x + U_h (r h) + b_h)
    lstm:    (i, g, f, o) = W x + U h + b
             c' = s(f + 1) c + s(i) tanh(g);  h' = s(o) tanh(c')

    Reference: Cho et al. 2014 (arXiv:1406.1078); Hochreiter and Schmidhuber 1997.

    Attributes:
        inputs: W, rows in the order of the equations: z, r, h of a gru.
        hidden: U.
        bias: b, zero at first.
        start: h_0, or h_0 and c_0, zero at first; None if they stay zero.
    """

    inputs: Float[Array, "rows input"]
    hidden: Float[Array, "rows width"]
    bias: Float[Array, " rows"]
    start: Float[Array, "states width"] | None
    kind: Kind = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        kind: Kind,
        inputs: int,
        width: int,
        key: Key,
        activation: Callable[[Array], Array] = jnp.tanh,
        init: tuple[Initialise, ...] | None = None,
        trainable_start: bool = False,
    ) -> None:
        check_integer("RecurrentCore", "width", width, hint="width=64")
        # As published with TaskSet, an lstm has one matrix, others one for each letter.
        if kind == "lstm":
            shapes = [(4 * width, inputs + width)]
        else:
            half = MATRICES[kind] // 2
            shapes = [(width, inputs)] * half + [(width, width)] * half
        if init is None:
            weights = initial_weights(shapes, key, None)
        else:
            if len(init) not in (1, len(shapes)):
                raise ValueError(
                    f"RecurrentCore(init of {len(init)} functions) must have one, or one for each "
                    f"matrix of {kind}: {len(shapes)}; try one."
                )
            drawn = zip(init * (len(shapes) // len(init)), shapes, strict=True)
            keys = jax.random.split(key, len(shapes))
            weights = [draw(keys[i], shape) for i, (draw, shape) in enumerate(drawn)]
        if kind == "lstm":
            self.inputs, self.hidden = jnp.split(weights[0], [inputs], axis=1)
        else:
            self.inputs = jnp.concatenate(weights[:half])
            self.hidden = jnp.concatenate(weights[half:])
        self.bias = jnp.zeros(len(self.inputs), self.inputs.dtype)
        states = 2 if kind == "lstm" else 1
        self.start = jnp.zeros((states, width), self.bias.dtype) if trainable_start else None
        self.kind, self.activation = kind, activation

    def __call__(self, inputs: Float[Array, "time input"]) -> Float[Array, "time width"]:
        """Returns the outputs after each input."""
        sums = inputs @ self.inputs.T + self.bias[None]
        states = 2 if self.kind == "lstm" else 1
        start = jnp.zeros((states, self.hidden.shape[1]), sums.dtype)
        start = start if self.start is None else self.start
        return jax.lax.scan(lambda state, sums: self._step(state, sums), tuple(start), sums)[1]

    def _step(
        self, state: tuple[Float[Array, " width"], ...], sums: Float[Array, " rows"]
    ) -> tuple[tuple[Float[Array, " width"], ...], Float[Array, " width"]]:
        output, sigmoid = state[0], jax.nn.sigmoid
        match self.kind:
            case "vanilla":
                output = self.activation(sums + output @ self.hidden.T)
                return (output,), output
            case "gru":
                gates, own = jnp.split(self.hidden, [2 * len(output)])
                sums, own_sum = jnp.split(sums, [2 * len(output)])
                update, reset = jnp.split(sigmoid(sums + output @ gates.T), 2)
                found = jnp.tanh(own_sum + (reset * output) @ own.T)
                output = (1 - update) * output + update * found
                return (output,), output
            case _:
                into, found, forget, out = jnp.split(sums + output @ self.hidden.T, 4)
                memory = sigmoid(forget + 1) * state[1] + sigmoid(into) * jnp.tanh(found)
                output = sigmoid(out) * jnp.tanh(memory)
                return (output, memory), output


class RecurrentNetwork(eqx.Module):
    """From tokens to logits: an embedding, a `RecurrentCore` and a linear layer.

    Tokens of vocabulary - 1 and above share one embedding.

    Attributes:
        embedding: of each token, normal at first.
        read_out: "all" for logits after each token; otherwise once, from the core's "last" output,
            or the "avg" or "max" of all of them.
    """

    embedding: Float[Array, "vocabulary embed"]
    core: RecurrentCore
    weight: Float[Array, "outputs width"]
    bias: Float[Array, " outputs"]
    read_out: ReadOut = eqx.field(static=True)

    def __init__(
        self,
        vocabulary: int,
        outputs: int,
        kind: Kind,
        width: int,
        embed: int,
        key: Key,
        read_out: ReadOut = "all",
        activation: Callable[[Array], Array] = jnp.tanh,
        init: tuple[Initialise, ...] | None = None,
        output_init: Initialise | None = None,
        trainable_start: bool = False,
    ) -> None:
        for name, size in (("vocabulary", vocabulary), ("embed", embed), ("outputs", outputs)):
            check_integer("RecurrentNetwork", name, size, hint=f"{name}=64")
        keys = jax.random.split(key, 3)
        self.embedding = jax.random.normal(keys[0], (vocabulary, embed))
        self.core = RecurrentCore(
            kind, embed, width, keys[1], activation, init, trainable_start=trainable_start
        )
        draw: Init = "truncated_normal" if output_init is None else output_init
        (self.weight,) = initial_weights([(outputs, width)], keys[2], None, draw)
        self.bias = jnp.zeros(outputs, self.weight.dtype)
        self.read_out = read_out

    def __call__(self, tokens: Int[Array, " time"]) -> Float[Array, "*time outputs"]:
        """Returns the logits of one sequence, one vector for each token or for all."""
        outputs = self.core(embedded(self.embedding, tokens))
        if self.read_out == "all":
            return outputs @ self.weight.T + self.bias[None]
        each: dict[str, Callable[..., Array]] = {"avg": jnp.mean, "max": jnp.max}
        found = outputs[-1] if self.read_out == "last" else each[self.read_out](outputs, axis=0)
        return found @ self.weight.T + self.bias


def embedded(
    table: Float[Array, "vocabulary embed"], tokens: Int[Array, " time"]
) -> Float[Array, "time embed"]:
    """Returns the rows of a table that tokens stand for; too large ones stand for its last."""
    return table.at[tokens].get(mode="clip")
