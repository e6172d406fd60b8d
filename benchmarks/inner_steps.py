"""Cost of an update, and of an inner step with its gradient, in multiples of AdamW's. Run by hand.

Each row is a process of its own, in which the rule and AdamW take turns: machines are noisy, and
ratios of neighbours are less so. Updates are alone in their program, with state and params
donated. Names select rows:

    python benchmarks/inner_steps.py
    python benchmarks/inner_steps.py update transformer dm
    python benchmarks/inner_steps.py update mlp all
"""

import itertools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import in_own_process, show

import lopt

OPTIMIZERS = ("small_mlp", "adafactor_mlp", "rnnprop", "dm")
# By name only.
OTHERS = (
    "nominal_mlp",
    "hierarchical",
    "rnn_mlp",
    "nn_adam",
    "celo",
    "celo_adam",
    "sinv6",
    "celo2",
)
OTHERS += ("velo", "velo_small", "muon_mlp")
NETWORKS = ("small", "mlp", "transformer")
KINDS = ("update", "step")
SECONDS = 15.0


def perceptron(sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    weights = {f"w{i}": normal(*sizes[i : i + 2]) for i in range(len(sizes) - 1)}
    return weights | {f"b{i}": normal(size) for i, size in enumerate(sizes[1:])}


def transformer(width: int = 76, depth: int = 12, vocabulary: int = 65, time: int = 64) -> Any:
    """Returns 853,556 weights in 148 arrays, as those of a small GPT."""

    def layer(outputs: int, inputs: int = width) -> dict[str, np.ndarray]:
        return {"w": normal(inputs, outputs), "b": normal(outputs)}

    def norm() -> dict[str, np.ndarray]:
        return {"scale": 1 + normal(width), "shift": normal(width)}

    blocks = [
        {"attend": layer(3 * width), "joined": layer(width), "up": layer(4 * width)}
        | {"down": layer(width, 4 * width), "first": norm(), "second": norm()}
        for _ in range(depth)
    ]
    ends = {"tokens": normal(vocabulary, width), "places": normal(time, width), "last": norm()}
    return {"blocks": blocks, **ends}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape) / shape[0] ** 0.5


def perceptron_loss(params: Any, key: jax.Array) -> jax.Array:
    layers = len(params) // 2
    values = jax.random.normal(key, (128, len(params["w0"])))
    for i in range(layers):
        values = values @ params[f"w{i}"] + params[f"b{i}"]
        values = jax.nn.relu(values) if i < layers - 1 else values
    return jnp.mean(jax.nn.logsumexp(values, axis=1) - values[:, 0])


def transformer_loss(params: Any, key: jax.Array, heads: int = 4) -> jax.Array:
    vocabulary, width = params["tokens"].shape
    tokens = jax.random.randint(key, (8, len(params["places"])), 0, vocabulary)
    values = jax.nn.one_hot(tokens, vocabulary) @ params["tokens"] + params["places"]
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))

    def norm(layer: Any, x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, axis=-1) * layer["scale"] + layer["shift"]

    def linear(layer: Any, x: jax.Array) -> jax.Array:
        return x @ layer["w"] + layer["b"]

    for block in params["blocks"]:
        parts = linear(block["attend"], norm(block["first"], values))
        parts = parts.reshape(*tokens.shape, 3, heads, width // heads)
        queries, keys, parts = jnp.moveaxis(parts, 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys) / (width // heads) ** 0.5
        shares = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        mixed = jnp.einsum("bhts,bshd->bthd", shares, parts).reshape(values.shape)
        values = values + linear(block["joined"], mixed)
        hidden = jax.nn.gelu(linear(block["up"], norm(block["second"], values)))
        values = values + linear(block["down"], hidden)
    logits = norm(params["last"], values) @ params["tokens"].T
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])


def build(network: str) -> tuple[Any, Any]:
    """Returns the params of a network and its loss."""
    if network == "transformer":
        params, loss = transformer(), transformer_loss
    else:
        sizes = {"small": (64, 32, 10), "mlp": (784, 800, 450, 10)}[network]
        params, loss = perceptron(sizes), perceptron_loss
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), loss


class Program:
    """A compiled update or step, and what it goes on with."""

    def __init__(self, kind: str, network: str, optimizer: optax.GradientTransformation) -> None:
        self.params, loss = build(network)
        self.given = jax.tree.map(lambda leaf: 1e-2 * jnp.cos(100 * leaf), self.params)
        if kind == "step":
            self.given = jax.random.key(0)

        def function(given: Any, state: Any, params: Any) -> Any:
            grads = jax.grad(loss)(params, given) if kind == "step" else given
            loss_seen = jnp.ones(())
            updates, state = optimizer.update(grads, state, params, value=loss_seen)
            return state, optax.apply_updates(params, updates)

        start = time.perf_counter()
        self.state = jax.jit(optimizer.init)(self.params)
        began = time.process_time()
        lowered = jax.jit(function, donate_argnums=(1, 2)).lower(
            self.given, self.state, self.params
        )
        traced = time.process_time()
        self.compiled = lowered.compile()
        self.trace, self.compile = traced - began, time.process_time() - traced
        self.wait = time.perf_counter() - start
        self.temporary = self.compiled.memory_analysis().temp_size_in_bytes / 1e6
        self.seconds: list[float] = []

    def run(self) -> None:
        """Takes a step and times it."""
        began = time.perf_counter()
        self.state, self.params = jax.block_until_ready(
            self.compiled(self.given, self.state, self.params)
        )
        self.seconds.append(time.perf_counter() - began)


def row(kind: str, network: str, name: str) -> dict[str, Any]:
    learned = getattr(lopt.learned, name)()
    theta = learned.init(jax.random.key(0))
    rule = Program(kind, network, learned.optimizer(theta, 1000))
    adamw = Program(kind, network, optax.with_extra_args_support(optax.adamw(1e-3)))
    ratios, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(ratios) < 5:
        for _ in range(5):
            adamw.run()
        rule.run()
        ratios.append(rule.seconds[-1] / statistics.median(adamw.seconds[-5:]))
    return {
        "ms": [1e3 * min(program.seconds[1:]) for program in (adamw, rule)],
        "ratio": statistics.median(ratios[1:]),
        "temporary": rule.temporary,
        "params": sum(leaf.nbytes for leaf in jax.tree.leaves(rule.params)) / 1e6,
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(rule.state))
        / sum(leaf.size for leaf in jax.tree.leaves(rule.params)),
        "weights": sum(leaf.size for leaf in jax.tree.leaves(theta)),
        "compile": [f"{p.trace:.1f} + {p.compile:.1f} ({p.wait:.1f})" for p in (adamw, rule)],
    }


def main(words: list[str]) -> None:
    rows = []
    names = OPTIMIZERS if not {*OTHERS, "all"} & {*words} else OPTIMIZERS + OTHERS
    words = [word for word in words if word != "all"]
    for kind, network, name in itertools.product(KINDS, NETWORKS, names):
        if not set(words) <= {kind, network, name}:
            continue
        found = in_own_process(__file__, kind, network, name)
        (adamw, rule), fastest = found["ms"], found["ms"][1] / found["ms"][0]
        cells = [f"{adamw:.3f}", f"{rule:.3f}", f"{found['ratio']:.1f}", f"{fastest:.1f}"]
        memory = f"{found['temporary']:.1f} ({found['params']:.1f})"
        size = f"{found['weights']:,}", f"{found['state']:.1f}"
        rows.append([f"{kind}, {network}, {name}", *size, *cells, memory, *found["compile"]])
    headings = [
        "",
        "weights",
        "state bytes a param",
        "AdamW ms",
        "ms",
        "x AdamW, median",
        "of fastest",
        "temporary (params) MB",
    ]
    show("Updates and steps", [*headings, "AdamW: trace + compile, CPU s (all, s)", "rule"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(row(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
