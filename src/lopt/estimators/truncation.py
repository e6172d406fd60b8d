"""Truncations: the windows in which estimators with a memory walk through an episode.

An episode is as long as the horizon, or as a schedule says, rounded to whole windows. It begins
with the key of its first estimate (or the half that is left when noise has been drawn), so that two
estimators with one key and one truncation walk through the same episodes.
"""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from typing_extensions import override

from lopt.core.checks import LONGEST, check_integer, check_length, is_real
from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, State, Theta

# To fold 0, 1 or 2 into a key is to split it, as an episode does; this is none of them.
CLOCK = 2**32 - 1


class AbstractHorizonSchedule(eqx.Module):
    """How long the next episode is, in inner steps, when it begins at some outer step."""

    @abc.abstractmethod
    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns a length of at least one."""

    @abc.abstractmethod
    def bound(self) -> int:
        """Returns the longest length that is drawn, at any outer step."""


class ConstantHorizon(AbstractHorizonSchedule):
    """Episodes of `length` inner steps."""

    length: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer("ConstantHorizon", "length", self.length, most=LONGEST, hint=100)

    @override
    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.asarray(self.length, jnp.float32)

    @override
    def bound(self) -> int:
        return self.length


class RampedHorizon(AbstractHorizonSchedule):
    """Lengths that grow linearly from `first` to `last` over `outer_steps`, with jitter.

    Each is multiplied by a factor drawn uniformly from 1 - jitter to 1 + jitter, and cut at the
    longer of `first` and `last`, so that the longest episode is known beforehand.

    Reference: Metz et al. 2019, arXiv:1810.10180, whose values are the defaults.
    """

    first: int = eqx.field(static=True, default=10)
    last: int = eqx.field(static=True, default=10_000)
    outer_steps: int = eqx.field(static=True, default=20_000)
    jitter: float = eqx.field(static=True, default=0.2)

    def __check_init__(self) -> None:
        check_integer("RampedHorizon", "first", self.first, most=LONGEST, hint=10)
        check_integer("RampedHorizon", "last", self.last, most=LONGEST, hint=10_000)
        check_integer("RampedHorizon", "outer_steps", self.outer_steps, hint=20_000)
        check_fraction("RampedHorizon", "jitter", self.jitter, 0.2)

    @override
    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        done = jnp.clip(outer_step.astype(jnp.float32) / self.outer_steps, 0, 1)
        factor = jax.random.uniform(
            key, dtype=jnp.float32, minval=1 - self.jitter, maxval=1 + self.jitter
        )
        length = (self.first + (self.last - self.first) * done) * factor
        return jnp.minimum(length, self.bound())

    @override
    def bound(self) -> int:
        return max(self.first, self.last)


class LogUniformHorizon(AbstractHorizonSchedule):
    """Lengths whose logarithm is uniform between those of `shortest` and `longest`."""

    shortest: int = eqx.field(static=True)
    longest: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        name, shortest = "LogUniformHorizon", self.shortest
        check_integer(name, "shortest", shortest, most=LONGEST, hint=10)
        check_integer(name, "longest", self.longest, most=LONGEST, hint=max(shortest, 10_000))
        if self.longest < shortest:
            raise ValueError(
                f"{name}(longest={self.longest}) must be at least shortest={shortest}; "
                f"try {min(10 * shortest, LONGEST)}."
            )

    @override
    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        ends = jnp.log(jnp.asarray([self.shortest, self.longest], jnp.float32))
        return jnp.exp(jax.random.uniform(key, dtype=jnp.float32, minval=ends[0], maxval=ends[1]))

    @override
    def bound(self) -> int:
        return self.longest


class Clock(eqx.Module):
    """Where an episode is.

    Attributes:
        age: inner steps since it began; one more than `length` if something was not finite.
        length: inner steps after which it is over, a multiple of the truncation.
        outer_step: estimates made so far, of this episode and of those before it.
    """

    age: Int[Array, ""]
    length: Int[Array, ""]
    outer_step: Int[Array, ""]

    @property
    def over(self) -> Bool[Array, ""]:
        """Whether the next window begins an episode: the first of all does, too."""
        return (self.outer_step == 0) | (self.age >= self.length)


class Windows(eqx.Module):
    """The rules of the clock of one estimator.

    Attributes:
        truncation: inner steps per window.
        schedule: of the length of episodes.
        stagger: whether the clock of the first episode starts at a random window, so that particles
            do not all restart at once; only these first episodes are cut short by it.
    """

    truncation: int = eqx.field(static=True)
    schedule: AbstractHorizonSchedule
    stagger: bool = eqx.field(static=True)

    def begin(self, key: Key) -> Clock:
        """Returns the clock of a particle's first episode."""
        length_key, age_key = jax.random.split(jax.random.fold_in(key, CLOCK))
        zero = jnp.zeros((), jnp.int32)
        length = self._length(length_key, zero)
        if not self.stagger:
            return Clock(zero, length, zero)
        window = jax.random.randint(age_key, (), 0, length // self.truncation, jnp.int32)
        return Clock(self.truncation * window, length, zero)

    def restart_if_over(self, clock: Clock, key: Key) -> Clock:
        """Returns the clock, that of an episode begun with `key` if the last one has ended."""
        length = self._length(jax.random.fold_in(key, CLOCK), clock.outer_step)
        ended = clock.age >= clock.length
        return Clock(
            jnp.where(ended, 0, clock.age), jnp.where(ended, length, clock.length), clock.outer_step
        )

    def advance(self, clock: Clock, carried: Any) -> Clock:
        """Returns the clock after a window; if any array `carried` is not finite it is broken."""
        healthy = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carried)]).all()
        age = jnp.where(healthy, clock.age + self.truncation, clock.length + 1)
        return Clock(age, clock.length, clock.outer_step + 1)

    def _length(self, key: Key, outer_step: Int[Array, ""]) -> Int[Array, ""]:
        windows = jnp.round(self.schedule.draw(key, outer_step) / self.truncation)
        return self.truncation * jnp.maximum(windows, 1).astype(jnp.int32)


def where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns one of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


class TruncatedState(eqx.Module):
    """An episode in progress, and where it is."""

    episode: Episode
    clock: Clock

    def episode_to_run(
        self, inner: InnerTraining, theta: Theta, key: Key, length: Int[Array, ""]
    ) -> Episode:
        """Returns the episode that the next window is of: one begun with `key` if it is over."""
        return where(self.clock.over, inner.begin(theta, key, length), self.episode)


def windows_of(estimator: Any) -> Windows:
    """Returns the windows of an estimator with `inner`, `truncation`, `schedule` and `stagger`."""
    schedule = estimator.schedule or ConstantHorizon(estimator.inner.horizon)
    return Windows(estimator.truncation, schedule, estimator.stagger)


def nodes(tree: Any, kind: type) -> list[Any]:
    """Returns the modules of a kind in a tree."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def restart_together(states: State) -> State:
    """Returns states of which all episodes are over if one is broken: compared runs keep step."""
    clocks = nodes(states, Clock)
    if not clocks:
        return states
    # Of arms or particles that are stacked, all at once.
    broken = jnp.stack([jnp.any(clock.age > clock.length) for clock in clocks]).any()
    ages = [jnp.where(broken, clock.length + 1, clock.age) for clock in clocks]
    return eqx.tree_at(lambda tree: [clock.age for clock in nodes(tree, Clock)], states, ages)


def check_fraction(owner: str, field: str, value: float, hint: float) -> None:
    """Refuses what is not in [0, 1)."""
    if not is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{owner}({field}={value!r}) must be in [0, 1); try {hint}.")


def check_windows(
    owner: str, inner: InnerTraining, truncation: int, schedule: AbstractHorizonSchedule | None
) -> None:
    """Refuses windows that are not positive, or of which no episode is a whole number."""
    check_integer(owner, "truncation", truncation, hint=min(10, inner.horizon))
    what, length = f"InnerTraining(horizon={inner.horizon})", inner.horizon
    if schedule is not None:
        length = schedule.bound()
        what = f"the longest length of {type(schedule).__name__}, {length}"
    if schedule is None or isinstance(schedule, ConstantHorizon):
        if length % truncation:
            near = " or ".join(map(str, _divisors_near(length, truncation)))
            raise ValueError(f"{owner}(truncation={truncation}) must divide {what}; try {near}.")
    elif truncation > length:
        raise ValueError(f"{owner}(truncation={truncation}) must be at most {what}; try {length}.")
    # As episodes are: of whole windows, to which lengths are rounded.
    rounded = truncation * max(1, round(length / truncation))
    run = f"{owner}(schedule={schedule}), up to {rounded} steps with windows of {truncation},"
    check_length(run, rounded, inner.learned.max_steps)


def _divisors_near(number: int, value: int) -> list[int]:
    """Returns the largest divisor below `value` and the smallest above, where there are any."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = [*small, *(number // d for d in small)]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    return [max(below), *([min(above)] if above else [])]
