"""A rule that mixes features by a network, as an equation: the mix that is linear in terms.

A term is a feature times a factor. Least squares need only the mean products of terms, which are
summed up while the rule trains networks; nothing is recorded.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key, Theta
from lopt.core.unroll import Step, start, unroll


class LinearMix(NamedTuple):
    """A rule without a network, its theta, and of each kind the mix, and its R2."""

    learned: AbstractLearnedOptimizer
    theta: Theta
    linear: dict[str, Float[Array, "feature factor"]]
    r_squared: dict[str, float]


class _Products(eqx.Module):
    """A record for `lopt.unroll`: of each kind of tensor mean products of all terms and the mix."""

    learned: Any
    theta: Theta

    def __call__(self, step: Step) -> dict[str, Float[Array, "term term"]]:
        """Returns the products of a step, summed over tensors; the mix is last."""
        sums: dict[str, Any] = {}
        seen = step.grads, step.opt_state, step.params
        for kind, mixed in self.learned.mixtures(self.theta, *seen):
            inputs = len(self.theta[kind]["linear"])
            products = jax.vmap(functools.partial(_products, inputs))(*mixed)
            sums[kind] = sums.get(kind, 0) + jnp.sum(products, 0)
        return sums


def _products(inputs: int, mix: Array, factors: Array, features: list[Array]) -> Array:
    features = [*features, *[jnp.zeros_like(mix)] * (inputs - len(features)), mix]
    rows = jnp.stack(features).reshape(len(features), -1)
    own = rows @ rows.T / mix.size
    terms, side = jnp.kron(own[:-1, :-1], jnp.outer(factors, factors)), jnp.kron(own[-1], factors)
    side = side[: len(terms), None]
    return jnp.block([[terms, side], [side.T, own[-1:, -1:]]])


def distill_mixture(
    tasks: AbstractTaskFamily,
    learned: Any,
    theta: Theta,
    key: Key,
    *,
    horizons: tuple[int, ...] = (200, 1000),
    loss: float = 0.03,
    longest: int | None = None,
) -> LinearMix:
    """Returns a rule without a network, which mixes nearly what `learned` does.

    One task of each architecture is trained by `learned`, for each of the lengths. Terms are left
    out one by one, always the one that explains least, while R2 is at most `loss` below that of
    all, or there are more than `longest`.

    Args:
        tasks: what is trained.
        learned: a `lopt.learned.MuonMLP`.
        theta: its weights.
        key: of tasks, initial params and batches.
        horizons: numbers of steps; with one alone, what depends on the length is not known.
        loss: of R2, at most.
        longest: the most terms for each kind of tensor.
    """
    sums: dict[str, Any] = {}
    runs = itertools.product(tasks.architectures(), horizons)
    part = math.gcd(*horizons)  # runs of all lengths share a program
    for i, (family, steps) in enumerate(runs):
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        task, optimizer = family.draw(keys[0]), learned.optimizer(theta, jnp.asarray(steps))
        state = start(task, optimizer, task.init(keys[1]), keys[2])
        for _ in range(steps // part):
            state, seen = unroll(task, optimizer, state, part, record=_Products(learned, theta))
            for kind, products in seen.items():
                sums[kind] = sums.get(kind, 0) + np.asarray(products, float).sum(0)
    if not all(np.isfinite(total).all() for total in sums.values()):
        raise ValueError(f"The rule diverges within {max(horizons)} steps; try fewer.")
    linear, explained = {}, {}
    for kind, total in sums.items():
        mix, explained[kind] = _fewest(total, loss, longest or len(total))
        linear[kind] = jnp.asarray(mix.reshape(theta[kind]["linear"].shape), jnp.float32)
    short, found = learned.without_network(theta, linear)
    return LinearMix(short, found, linear, explained)


def _fewest(
    total: Float[np.ndarray, "all all"], loss: float, longest: int
) -> tuple[Float[np.ndarray, " term"], float]:
    """Returns the coefficients of the fewest terms that do, and how much they explain."""

    def fit(terms: list[int]) -> tuple[np.ndarray, float]:
        own, mix = total[np.ix_(terms, terms)], total[terms, -1]
        # Some terms are equal in all trainings, or zero.
        weights = np.linalg.solve(own + np.diag(1e-6 * np.diag(own) + 1e-12), mix)
        return weights, (2 * weights @ mix - weights @ own @ weights) / total[-1, -1]

    kept = list(range(len(total) - 1))
    least = fit(kept)[1] - loss
    while len(kept) > 1:
        terms = max(
            ([k for k in kept if k != out] for out in kept[::-1]), key=lambda some: fit(some)[1]
        )
        if fit(terms)[1] < least and len(kept) <= longest:
            break
        kept = terms
    weights, explained = fit(kept)
    linear = np.zeros(len(total) - 1)
    linear[kept] = weights
    return linear, float(explained)


def mixture_to_text(
    linear: Float[Array, "feature factor"],
    features: Sequence[str],
    factors: Sequence[str],
    digits: int = 2,
) -> str:
    """Returns a mix as a sum of features, each times a sum of factors; the first factor is one."""
    parts = []
    for feature, row in zip(features, np.asarray(linear), strict=True):
        terms = [
            f"{weight:+.{digits}g} {name}"
            for name, weight in zip(factors, row, strict=True)
            if weight
        ]
        if terms:
            parts.append(f"({' '.join(terms)}) {feature}".replace(f" {factors[0]}", ""))
    return " + ".join(parts)
