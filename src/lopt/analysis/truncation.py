"""The meta-gradient along one knob, for many truncation lengths of one and the same run.

Short-horizon bias (Wu et al. 2018, arXiv:1803.02021) is the difference between the derivative that
a window sees, blind to how theta shaped the state it starts from, and that of the whole episode.
Derivatives carried forwards show all of them at once: a truncation forgets them when a window ends.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta


class Knob(AbstractLearnedOptimizer):
    """A learned optimizer with a single number to turn, zero where it stands.

    Attributes:
        learned: the optimizer.
        theta: its weights.
        direction: what the knob adds to theta, times its position; or None for one that multiplies
            all updates by its exponential, which is the learning rate of a rule that has none.
    """

    learned: AbstractLearnedOptimizer
    theta: Theta
    direction: Theta | None = None

    def init(self, key: Key) -> Scalar:
        """Returns zero."""
        return jnp.zeros((), jax.tree.leaves(self.theta)[0].dtype)

    @property
    def max_steps(self) -> int | None:
        """That of the optimizer."""
        return self.learned.max_steps

    def begin(self, theta: Scalar, params: Params, num_steps: NumSteps = None) -> State:
        """Returns the state of the optimizer at this position."""
        return self.learned.begin(self._at(theta), params, num_steps)

    def update(
        self,
        theta: Scalar,
        grads: Params,
        state: State,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: object,
    ) -> tuple[Params, State]:
        """Returns the updates at this position."""
        updates, state = self.learned.update(
            self._at(theta), grads, state, params, value=value, **extra
        )
        if self.direction is None:
            updates = jax.tree.map(lambda u: u * jnp.exp(theta).astype(u.dtype), updates)
        return updates, state

    def _at(self, position: Scalar) -> Theta:
        if self.direction is None:
            return self.theta
        return jax.tree.map(lambda t, d: t + position * d, self.theta, self.direction)


class SweepState(eqx.Module):
    """An episode, its derivative as each truncation sees it, and the slopes of the last window."""

    episode: Episode
    tangents: Params
    blocks: Int[Array, ""]
    slopes: Float[Array, " truncation"]


class TruncationSweep(AbstractGradientEstimator):
    """The derivative of the objective over the next block of steps, for each truncation at once.

    Theta is one number. The mean over a whole episode of `SweepState.slopes` is what truncated
    backpropagation with each truncation estimates; that of the last is the exact meta-gradient if
    it is as long as the horizon.

    Attributes:
        inner: what is measured, with a theta that is a scalar, such as a `Knob`'s.
        truncations: inner steps, increasing; all divide the horizon and are multiples of the first.
    """

    inner: InnerTraining
    truncations: tuple[int, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        found, horizon = self.truncations, self.inner.horizon
        good = found and all(n > 0 and horizon % n == 0 and n % found[0] == 0 for n in found)
        if not good or list(found) != sorted(set(found)):
            raise ValueError(
                f"TruncationSweep(truncations={found}) must increase, divide "
                f"InnerTraining(horizon={horizon}) and be multiples of the first; "
                f"try {truncations_of(horizon)}."
            )

    def prepare(self, params: Scalar, key: Key) -> SweepState:
        """Begins an episode."""
        episode = self.inner.begin(params, key)
        floats = eqx.filter(episode, eqx.is_inexact_array)
        count = len(self.truncations)
        tangents = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), floats)
        return SweepState(
            episode, tangents, jnp.zeros((), jnp.int32), jnp.zeros(count, params.dtype)
        )

    def estimate(self, params: Scalar, state: SweepState, key: Key) -> tuple[Estimate, SweepState]:
        """Runs the episode on for one block, which is as long as the shortest truncation."""
        block = self.truncations[0]
        age = state.blocks * block
        forget = age % jnp.asarray(self.truncations, age.dtype) == 0
        floats, others = eqx.partition(state.episode, eqx.is_inexact_array)

        def run(theta: Scalar, floats: Episode) -> tuple[tuple[Scalar, Episode], Episode]:
            # Begun here and not in `prepare`: a fresh optimizer state may depend on theta.
            episode = jax.lax.cond(
                state.blocks == 0,
                lambda: self.inner.begin(theta, key),
                lambda: eqx.combine(floats, others),
            )
            losses, episode = self.inner.advance(theta, episode, block)
            floats, rest = eqx.partition(episode, eqx.is_inexact_array)
            return (jnp.mean(losses), floats), rest

        def along(forget: Array, tangent: Episode) -> tuple[tuple, tuple, Episode]:
            tangent = jax.tree.map(lambda x: jnp.where(forget, 0, x), tangent)
            one = jnp.ones_like(params)
            return jax.jvp(run, (params, floats), (one, tangent), has_aux=True)

        (loss, floats), (slopes, tangents), rest = jax.vmap(along, out_axes=(None, 0, None))(
            forget, state.tangents
        )
        after = SweepState(eqx.combine(floats, rest), tangents, state.blocks + 1, slopes)
        return Estimate(loss, slopes[-1]), after


def truncations_of(horizon: int) -> tuple[int, ...]:
    """Returns divisors of a horizon, each a multiple of the one before, up to itself."""
    chain = [horizon]
    while chain[0] > 1:
        # About by a factor of three, where its divisors allow.
        divisors = [d for d in range(2, chain[0] + 1) if chain[0] % d == 0]
        chain.insert(0, chain[0] // min(divisors, key=lambda d: abs(d - 2.5)))
    return tuple(chain[-7:])
