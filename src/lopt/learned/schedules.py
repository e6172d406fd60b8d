"""Schedules: hyperparameters that change from step to step, and whose constants are theta.

A vector over time (Maclaurin et al. 2015, arXiv:1502.03492), or inverse-time decay (Wu et al. 2018,
arXiv:1803.02021), polynomial, cosine and exponential ones as in Optax. Values of the hyperparameter
are learned in its own form, powers, factors and time constants by their logarithm.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt.core.checks import check_integer
from lopt.core.types import NumSteps, Scalar, Theta
from lopt.learned.forms import (
    Form,
    check_fixed_value,
    check_number,
    check_value,
    from_theta,
    shown,
    to_theta,
)


class Time(eqx.Module):
    """Where a run is.

    Attributes:
        step: the number of steps taken.
        num_steps: that of the whole run; None if it is not known.
    """

    step: Int[Array, ""]
    num_steps: Int[Array, ""] | None = None

    @classmethod
    def of(cls, step: int | Int[Array, ""], num_steps: NumSteps = None) -> "Time":
        """Returns the time with both numbers as arrays."""
        length = None if num_steps is None else jnp.asarray(num_steps, jnp.int32)
        return cls(jnp.asarray(step, jnp.int32), length)

    def next(self) -> "Time":
        """Returns the time one step later."""
        return Time(self.step + 1, self.num_steps)


class AbstractSchedule(eqx.Module):
    """What a hyperparameter does over time; an argument of `lopt.learnable`."""

    @abc.abstractmethod
    def check(self, where: str, form: Form) -> None:
        """Refuses a hyperparameter, named in `where`, whose form does not fit the values."""

    @abc.abstractmethod
    def init(self, form: Form) -> Theta:
        """Returns what is learned of it, for a hyperparameter of this form."""

    @abc.abstractmethod
    def at(self, theta: Theta, time: Time, form: Form) -> Scalar:
        """Returns the hyperparameter's value."""

    @property
    def max_steps(self) -> int | None:
        """For how many steps there are values; None if there is no end."""
        return None

    @property
    def needs_num_steps(self) -> bool:
        """Whether it is as long as the run."""
        return False


class PerStep(AbstractSchedule):
    """One value per step, each of them learned. Theta is the vector of them.

    Attributes:
        values: one that all steps start from, or all of them.
        length: the number of steps; of a longer run, the last value would be held, and
            `lopt.InnerTraining` refuses it.

    Example:
        >>> import optax, lopt
        >>> lopt.learnable(optax.sgd, learning_rate=PerStep(0.1, length=100)).max_steps
        100
    """

    values: float | tuple[float, ...] = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def __init__(self, values: Any, length: int | None = None) -> None:
        """Takes `length` from the values if there are several.

        Raises:
            TypeError: if a value is not one real number.
            ValueError: if the length is missing, not positive, or not that of the values.
        """
        several = isinstance(values, Sequence) and not isinstance(values, str)
        many = several or (isinstance(values, Array | np.ndarray) and values.ndim > 0)
        each = list(values) if many else [values]
        for index, value in enumerate(each):
            place = f"value {index} of PerStep" if many else "PerStep(values)"
            check_number(f"{place}, {shown(value)},", value)
        numbers = tuple(float(value) for value in each)
        self.values = numbers if many else numbers[0]
        found: Any = len(numbers) if many and length is None else length
        plain = isinstance(found, int) and not isinstance(found, bool)
        if not plain or found < 1 or (many and found != len(numbers)):
            expected = len(numbers) if many and numbers else 100
            raise ValueError(
                f"PerStep(length={length!r}) must be a positive integer, and the number of values "
                f"if there are several; try {expected}."
            )
        self.length = found

    def check(self, where: str, form: Form) -> None:
        """Refuses values out of the form's range."""
        if not isinstance(self.values, tuple):
            return check_value(f"{where}, PerStep(values={self.values!r})", self.values, form)
        for index, value in enumerate(self.values):
            check_value(f"{where}, value {index} of PerStep, {value!r}", value, form)

    def init(self, form: Form) -> Theta:
        """Returns the vector of values in their form."""
        return jnp.broadcast_to(to_theta(self.values, form), (self.length,))

    def at(self, theta: Theta, time: Time, form: Form) -> Scalar:
        """Returns the value of this step."""
        return from_theta(theta[jnp.minimum(time.step, self.length - 1)], form)

    @property
    def max_steps(self) -> int | None:
        """The number of values."""
        return self.length


class AbstractParametric(AbstractSchedule):
    """A formula with some constants; which of them are learned is said by `learn`.

    Theta is `{constant: scalar}`, each in its form.
    """

    @property
    @abc.abstractmethod
    def learn(self) -> tuple[str, ...]:
        """Which constants are learned; a field of each schedule."""

    @abc.abstractmethod
    def constants(self) -> dict[str, tuple[float, Form | None]]:
        """Returns value and form of each constant; None is the form of the hyperparameter."""

    @abc.abstractmethod
    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        """Returns the value after `step` steps of a run of `num_steps`, None if not known."""

    def check(self, where: str, form: Form) -> None:
        """Refuses constants out of range, and names of constants that there are not."""
        known, name = self.constants(), type(self).__name__
        for constant in self.learn:
            if constant not in known:
                raise ValueError(
                    f"{name}(learn={self.learn}) has no {constant!r}; there are {', '.join(known)}."
                )
        for constant, (value, own) in known.items():
            label = f"{where}, {name}({constant}={value!r})"
            check_number(label, value)
            # What is not learned, such as a final rate of zero, needs no number that stands for it;
            # but time is divided by the one of these, and the logarithm taken of the other.
            if constant in self.learn or constant in ("time_constant", "factor"):
                check_value(label, value, own or form)
            else:
                check_fixed_value(label, value, own or form)

    def init(self, form: Form) -> Theta:
        """Returns the learned constants."""
        known = self.constants()
        return {name: to_theta(known[name][0], known[name][1] or form) for name in self.learn}

    def at(self, theta: Theta, time: Time, form: Form) -> Scalar:
        """Returns the formula's value, in the precision of theta."""
        leaves = jax.tree.leaves(theta)
        dtype = leaves[0].dtype if leaves else jnp.result_type(float)
        constants = {
            name: from_theta(theta[name], own or form) if name in self.learn else value
            for name, (value, own) in self.constants().items()
        }
        step, num_steps = jax.tree.map(lambda n: n.astype(dtype), (time.step, time.num_steps))
        return jnp.asarray(self.formula(constants, step, num_steps), dtype)


class InverseTime(AbstractParametric):
    """initial / (1 + t / time_constant)^power.

    Attributes:
        initial: the value before the first step.
        power: of the decay; log.
        time_constant: in steps; log.
        learn: which of the three are learned.

    Reference: Wu et al. 2018, arXiv:1803.02021.
    """

    initial: float = eqx.field(static=True)
    power: float = eqx.field(static=True, default=1.0)
    time_constant: float = eqx.field(static=True, default=5000.0)
    learn: tuple[str, ...] = eqx.field(static=True, default=("initial", "power"))

    def constants(self) -> dict[str, tuple[float, Form | None]]:
        """Returns value and form of each."""
        return {
            "initial": (self.initial, None),
            "power": (self.power, "log"),
            "time_constant": (self.time_constant, "log"),
        }

    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        """Returns the decayed value."""
        logarithm = jnp.log1p(step / constants["time_constant"])
        return constants["initial"] * jnp.exp(-constants["power"] * logarithm)


class Exponential(AbstractParametric):
    """initial * factor^(t / steps), as `optax.exponential_decay`.

    Attributes:
        initial: the value before the first step.
        factor: by which it changes in `steps` steps; log.
        steps: the unit of time.
        learn: "initial", "factor", or both.
    """

    initial: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)
    steps: int = eqx.field(static=True, default=1)
    learn: tuple[str, ...] = eqx.field(static=True, default=("initial", "factor"))

    def __check_init__(self) -> None:
        check_integer("Exponential", "steps", self.steps, hint=100)

    def constants(self) -> dict[str, tuple[float, Form | None]]:
        """Returns value and form of each."""
        return {"initial": (self.initial, None), "factor": (self.factor, "log")}

    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        """Returns the decayed value."""
        logarithm = jnp.log(jnp.asarray(constants["factor"], step.dtype))
        return constants["initial"] * jnp.exp(logarithm * step / self.steps)


class Polynomial(AbstractParametric):
    """final + (initial - final) (1 - t / steps)^power up to `steps`, then final.

    As `optax.polynomial_schedule`.

    Attributes:
        initial: the value before the first step.
        steps: after how many of them the final value is reached; None for those of the run.
        final: that value; may be zero as long as it is not learned.
        power: of the decay, 1 for a straight line; log.
        learn: which of "initial", "final" and "power" are learned.
    """

    initial: float = eqx.field(static=True)
    steps: int | None = eqx.field(static=True, default=None)
    final: float = eqx.field(static=True, default=0.0)
    power: float = eqx.field(static=True, default=1.0)
    learn: tuple[str, ...] = eqx.field(static=True, default=("initial", "power"))

    def __check_init__(self) -> None:
        if self.steps is not None:
            check_integer("Polynomial", "steps", self.steps, hint=100)

    @property
    def needs_num_steps(self) -> bool:
        """Whether it is as long as the run."""
        return self.steps is None

    def constants(self) -> dict[str, tuple[float, Form | None]]:
        """Returns value and form of each."""
        return _transition(self.initial, self.final, self.power)

    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        """Returns the value on the way."""
        return _between(constants, 1 - jnp.minimum(step / (self.steps or num_steps), 1))


class Cosine(AbstractParametric):
    """final + (initial - final) ((1 + cos(pi t / steps)) / 2)^power up to `steps`, then final.

    As `optax.cosine_decay_schedule` with alpha = final / initial (Loshchilov & Hutter 2017,
    arXiv:1608.03983).

    Attributes:
        initial: the value before the first step.
        steps: after how many of them the final value is reached; None for those of the run.
        final: that value; may be zero as long as it is not learned.
        power: 1 for a plain cosine; log.
        learn: which of "initial", "final" and "power" are learned.
    """

    initial: float = eqx.field(static=True)
    steps: int | None = eqx.field(static=True, default=None)
    final: float = eqx.field(static=True, default=0.0)
    power: float = eqx.field(static=True, default=1.0)
    learn: tuple[str, ...] = eqx.field(static=True, default=("initial",))

    def __check_init__(self) -> None:
        if self.steps is not None:
            check_integer("Cosine", "steps", self.steps, hint=100)

    @property
    def needs_num_steps(self) -> bool:
        """Whether it is as long as the run."""
        return self.steps is None

    def constants(self) -> dict[str, tuple[float, Form | None]]:
        """Returns value and form of each."""
        return _transition(self.initial, self.final, self.power)

    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        """Returns the value on the way."""
        angle = jnp.minimum(step / (self.steps or num_steps), 1) * math.pi
        return _between(constants, (1 + jnp.cos(angle)) / 2)


def _transition(initial: float, final: float, power: float) -> dict[str, tuple[float, Form | None]]:
    return {"initial": (initial, None), "final": (final, None), "power": (power, "log")}


def _between(constants: dict[str, Any], share: Float[Array, ""]) -> Scalar:
    """Returns final + (initial - final) share^power, whose derivatives are zero at share = 0."""
    positive = jnp.where(share > 0, share, jnp.ones_like(share))
    weight = jnp.where(share > 0, jnp.exp(constants["power"] * jnp.log(positive)), 0)
    return constants["final"] + (constants["initial"] - constants["final"]) * weight
