"""Symmetries of update rules, whatever the loss: what moving the gradients does to the updates."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.analysis.dynamics.script import scripted_updates
from lopt.core.checks import check_integer
from lopt.core.types import Key, Params

SHAPES = {"square": (4, 4), "oblong": (3, 5), "kernel": (3, 3, 2, 4), "vector": (5,)}
Tensors = list[np.ndarray]


def equivariances(
    optimizer: optax.GradientTransformation,
    key: Key,
    params: Params | None = None,
    num_steps: int = 5,
    transposed: optax.GradientTransformation | None = None,
) -> dict[str, float]:
    """Returns by how much a rule, with updates u(g, p), misses each symmetry that it may have.

    - "odd": u(-g, -p) = -u(g, p)
    - "row permutation", "column permutation", "left rotation", "right rotation",
      "square transpose", "oblong transpose": u(T g, T p) = T u(g, p)
    - "scale-free": u(c g, p) = u(g, p), "scale-proportional": u(c g, p) = c u(g, p),
      where c is 1/1000 and 1000, and the loss is multiplied by it too

    Rows and columns are the last two axes, also of kernels; a vector has columns only. Matrices
    alone are transposed. What is returned is the distance of both sides over the root mean square
    of their lengths, all steps together, in the tensor where it is largest; it is at most 2.

    Args:
        optimizer: any; `learned.optimizer(theta, num_steps)` of a learned one.
        key: of params and gradients, which are normal, and of what moves them.
        params: of the shapes to measure on, by default those of `SHAPES`. Moves of none of them are
            left out.
        num_steps: of the run. Params move by the updates.
        transposed: the same rule for transposed matrices, if it is told which axis is the input.

    Example:
        >>> import jax, optax
        >>> found = equivariances(optax.adam(0.1), jax.random.key(0))
        >>> [name for name, defect in found.items() if defect > 0.01]
        ['left rotation', 'right rotation', 'scale-proportional']
    """
    check_integer("equivariances", "num_steps", num_steps, hint=5)
    if params is None:
        params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    # The first of each is the param, the others are gradients.
    drawn = [random.normal(size=(num_steps + 1, *leaf.shape)) for leaf in leaves]

    def updates(tensors: Tensors, rule: optax.GradientTransformation, scale: float) -> Tensors:
        typed = [jnp.asarray(x, leaf.dtype) for x, leaf in zip(tensors, leaves, strict=True)]
        first, grads = (structure.unflatten([x[i] for x in typed]) for i in (0, slice(1, None)))
        losses = scale * jnp.linspace(1, 0.5, num_steps, dtype=typed[0].dtype)
        found = scripted_updates(rule, grads, first, losses)
        return [np.asarray(leaf, float) for leaf in jax.tree.leaves(found)]

    plain = updates(drawn, optimizer, 1.0)
    sizes = {size for leaf in leaves for size in leaf.shape[-2:]}
    orders = {size: random.permutation(size) for size in sizes}
    turns = {size: np.linalg.qr(random.normal(size=(size, size)))[0] for size in sizes}
    # What they move, by its shape, and how, behind an axis of steps.
    moves: dict[str, tuple[Callable[..., bool], Callable[[np.ndarray], np.ndarray]]] = {
        "odd": (lambda *s: True, np.negative),
        "row permutation": (lambda *s: len(s) > 1, lambda x: x[..., orders[x.shape[-2]], :]),
        "column permutation": (lambda *s: len(s) > 0, lambda x: x[..., orders[x.shape[-1]]]),
        "left rotation": (lambda *s: len(s) > 1, lambda x: turns[x.shape[-2]] @ x),
        "right rotation": (lambda *s: len(s) > 1, lambda x: x @ turns[x.shape[-1]]),
        "square transpose": (lambda *s: len(s) == 2 and s[0] == s[1], lambda x: x.swapaxes(1, 2)),
        "oblong transpose": (lambda *s: len(s) == 2 and s[0] != s[1], lambda x: x.swapaxes(1, 2)),
    }
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for name, (has, move) in moves.items():
        here = [has(*leaf.shape) for leaf in leaves]
        if any(here):
            there = [move(x) if h else x for x, h in zip(drawn, here, strict=True)]
            rule = transposed if transposed and name.endswith("transpose") else optimizer
            after = zip(updates(there, rule, 1.0), plain, here, strict=True)
            pairs[name] = [(a, move(b)) for a, b, h in after if h]
    for c in (1e-3, 1e3):
        scaled = updates([np.concatenate([x[:1], c * x[1:]]) for x in drawn], optimizer, c)
        pairs["scale-free"] += zip(scaled, plain, strict=True)
        pairs["scale-proportional"] += zip(scaled, [c * x for x in plain], strict=True)

    def defect(a: np.ndarray, b: np.ndarray) -> float:
        lengths = np.hypot(np.linalg.norm(a), np.linalg.norm(b))
        return 2**0.5 * np.linalg.norm(a - b) / (lengths + np.finfo(float).tiny)

    return {name: float(np.max([defect(*p) for p in each])) for name, each in pairs.items()}
