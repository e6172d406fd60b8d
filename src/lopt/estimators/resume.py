"""Episodes that go on from where an earlier one was in trouble, past the horizon.

The resume buffer of ELO (2026, arXiv:2607.06772), with all that an estimator remembers.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.checks import check_length
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, State, Theta
from lopt.estimators.truncation import CLOCK, Clock, check_fraction, nodes, where, windows_of


class ResumeState(eqx.Module):
    """The state of the estimator, the one that is stored, and the loss of the window before.

    The clock of what is stored has run past the end of its episode as long as nothing is.
    """

    now: State
    stored: State
    loss: Float[Array, ""]


class Resume(AbstractGradientEstimator):
    """An estimator whose next episode is, by chance, not a new one but one that was stored.

    Stored is the state before a window whose loss rose above that of the window before, or the one
    at the end of an episode, whichever was later. It is resumed for as long as a new episode would
    last, with all that the estimator remembers: without the sum of its perturbations `PES` would
    not see how theta led to it. An optimizer that has to be told the length of its runs goes on to
    the end that it was told, once from each state that was stored, and ends are not stored.

    `PES` stays unbiased for each window of the episodes that are chosen, but for the choice, whose
    dependence on theta it does not see. Of the perturbations the choice depends only on what is
    even in them, the mean loss of antithetic pairs: its bias vanishes as sigma^2.

    Attributes:
        one: an estimator with windows: `PES`, `NRES`, `TruncatedES` or `TruncatedBackprop`.
        probability: with which an episode is resumed, if one is stored; in [0, 1).
    """

    one: AbstractGradientEstimator
    probability: float = eqx.field(static=True, default=0.8)

    def __check_init__(self) -> None:
        check_fraction("Resume", "probability", self.probability, 0.8)
        name, fields = type(self.one).__name__, vars(self.one)
        if "truncation" not in fields:
            raise ValueError(f"Resume(one={name}) has no windows; try lopt.PES(inner, truncation).")
        learned = fields["inner"].learned
        if not learned.needs_num_steps:
            check_length("Resume, whose episodes grow,", None, learned.max_steps, "one without it")

    @override
    def prepare(self, params: Theta, key: Key) -> ResumeState:
        now = self.one.prepare(params, key)
        nothing = eqx.tree_at(lambda state: state.clock.age, now, now.clock.length + 1)
        return ResumeState(now, nothing, jnp.full((), jnp.inf, jnp.float32))

    @override
    def estimate(self, params: Theta, state: ResumeState, key: Key) -> tuple[Estimate, ResumeState]:
        now, stored = state.now, state.stored
        # The estimator itself sees the key as it is: it begins the same episodes as without this.
        chance = jax.random.uniform(jax.random.fold_in(key, CLOCK - 2), dtype=jnp.float32)
        there = stored.clock.age <= stored.clock.length
        resumed = now.clock.over & there & (chance < self.probability)
        ends = nodes(self.one, InnerTraining)[0].learned.needs_num_steps
        longer = stored.clock.age + windows_of(self.one).restart_if_over(now.clock, key).length
        length = stored.clock.length if ends else longer
        clock = Clock(stored.clock.age, length, now.clock.outer_step)
        before = where(resumed, _continued(stored, clock), now)
        estimate, after = self.one.estimate(params, before, key)

        loss = estimate.loss.astype(jnp.float32)
        last = jnp.where(before.clock.over | resumed, jnp.inf, state.loss)
        kept = where(after.clock.age == after.clock.length, after, stored)
        if ends:
            past = jnp.where(resumed, stored.clock.length + 1, stored.clock.age)
            kept = eqx.tree_at(lambda state: state.clock.age, stored, past)
        kept = where(jnp.isfinite(loss) & (loss > last), before, kept)
        return estimate, ResumeState(after, kept, loss)


def _continued(state: State, clock: Clock) -> State:
    """Returns a state with this clock, and with episodes as long as it says."""

    def parts(state: State) -> list[Any]:
        return [state.clock, *(episode.num_steps for episode in nodes(state, Episode))]

    return eqx.tree_at(parts, state, [clock] + [clock.length] * len(parts(state)[1:]))
