"""Truncations: the windows in which estimators with a memory walk through an episode.

Also how long episodes are: always the horizon, or as a schedule says. A schedule's lengths are
rounded to whole windows, so that none is cut short.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lopt.core.inner import Episode, InnerTraining
from lopt.core.types import Key, Theta


class AbstractHorizonSchedule(eqx.Module):
    """How long the next episode is, in inner steps, when it begins at some outer step."""

    @abc.abstractmethod
    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns a length of at least one."""


class ConstantHorizon(AbstractHorizonSchedule):
    """Episodes of `length` inner steps."""

    length: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        _check_length("ConstantHorizon(length", self.length)

    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the length."""
        return jnp.asarray(self.length, jnp.float32)


class RampedHorizon(AbstractHorizonSchedule):
    """Lengths that grow linearly from `first` to `last` over `outer_steps`, with jitter.

    Each is multiplied by a factor drawn uniformly between 1 - jitter and 1 + jitter, and is never
    longer than `last`.

    Reference: Metz et al. 2019, arXiv:1810.10180, whose values are the defaults.
    """

    first: int = eqx.field(static=True, default=10)
    last: int = eqx.field(static=True, default=10_000)
    outer_steps: int = eqx.field(static=True, default=20_000)
    jitter: float = eqx.field(static=True, default=0.2)

    def __check_init__(self) -> None:
        _check_length("RampedHorizon(first", self.first)
        _check_length("RampedHorizon(last", self.last)
        _check_length("RampedHorizon(outer_steps", self.outer_steps)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"RampedHorizon(jitter={self.jitter}) must be in [0, 1); try 0.2.")

    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the jittered length at an outer step."""
        done = jnp.clip(outer_step.astype(jnp.float32) / self.outer_steps, 0, 1)
        factor = jax.random.uniform(
            key, dtype=jnp.float32, minval=1 - self.jitter, maxval=1 + self.jitter
        )
        length = (self.first + (self.last - self.first) * done) * factor
        return jnp.minimum(length, max(self.first, self.last))


class LogUniformHorizon(AbstractHorizonSchedule):
    """Lengths whose logarithm is uniform between those of `shortest` and `longest`."""

    shortest: int = eqx.field(static=True)
    longest: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        _check_length("LogUniformHorizon(shortest", self.shortest)
        if not isinstance(self.longest, int) or self.longest < self.shortest:
            raise ValueError(
                f"LogUniformHorizon(longest={self.longest!r}) must be an integer of at least "
                f"shortest={self.shortest}; try {10 * self.shortest}."
            )

    def draw(self, key: Key, outer_step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns a length, independent of the outer step."""
        ends = jnp.log(jnp.asarray([self.shortest, self.longest], jnp.float32))
        return jnp.exp(jax.random.uniform(key, dtype=jnp.float32, minval=ends[0], maxval=ends[1]))


class Clock(eqx.Module):
    """Where an episode is.

    Attributes:
        age: inner steps since it began.
        length: inner steps after which it is over, a multiple of the truncation.
        outer_step: estimates made so far, of this episode and of those before it.
    """

    age: Int[Array, ""]
    length: Int[Array, ""]
    outer_step: Int[Array, ""]

    @property
    def over(self) -> Bool[Array, ""]:
        """Whether the episode is to be replaced by a fresh one."""
        return self.age >= self.length


class Windows(eqx.Module):
    """The rules of the clock of one estimator.

    Attributes:
        truncation: inner steps per window.
        schedule: of the length of episodes.
        stagger: whether the first episode starts at a random window of its length, so that
            particles do not all restart at once; only these first episodes are cut short by it.
    """

    truncation: int = eqx.field(static=True)
    schedule: AbstractHorizonSchedule
    stagger: bool = eqx.field(static=True)

    def begin(self, key: Key) -> Clock:
        """Returns the clock of a particle's first episode."""
        length_key, age_key = jax.random.split(key)
        zero = jnp.zeros((), jnp.int32)
        length = self._length(length_key, zero)
        if not self.stagger:
            return Clock(zero, length, zero)
        window = jax.random.randint(age_key, (), 0, length // self.truncation, jnp.int32)
        return Clock(self.truncation * window, length, zero)

    def restart_if_over(self, clock: Clock, key: Key) -> Clock:
        """Returns the clock, that of a fresh episode if the last one is over."""
        length = self._length(key, clock.outer_step)
        return Clock(
            jnp.where(clock.over, 0, clock.age),
            jnp.where(clock.over, length, clock.length),
            clock.outer_step,
        )

    def advance(self, clock: Clock, losses: Float[Array, "..."]) -> Clock:
        """Returns the clock after a window; an episode whose losses are not finite is over."""
        healthy = jnp.all(jnp.isfinite(losses))
        age = jnp.where(healthy, clock.age + self.truncation, clock.length)
        return Clock(age, clock.length, clock.outer_step + 1)

    def _length(self, key: Key, outer_step: Int[Array, ""]) -> Int[Array, ""]:
        windows = jnp.round(self.schedule.draw(key, outer_step) / self.truncation)
        return self.truncation * jnp.maximum(windows, 1).astype(jnp.int32)


class TruncatedState(eqx.Module):
    """An episode in progress, and where it is."""

    episode: Episode
    clock: Clock

    @classmethod
    def begin(
        cls, inner: InnerTraining, windows: Windows, theta: Theta, key: Key
    ) -> "TruncatedState":
        """Returns the state of a particle before its first window."""
        clock_key, episode_key = jax.random.split(key)
        return cls(inner.begin(theta, episode_key), windows.begin(clock_key))

    def episode_to_run(self, inner: InnerTraining, theta: Theta, key: Key) -> Episode:
        """Returns the episode that the next window is of: a fresh one if the last is over."""
        fresh, over = inner.begin(theta, key), self.clock.over
        return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, self.episode)


def make_windows(
    inner: InnerTraining,
    truncation: int,
    schedule: AbstractHorizonSchedule | None = None,
    stagger: bool = True,
) -> Windows:
    """Returns the windows of episodes of `schedule`, by default of the horizon of `inner`."""
    return Windows(truncation, schedule or ConstantHorizon(inner.horizon), stagger)


def check_truncation(
    estimator: object,
    inner: InnerTraining,
    truncation: int,
    schedule: AbstractHorizonSchedule | None = None,
) -> None:
    """Refuses a window that is not positive or, without a schedule, does not divide the horizon."""
    name, horizon = type(estimator).__name__, inner.horizon
    if not isinstance(truncation, int) or truncation < 1:
        raise ValueError(f"{name}(truncation={truncation!r}) must be a positive integer.")
    if isinstance(schedule, ConstantHorizon):
        horizon = schedule.length
    elif schedule is not None:
        return
    if horizon % truncation:
        divisors = [d for d in range(1, horizon + 1) if horizon % d == 0]
        near = [
            max(d for d in divisors if d < truncation),
            *(d for d in divisors if d > truncation),
        ]
        raise ValueError(
            f"{name}(truncation={truncation}) must divide InnerTraining(horizon={horizon}); "
            f"try {' or '.join(map(str, near[:2]))}."
        )


def _check_length(what: str, length: int) -> None:
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"{what}={length!r}) must be a positive integer; try 100.")
