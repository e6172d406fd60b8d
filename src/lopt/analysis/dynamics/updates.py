"""How large updates are: their distribution over training, tensor by tensor, as a record.

Histograms of |u| over time tell optimizers apart at a glance: sign rules have one bar, learned
rules begin with the largest steps and drift towards Adam's distribution.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt.core.checks import is_real
from lopt.core.types import Params
from lopt.core.unroll import Step


class UpdateDistribution(eqx.Module):
    """How large one step's updates are in each tensor.

    Attributes:
        counts: of |u| in each bin; the first is below all edges, zeros included, the last above
            them, with what is not finite.
        largest: the largest |u|.
        update_norm, param_norm: Euclidean, of the updates and of the params they are added to.
    """

    counts: Int[Array, "*time tensor bin"]
    largest: Float[Array, "*time tensor"]
    update_norm: Float[Array, "*time tensor"]
    param_norm: Float[Array, "*time tensor"]

    @property
    def relative(self) -> Float[Array, "*time tensor"]:
        """The relative step |u| / |theta|; infinite where params are zero."""
        return self.update_norm / self.param_norm

    @property
    def overall_relative(self) -> Float[Array, "*time"]:
        """The relative step of all tensors together."""
        square = jnp.sum(self.update_norm**2, axis=-1) / jnp.sum(self.param_norm**2, axis=-1)
        return jnp.sqrt(square)


class UpdateHistogram(eqx.Module):
    """Records the distribution of updates: `lopt.unroll(..., record=UpdateHistogram())`.

    Attributes:
        lowest, highest: the range of |u| with bins of its own, in logarithmic steps.
        bins: how many.

    Example:
        >>> import jax, jax.numpy as jnp, optax, lopt
        >>> from lopt.analysis.dynamics import UpdateHistogram
        >>> task = lopt.tasks.Quadratic(jnp.ones(3), jnp.ones(3))
        >>> key, histogram = jax.random.key(0), UpdateHistogram()
        >>> optimizer = optax.lion(0.01, weight_decay=0.0)
        >>> state = lopt.start(task, optimizer, task.init(key), key)
        >>> _, found = lopt.unroll(task, optimizer, state, 5, record=histogram)
        >>> found.counts.shape
        (5, 1, 32)
        >>> bool(jnp.all(found.largest == 0.01))
        True
    """

    lowest: float = eqx.field(static=True, default=1e-9)
    highest: float = eqx.field(static=True, default=1e1)
    bins: int = eqx.field(static=True, default=30)

    def __check_init__(self) -> None:
        real = is_real(self.lowest) and is_real(self.highest)
        if not real or not 0 < self.lowest < self.highest < math.inf:
            raise ValueError(
                f"UpdateHistogram(lowest={self.lowest!r}, highest={self.highest!r}) must be "
                "positive, finite and in this order; try 1e-9 and 10."
            )
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 1:
            raise ValueError(
                f"UpdateHistogram(bins={self.bins!r}) must be a positive integer; try 30."
            )

    @property
    def edges(self) -> Float[np.ndarray, " edge"]:
        """The edges of the bins, one more than there are."""
        return np.geomspace(self.lowest, self.highest, self.bins + 1)

    def __call__(self, step: Step) -> UpdateDistribution:
        """Returns the distribution of this step's updates."""
        updates = [jnp.ravel(u) for u in jax.tree.leaves(step.updates)]
        params = [jnp.ravel(p) for p in jax.tree.leaves(step.params)]
        sizes = [jnp.abs(u) for u in updates]
        return UpdateDistribution(
            counts=self._count(sizes),
            largest=jnp.stack([jnp.max(size) for size in sizes]),
            update_norm=jnp.stack([jnp.linalg.norm(u) for u in updates]),
            param_norm=jnp.stack([jnp.linalg.norm(p) for p in params]),
        )

    def _count(self, tensors: list[Float[Array, "_coordinate"]]) -> Int[Array, "tensor bin"]:
        # Of logarithmic bins the number is a logarithm, no search. What falls on an edge may be
        # counted on either side of it, by rounding. All tensors are counted in one go.
        sizes = jnp.concatenate(tensors)
        scale = self.bins / math.log(self.highest / self.lowest)
        place = jnp.floor(jnp.log(sizes / self.lowest) * scale) + 1
        # Not `clip`, which keeps what is no number.
        place = jnp.where(place <= self.bins, jnp.maximum(place, 0), self.bins + 1)
        width = self.bins + 2
        row = np.repeat(np.arange(len(tensors), dtype=np.int32), [len(t) for t in tensors])
        places = place.astype(jnp.int32) + jnp.asarray(row * width, jnp.int32)
        counts = jnp.zeros(len(tensors) * width, jnp.int32).at[places].add(1)
        return counts.reshape(len(tensors), width)


def tensor_names(params: Params) -> tuple[str, ...]:
    """Returns the path of each tensor, in the order in which records have them."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(jax.tree_util.keystr(path) or "params" for path, _ in leaves)
