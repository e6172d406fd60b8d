"""Learned implicit regularisation, where it shows best: f(x, y) = (x - y)^2 / 2.

Every point of the diagonal is a minimum, and gradients are (g, -g). A coordinatewise rule that is
odd in gradients and ignores params moves x and y by opposite amounts: x + y stays as it is, and the
run ends at the nearest minimum. A drift along the valley is a dependence on params, such as a
learned weight decay, or a bias.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lopt.analysis.dynamics.alignment import OddnessRecord, with_mirror
from lopt.analysis.dynamics.checks import check_optimizer
from lopt.core.checks import check_integer, check_positive
from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Scalar, Split
from lopt.core.unroll import Step, start, unroll


class Valley(AbstractTask):
    """The loss (x - y)^2 / 2, least along the whole diagonal.

    Attributes:
        reach: initial params are uniform between -reach and reach.
    """

    reach: float = eqx.field(static=True, default=2.0)

    def __check_init__(self) -> None:
        check_positive("Valley", "reach", self.reach, 2.0)

    def init(self, key: Key) -> Float[Array, "2"]:
        """Returns uniform params between -reach and reach."""
        return self.reach * jax.random.uniform(key, (2,), minval=-1.0)

    def batch(self, key: Key, split: Split = "train") -> Batch:
        """Returns the empty batch: nothing is random."""
        return ()

    def loss(self, params: Float[Array, "2"], batch: Batch) -> Scalar:
        """Returns (x - y)^2 / 2."""
        return (params[0] - params[1]) ** 2 / 2


class Portrait(eqx.Module):
    """What an optimizer does in the valley, from each of several starts.

    Attributes:
        paths: params over time, the start first.
        losses: before each step.
        oddness: |u(g) + u(-g)| / |u(g)| of each step, both at the same params. Zero for rules that
            are odd in gradients and ignore params; no number where nothing moves.
        reflection: |U(-start) + U(start)| / |U(start)| of the updates of whole runs: zero for rules
            that are odd in gradients and params together, weight decay among them. No number, nor
            `swap`, for starts where nothing moves, as on the diagonal.
        swap: |U(y, x) - swapped U(x, y)| / |U(x, y)|: zero for rules that do not know which
            coordinate they work on.
    """

    paths: Float[Array, "*start time 2"]
    losses: Float[Array, "*start step"]
    oddness: Float[Array, "*start step"]
    reflection: Float[Array, "*start"]
    swap: Float[Array, "*start"]

    @property
    def sums(self) -> Float[Array, "*start time"]:
        """The place along the valley, x + y."""
        return self.paths[..., 0] + self.paths[..., 1]

    @property
    def displacement(self) -> Float[Array, "*start"]:
        """How far x + y has moved at the end."""
        return self.sums[..., -1] - self.sums[..., 0]

    @property
    def drift(self) -> Float[Array, "*start"]:
        """1 - |x + y| at the end / |x + y| at the start: 1 for runs that end in the origin.

        No number, or infinite, for starts with x + y = 0, which are there already.
        """
        return 1 - jnp.abs(self.sums[..., -1]) / jnp.abs(self.sums[..., 0])

    @property
    def field(self) -> Float[Array, "*start 2"]:
        """The first update from each start: the arrows of a phase portrait."""
        return self.paths[..., 1, :] - self.paths[..., 0, :]


def valley_starts(reach: float = 2.0, count: int = 9) -> Float[Array, "start 2"]:
    """Returns a square grid of starts from -reach to reach.

    Args:
        reach: how far out.
        count: along each side, at least 2. Even numbers keep clear of the origin.
    """
    check_positive("valley_starts", "reach", reach, 2.0)
    check_integer("valley_starts", "count", count, 2, hint=9)
    line = np.linspace(-reach, reach, count)
    return jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))


@eqx.filter_jit
def valley_portrait(
    optimizer: optax.GradientTransformation, starts: Float[Array, "start 2"], num_steps: int
) -> Portrait:
    """Runs an optimizer from each start, from its reflection and with coordinates swapped.

    Args:
        optimizer: any Optax optimizer; `learned.optimizer(theta)` for a learned one.
        starts: such as `valley_starts()`.
        num_steps: of each run.

    Raises:
        TypeError: if `optimizer` is none.
        ValueError: if `num_steps` is not a positive integer, or `starts` are not rows of x and y.

    Example:
        >>> import jax, optax
        >>> from lopt.analysis.dynamics import valley_portrait, valley_starts
        >>> found = valley_portrait(optax.sgd(0.1), valley_starts(count=4), 100)
        >>> bool(abs(found.displacement).max() < 1e-5), bool(found.losses[:, -1].max() < 1e-5)
        (True, True)
    """
    check_optimizer("valley_portrait", "optimizer", optimizer)
    check_integer("valley_portrait", "num_steps", num_steps, hint=200)
    starts = jnp.asarray(starts)
    if starts.ndim != 2 or starts.shape[1] != 2 or not len(starts):
        raise ValueError(
            f"valley_portrait(starts) must be rows of x and y; it has shape {starts.shape}. Try "
            "valley_starts()."
        )
    if not jnp.issubdtype(starts.dtype, jnp.floating):
        starts = starts.astype(float)
    task, companions = Valley(), with_mirror(optimizer)
    oddness = OddnessRecord(companions)
    # The valley is the same for every key: nothing in it is random.
    key = jax.random.key(0)

    def watch(step: Step) -> tuple[Array, Array, Array, Array]:
        return step.params, step.loss, step.updates, oddness(step)

    def updates_from(first: Float[Array, "2"]) -> Float[Array, "step 2"]:
        state = start(task, optimizer, first, key)
        return unroll(task, optimizer, state, num_steps, record=lambda step: step.updates)[1]

    def run(first: Float[Array, "2"]) -> Portrait:
        state = start(task, companions.optimizer, first, key)
        end, found = unroll(task, companions.optimizer, state, num_steps, record=watch)
        places, losses, updates, odd = found
        size = jnp.linalg.norm(updates.ravel())
        turned, swapped = updates_from(-first), updates_from(first[::-1])[:, ::-1]
        return Portrait(
            paths=jnp.concatenate([places, end.params[None]]),
            losses=losses,
            oddness=odd,
            reflection=jnp.linalg.norm((turned + updates).ravel()) / size,
            swap=jnp.linalg.norm((swapped - updates).ravel()) / size,
        )

    return jax.vmap(run)(starts)
