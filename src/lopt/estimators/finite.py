"""Means over those particles that are finite, and the counting of the others."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lopt.core.estimator import Estimate


def is_finite(estimates: Estimate) -> Bool[Array, " particle"]:
    """Returns which particles have a finite loss and gradient."""
    leaves = [estimates.loss, *jax.tree.leaves(estimates.grads)]
    fine = [jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim))) for leaf in leaves]
    return jnp.stack(fine).all(0)


def along(each: Array, leaf: Array) -> Array:
    """Returns one value per particle in a shape that broadcasts against `leaf`."""
    return each.reshape(-1, *(1,) * (leaf.ndim - 1))


def mean_where(chosen: Bool[Array, " particle"], leaf: Array) -> Array:
    """Returns the mean over some particles; zero if there are none."""
    count = jnp.maximum(total(chosen), 1).astype(leaf.dtype)
    # Divided before they are added, as a sum may overflow where a mean does not.
    return (jnp.where(along(chosen, leaf), leaf, 0) / count).sum(0)


def total(counts: Any) -> Int[Array, ""]:
    """Returns the sum of counts."""
    return jnp.sum(jnp.asarray(counts), dtype=jnp.int32)


def mean_of_finite(estimates: Estimate) -> Estimate:
    """Returns the mean over finite particles; loss and `extra` are NaN if there are none."""
    fine = is_finite(estimates)
    found = estimates.loss, estimates.grads, estimates.extra
    loss, grads, extra = jax.tree.map(lambda leaf: mean_where(fine, leaf), found)
    loss, extra = jax.tree.map(lambda leaf: jnp.where(fine.any(), leaf, jnp.nan), (loss, extra))
    return Estimate(loss, grads, total(~fine) + total(estimates.dropped), extra)


def alike(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Returns estimates of one structure: counts are arrays, and a missing `extra` is zero."""
    names = sorted({name for each in estimates for name in each.extra})

    def like(each: Estimate) -> Estimate:
        extra = {name: each.extra.get(name, jnp.zeros_like(each.loss)) for name in names}
        return Estimate(each.loss, each.grads, jnp.asarray(each.dropped, jnp.int32), extra)

    return [like(each) for each in estimates]
