"""Cost of a task's step: data and machinery of lopt against a loop written by hand.

Run by hand: no arguments. Each row is a process of its own; the hand-written loop is the same
network and optimizer in plain JAX and Optax, drawing the same batches, and the two take turns.
"""

import json
import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import in_own_process, show

import lopt
from lopt.tasks.network_task import Build

STEPS = {"MLP": 200, "conv net": 20, "char RNN": 20, "transformer": 4}
REPEATS = 5


def image_task(kind: str) -> lopt.tasks.NetworkTask:
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 1), np.uint8)
    data = lopt.tasks.image_data(images, np.arange(1500) % 10, None, None, 10, 8)
    if kind == "MLP":
        return lopt.tasks.mlp_classification(data, (128, 128))
    return lopt.tasks.conv_classification(data, (16, 16), 3, (32,))


def text_task(kind: str) -> lopt.tasks.NetworkTask:
    tokens = np.random.default_rng(0).integers(0, 65, 100_000)
    data = lopt.tasks.text_data(tokens, 65)
    if kind == "char RNN":
        return lopt.tasks.rnn_language_model(data, "gru", 64, 32)
    return lopt.tasks.char_transformer(data, 64, 2, 4)


def plain_transformer(params: dict, tokens: jax.Array) -> jax.Array:
    """Returns logits of shape (n, time, vocabulary): the network of `text_task`, written again."""

    def normal(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + shift

    x = params["embedding"][tokens] + params["positions"]
    n, time_, width = x.shape
    mask = jnp.tril(jnp.ones((time_, time_), bool))
    for block in params["blocks"]:
        y = normal(x, *block["norm1"]) @ block["attend"]
        q, k, v = (part.reshape(n, time_, 4, width // 4) for part in jnp.split(y, 3, axis=-1))
        scores = jnp.einsum("nqhc,nkhc->nhqk", q, k) / (width // 4) ** 0.5
        shares = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", shares, v).reshape(n, time_, width)
        x = x + mixed @ block["joined"]
        y = jax.nn.gelu(normal(x, *block["norm2"]) @ block["up"] + block["up_bias"])
        x = x + y @ block["down"] + block["down_bias"]
    return normal(x, *params["norm"]) @ params["outputs"]


def plain_params(network: lopt.tasks.Transformer) -> dict:
    return {
        "embedding": network.embedding,
        "positions": network.positions,
        "norm": (network.scale, network.shift),
        "outputs": network.outputs.T,
        "blocks": [
            {
                "norm1": (block.scales[0], block.shifts[0]),
                "norm2": (block.scales[1], block.shifts[1]),
                "attend": block.attend.T,
                "joined": block.joined.T,
                "up": block.up.T,
                "up_bias": block.up_bias,
                "down": block.down.T,
                "down_bias": block.down_bias,
            }
            for block in network.blocks
        ],
    }


def by_hand(kind: str, task: lopt.tasks.NetworkTask, optimizer: optax.GradientTransformation):
    """Returns a jitted function of (params, optimizer's state, key) that trains, and its start."""
    arrays, batch_size = task.data.train.arrays, task.batch_size
    is_text = kind in ("char RNN", "transformer")
    params, predict = task.init(jax.random.key(0)), None
    if kind == "transformer":
        params, predict = plain_params(params), plain_transformer
    else:
        build: Build = task.network.build
        _, static = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)

        def predict(params, inputs):
            return jax.vmap(eqx.combine(params, static))(inputs)

    def loss_of(params, key):
        if is_text:
            starts = jax.random.randint(key, (batch_size,), 0, len(arrays) - 64)
            tokens = arrays[starts[:, None] + jnp.arange(65)]
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
        else:
            rows = jax.random.randint(key, (batch_size,), 0, len(arrays.labels))
            inputs, targets = arrays.images[rows].reshape(batch_size, -1), arrays.labels[rows]
        logits = predict(params, inputs)
        ones = jax.nn.one_hot(targets, logits.shape[-1])
        return optax.softmax_cross_entropy(logits, ones).mean()

    def step(state, key):
        params, own = state
        loss, grads = jax.value_and_grad(loss_of)(params, key)
        updates, own = optimizer.update(grads, own, params)
        return (optax.apply_updates(params, updates), own), loss

    @jax.jit
    def run(state, key):
        return jax.lax.scan(step, state, jax.random.split(key, STEPS[kind]))

    return run, (params, optimizer.init(params))


def row(kind: str) -> dict:
    task = (image_task if kind in ("MLP", "conv net") else text_task)(kind)
    optimizer, key = optax.adam(1e-3), jax.random.key(0)
    state = lopt.start(task, optimizer, task.init(key), key)
    run, plain = by_hand(kind, task, optimizer)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    seconds = {"lopt": [], "by hand": []}
    for i in range(REPEATS + 1):  # the first compiles
        began = time.perf_counter()
        state, losses = jax.block_until_ready(lopt.unroll(task, optimizer, state, STEPS[kind]))
        halfway = time.perf_counter()
        plain, others = jax.block_until_ready(run(plain, jax.random.fold_in(key, i)))
        seconds["lopt"].append(halfway - began)
        seconds["by hand"].append(time.perf_counter() - halfway)
    ours, theirs = seconds["lopt"][1:], seconds["by hand"][1:]
    return {
        "weights": weights,
        "lopt": 1e3 * min(ours) / STEPS[kind],
        "by hand": 1e3 * min(theirs) / STEPS[kind],
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "losses": (float(losses[-1]), float(others[-1])),
    }


def main() -> None:
    rows = []
    for kind in ("MLP", "conv net", "char RNN", "transformer"):
        found = in_own_process(__file__, kind)
        times = [f"{found[name]:.2f}" for name in ("lopt", "by hand", "ratio")]
        losses = " and ".join(f"{loss:.3f}" for loss in found["losses"])
        rows.append([f"{kind} ({found['weights']:,} weights)", *times, losses])
    show("Steps with Adam", ["task", "lopt ms", "by hand ms", "ratio", "last losses"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(row(*sys.argv[2:])))
    else:
        main()
