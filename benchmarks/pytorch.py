"""Updates of learned optimizers in PyTorch against the same in JAX, in turns in one process.

python benchmarks/pytorch.py lopt-1 small_mlp
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from common import in_own_process, show
from torch import nn

import lopt
from lopt.torch import LearnedOptimizer

RULES = ("lopt-1", "small_mlp", "adafactor_mlp", "celo2", "rnnprop", "hierarchical", "velo_small")
SECONDS = 12.0


def network() -> nn.Module:
    """Returns a perceptron of 992,960 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 800), nn.ReLU(), nn.Linear(800, 450), nn.ReLU(), nn.Linear(450, 10)
    )
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return model


def in_jax(rule: Any) -> Callable[[], None]:
    """Returns a step of a rule in JAX."""
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in network().named_parameters()}
    if isinstance(rule, str):
        optimizer = lopt.pretrained(rule, 1000)
    else:
        optimizer = rule.optimizer(rule.init(jax.random.key(0)), 1000)
    grads, now = jax.tree.map(lambda p: 0.01 * jnp.cos(p), params), [optimizer.init(params), params]

    def function(state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params, value=jnp.ones(()))
        return state, jax.tree.map(jnp.add, params, updates)

    step = jax.jit(function, donate_argnums=(0, 1))

    def run() -> None:
        now[:] = jax.block_until_ready(step(*now))

    return run


def in_torch(rule: Any, compiled: bool) -> Callable[[], None]:
    """Returns a step of a rule in PyTorch."""
    optimizer = LearnedOptimizer.for_module(network(), rule, num_steps=1000)
    step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
    return lambda: step(loss=1.0)


def row(name: str) -> dict[str, Any]:
    rule = name if name in lopt.pretrained_names() else getattr(lopt.learned, name)()
    adamw = torch.optim.AdamW(network().parameters(), fused=True)
    steps = {"adamw": adamw.step, "jax": in_jax(rule)}
    steps |= {"eager": in_torch(rule, False), "compiled": in_torch(rule, True)}
    took: dict[str, list[float]] = {kind: [] for kind in steps}
    began = {}
    for kind, step in steps.items():
        start = time.perf_counter()
        step()
        began[kind] = time.perf_counter() - start
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(took["jax"]) < 5:
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            took[kind].append(time.perf_counter() - start)
    return {"ms": {k: 1e3 * statistics.median(v) for k, v in took.items()}, "first": began}


def main(names: list[str]) -> None:
    rows = []
    for name in names or RULES:
        found = in_own_process(__file__, name)
        ms = found["ms"]
        cells = [f"{ms[kind]:.1f}" for kind in ("adamw", "jax", "eager", "compiled")]
        ratios = [f"{ms[kind] / ms['jax']:.2f}" for kind in ("eager", "compiled")]
        print(f"{name}: {', '.join(cells)} ms", flush=True)
        rows.append([name, *cells, *ratios, f"{found['first']['compiled']:.0f}"])
    headings = ["", "AdamW, fused: ms", "JAX: ms", "eager: ms", "compiled: ms"]
    headings += ["eager / JAX", "compiled / JAX", "compilation: s"]
    show("Updates of a perceptron of 992,960 weights", headings, rows)


if __name__ == "__main__":
    if "--row" in sys.argv:
        import json

        print(json.dumps(row(sys.argv[-1])))
    else:
        main(sys.argv[1:])
