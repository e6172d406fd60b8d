"""Hyperparameters that change from step to step, or differ between tensors, and are theta.

A vector over time (Maclaurin et al. 2015, arXiv:1502.03492), or inverse-time decay (Wu et al. 2018,
arXiv:1803.02021), polynomial, cosine and exponential ones as in Optax. Values of the hyperparameter
are learned in its own form, powers, factors and time constants by their logarithm.
"""

import abc
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.types import NumSteps, Params, Scalar, Theta
from lopt.learned.forms import Form, check_value, from_theta, to_theta

Forms = dict[str, Form | None]


class Time(eqx.Module):
    """How many steps a run has taken, and how many it will have; None if that is not known."""

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
        """Refuses values outside of the form's range; `where` names the hyperparameter."""

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
        length: the number of steps; if there are several values, their number.
            `lopt.InnerTraining` refuses longer runs, in which the last value would be held.

    Example:
        >>> import optax, lopt
        >>> lopt.learnable(optax.sgd, learning_rate=PerStep(0.1, length=100)).max_steps
        100
    """

    values: float | tuple[float, ...] = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def __init__(self, values: Any, length: int | None = None) -> None:
        several = np.ndim(values) > 0
        self.values = tuple(float(value) for value in values) if several else float(values)
        count = len(values) if several else 0
        self.length = count if length is None else length
        check_integer("PerStep", "length", self.length, hint=count or 100)
        if several and self.length != count:
            raise ValueError(f"PerStep(length={length}) must be the number of values; try {count}.")

    @override
    def check(self, where: str, form: Form) -> None:
        values = self.values if isinstance(self.values, tuple) else (self.values,)
        for index, value in enumerate(values):
            check_value(f"{where}, value {index} of PerStep, {value}", value, form)

    @override
    def init(self, form: Form) -> Theta:
        return jnp.broadcast_to(to_theta(self.values, form), (self.length,))

    @override
    def at(self, theta: Theta, time: Time, form: Form) -> Scalar:
        return from_theta(theta[jnp.minimum(time.step, self.length - 1)], form)

    @property
    @override
    def max_steps(self) -> int | None:
        return self.length


class AbstractParametric(AbstractSchedule):
    """A formula whose constants are learned if `learn` names them.

    Theta is `{constant: scalar}`, each in its form.
    """

    # The form of each constant; None is that of the hyperparameter.
    forms: ClassVar[Forms]

    @property
    @abc.abstractmethod
    def learn(self) -> tuple[str, ...]:
        """Which constants are learned; a field of each schedule."""

    @abc.abstractmethod
    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        """Returns the value after `step` steps of a run of `num_steps`, None if not known."""

    @override
    def check(self, where: str, form: Form) -> None:
        known, name = self.forms, type(self).__name__
        if unknown := [constant for constant in self.learn if constant not in known]:
            raise ValueError(
                f"{name}(learn={self.learn}) has no {unknown[0]!r}; there are {', '.join(known)}."
            )
        for constant, own in known.items():
            value = getattr(self, constant)
            # A constant that is not learned may be zero, such as a final rate; but the formulas
            # divide by the time constant, and take the logarithm of the factor.
            inside = constant in self.learn or constant in ("time_constant", "factor")
            check_value(f"{where}, {name}({constant}={value})", value, own or form, inside)

    @override
    def init(self, form: Form) -> Theta:
        return {n: to_theta(getattr(self, n), self.forms[n] or form) for n in self.learn}

    @override
    def at(self, theta: Theta, time: Time, form: Form) -> Scalar:
        leaves = jax.tree.leaves(theta)
        dtype = leaves[0].dtype if leaves else jnp.result_type(float)
        constants = {
            name: from_theta(theta[name], own or form)
            if name in self.learn
            else getattr(self, name)
            for name, own in self.forms.items()
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

    forms: ClassVar[Forms] = {"initial": None, "power": "log", "time_constant": "log"}
    initial: float = eqx.field(static=True)
    power: float = eqx.field(static=True, default=1.0)
    time_constant: float = eqx.field(static=True, default=5000.0)
    learn: tuple[str, ...] = eqx.field(static=True, default=("initial", "power"))

    @override
    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
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

    forms: ClassVar[Forms] = {"initial": None, "factor": "log"}
    initial: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)
    steps: int = eqx.field(static=True, default=1)
    learn: tuple[str, ...] = eqx.field(static=True, default=("initial", "factor"))

    def __check_init__(self) -> None:
        check_integer("Exponential", "steps", self.steps, hint=100)

    @override
    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        logarithm = jnp.log(jnp.asarray(constants["factor"], step.dtype))
        return constants["initial"] * jnp.exp(logarithm * step / self.steps)


class AbstractTransition(AbstractParametric):
    """final + (initial - final) share^power up to `steps`, then final.

    Attributes:
        initial: the value before the first step.
        steps: after how many of them the final value is reached; None for those of the run.
        final: that value; may be zero as long as it is not learned.
        power: of the share; log.
        learn: which of "initial", "final" and "power" are learned.
    """

    forms: ClassVar[Forms] = {"initial": None, "final": None, "power": "log"}
    initial: float = eqx.field(static=True)
    steps: int | None = eqx.field(static=True, default=None)
    final: float = eqx.field(static=True, default=0.0)
    power: float = eqx.field(static=True, default=1.0)

    @abc.abstractmethod
    def share(self, progress: Float[Array, ""]) -> Float[Array, ""]:
        """Returns what is left of the initial value; progress goes from zero to one."""

    def __check_init__(self) -> None:
        if self.steps is not None:
            check_integer(type(self).__name__, "steps", self.steps, hint=100)

    @property
    @override
    def needs_num_steps(self) -> bool:
        return self.steps is None

    @override
    def formula(self, constants: dict[str, Any], step: Scalar, num_steps: Any) -> Scalar:
        share = self.share(jnp.minimum(step / (self.steps or num_steps), 1))
        # Where the share is zero, its derivatives are zero.
        positive = jnp.where(share > 0, share, jnp.ones_like(share))
        weight = jnp.where(share > 0, jnp.exp(constants["power"] * jnp.log(positive)), 0)
        return constants["final"] + (constants["initial"] - constants["final"]) * weight


class Polynomial(AbstractTransition):
    """The transition with share 1 - t / steps, as `optax.polynomial_schedule`."""

    learn: tuple[str, ...] = eqx.field(static=True, default=("initial", "power"))

    @override
    def share(self, progress: Float[Array, ""]) -> Float[Array, ""]:
        return 1 - progress


class Cosine(AbstractTransition):
    """The transition with share (1 + cos(pi t / steps)) / 2.

    As `optax.cosine_decay_schedule` with alpha = final / initial (Loshchilov & Hutter 2017,
    arXiv:1608.03983).
    """

    learn: tuple[str, ...] = eqx.field(static=True, default=("initial",))

    @override
    def share(self, progress: Float[Array, ""]) -> Float[Array, ""]:
        return (1 + jnp.cos(progress * math.pi)) / 2


class PerTensor(eqx.Module):
    """A value or schedule for each tensor; made by `per_tensor`.

    Attributes:
        values: (name, value or schedule) of each tensor, in tree order.

    Theta is `{name of the tensor: ...}`.
    """

    values: tuple[tuple[str, float | AbstractSchedule], ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        names = [name for name, _ in self.values]
        if not names:
            raise ValueError("per_tensor(): there is no tensor; give the pytree of parameters.")
        if len(set(names)) < len(names):
            raise ValueError(
                f"per_tensor(): two tensors have one name among {', '.join(names)}; "
                "rename keys that contain dots."
            )


def per_tensor(values: Any, like: Params | None = None) -> PerTensor:
    """Gives each tensor a value of a hyperparameter of `lopt.learnable`, and so its own optimizer.

    Args:
        values: a value or schedule for each tensor, in a pytree with the structure of the
            parameters; or with `like`, one for all tensors.
        like: the parameters.

    Raises:
        ValueError: if there is no tensor, or names are not unique.

    Example:
        >>> import jax, optax, lopt
        >>> rates = per_tensor({"weight": 0.1, "bias": 0.01})
        >>> learned = lopt.learnable(optax.sgd, learning_rate=rates)
        >>> sorted(learned.init(jax.random.key(0))["learning_rate"])
        ['bias', 'weight']
    """
    tensors = named_tensors(values if like is None else like)
    given = ((name, leaf if like is None else values) for name, leaf in tensors)
    return PerTensor(
        tuple((n, v if isinstance(v, AbstractSchedule) else float(v)) for n, v in given)
    )


def named_tensors(tree: Any) -> list[tuple[str, Any]]:
    """Returns name and leaf, in tree order; a name is the path, such as `layers.0.weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, AbstractSchedule)
    )
    return [
        (jax.tree_util.keystr(path, simple=True, separator=".") or "params", leaf)
        for path, leaf in leaves
    ]
