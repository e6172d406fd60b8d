"""Hand-made optimizers with learned hyperparameters: constants, schedules, one for each tensor.

Whatever returns an Optax optimizer is bound anew at every step, with the values that theta stands
for, so that any derivative with respect to theta goes through.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta
from lopt.learned.forms import (
    FORMS,
    Form,
    check_form,
    check_number,
    check_value,
    from_theta,
    shown,
    to_theta,
)
from lopt.learned.safe_roots import with_safe_roots
from lopt.learned.schedules import AbstractSchedule, Time
from lopt.learned.tensors import PerTensor, named_tensors

Value = float | AbstractSchedule | PerTensor


class LearnableState(eqx.Module):
    """The state of an optimizer with schedules.

    Attributes:
        time: the number of steps taken, and that of the run where it is known.
        inner: Optax's state.
    """

    time: Time
    inner: State


class Learnable(AbstractLearnedOptimizer):
    """An Optax optimizer whose chosen arguments are theta; made by `learnable`.

    Attributes:
        factory: the Optax function, such as `optax.adam`.
        initial: (name, initial value, form) of each learned argument; the value may be a schedule,
            or of each tensor for itself.

    Theta is `{name: scalar}`, each in its form; of a schedule, a vector or `{constant: scalar}`; of
    an argument for each tensor, `{tensor: ...}`. Its precision is that of state and arithmetic, at
    least; updates have the dtypes of the gradients. Roots have safe derivatives, see
    `lopt.learned.safe_roots`.
    """

    factory: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    initial: tuple[tuple[str, Value, Form], ...] = eqx.field(static=True)

    def init(self, key: Key) -> Theta:
        """Returns the initial values in their forms; they do not depend on the key."""
        return {name: _init(value, form) for name, value, form in self.initial}

    def hyperparameters(
        self, theta: Theta, step: int | Int[Array, ""] = 0, num_steps: NumSteps = None
    ) -> dict[str, Any]:
        """Returns the values that theta stands for after `step` steps of a run, by name.

        Those of each tensor are a dictionary.
        """
        time = Time.of(step, num_steps)
        return {
            name: _at(value, theta[name], time, form, None) for name, value, form in self.initial
        }

    @property
    def max_steps(self) -> int | None:
        """The length of the shortest schedule that has one value per step."""
        return min(
            (s.max_steps for s in self._schedules() if s.max_steps is not None), default=None
        )

    @property
    def needs_num_steps(self) -> bool:
        """Whether a schedule is as long as the run."""
        return any(schedule.needs_num_steps for schedule in self._schedules())

    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        """Returns the state of the Optax optimizer.

        Raises:
            ValueError: if a hyperparameter is given for other tensors than those of `params`.
        """
        self._check_tensors(params)
        time = Time.of(0, num_steps)
        with jax.numpy_dtype_promotion("standard"):
            wide = _in_precision_of(theta, params)
            state: State = (
                tuple(self._bind(theta, time, n).init(leaf) for n, leaf in named_tensors(wide))
                if self._apart()
                else self._bind(theta, time, None).init(wide)
            )
        return LearnableState(time, state) if self._schedules() else state

    def update(
        self,
        theta: Theta,
        grads: Params,
        state: State,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, State]:
        """Returns what the Optax optimizer returns, in the dtypes of `grads`."""
        wide, params = (_in_precision_of(theta, tree) for tree in (grads, params))
        scheduled = isinstance(state, LearnableState)
        time = state.time if scheduled else Time.of(0)
        # Optax mixes dtypes where an argument is an array: decay ** count, for example.
        with jax.numpy_dtype_promotion("standard"):
            update = with_safe_roots(self._update)
            arguments = (theta, time, wide, state.inner if scheduled else state, params)
            updates, inner = update(*arguments, {"value": value, **extra})
        updates = jax.tree.map(lambda u, g: u.astype(g.dtype), updates, grads)
        return updates, LearnableState(time.next(), inner) if scheduled else inner

    def _update(
        self,
        theta: Theta,
        time: Time,
        grads: Params,
        state: State,
        params: Params | None,
        extra: dict[str, Any],
    ) -> tuple[Params, State]:
        if not self._apart():
            return self._bind(theta, time, None).update(grads, state, params, **extra)
        named, leaves = named_tensors(grads), jax.tree.leaves(params)
        results = [
            self._bind(theta, time, name).update(grad, one, leaf, **extra)
            for (name, grad), one, leaf in zip(
                named, state, leaves or [None] * len(named), strict=True
            )
        ]
        updates = jax.tree.unflatten(jax.tree.structure(grads), [u for u, _ in results])
        return updates, tuple(one for _, one in results)

    def _bind(
        self, theta: Theta, time: Time, tensor: str | None
    ) -> optax.GradientTransformationExtraArgs:
        values = {
            name: _at(value, theta[name], time, form, tensor) for name, value, form in self.initial
        }
        made = self.factory(**values)
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError(
                f"learnable(): {_name(self.factory)} must return an Optax optimizer, not "
                f"{type(made).__name__}; try optax.sgd."
            )
        return optax.with_extra_args_support(made)

    def _schedules(self) -> list[AbstractSchedule]:
        return [schedule for _, value, _ in self.initial for schedule in _schedules(value)]

    def _apart(self) -> bool:
        return any(isinstance(value, PerTensor) for _, value, _ in self.initial)

    def _check_tensors(self, params: Params) -> None:
        found = {name for name, _ in named_tensors(params)}
        for name, value, _ in self.initial:
            if isinstance(value, PerTensor) and (given := {n for n, _ in value.values}) != found:
                raise ValueError(
                    f"Learnable({name}=per_tensor(...)) is for the tensors "
                    f"{', '.join(sorted(given))}, but params has {', '.join(sorted(found))}."
                )


def _schedules(value: Value) -> list[AbstractSchedule]:
    values = [v for _, v in value.values] if isinstance(value, PerTensor) else [value]
    return [v for v in values if isinstance(v, AbstractSchedule)]


def _init(value: Value, form: Form) -> Theta:
    if isinstance(value, PerTensor):
        return {name: _init(one, form) for name, one in value.values}
    return value.init(form) if isinstance(value, AbstractSchedule) else to_theta(value, form)


def _at(value: Value, theta: Theta, time: Time, form: Form, tensor: str | None) -> Any:
    """Returns the value at a time, of a tensor or, without one, of all."""
    if isinstance(value, PerTensor):
        values = {
            name: _at(one, theta[name], time, form, None)
            for name, one in value.values
            if tensor in (None, name)
        }
        return values if tensor is None else values[tensor]
    if isinstance(value, AbstractSchedule):
        return value.at(theta, time, form)
    return from_theta(theta, form)


def _in_precision_of(theta: Theta, tree: Params | None) -> Params | None:
    """Gives arrays at least the precision of theta: in bfloat16 a decay of 0.999 is one."""

    def bits(dtype: Any) -> int:
        return jnp.finfo(dtype).bits

    widest = max((leaf.dtype for leaf in jax.tree.leaves(theta)), key=bits)
    return jax.tree.map(lambda leaf: leaf.astype(max(leaf.dtype, widest, key=bits)), tree)


def learnable(
    factory: Callable[..., optax.GradientTransformation],
    **hyperparameters: Any,
) -> Learnable:
    """Makes chosen arguments of an Optax optimizer learnable.

    Args:
        factory: any function that returns an Optax optimizer. Arguments that are not to be
            learned are fixed with `functools.partial`.
        **hyperparameters: initial values by name, or schedules, such as
            `lopt.learned.PerStep(0.1, length=100)`, or `lopt.learned.per_tensor(...)` of either.
            Well-known names have a natural form (log for rates and epsilon, log of one minus for
            decays); give others as (value, form), with form one of "log", "log_one_minus",
            "identity".

    Raises:
        TypeError: if `factory` is no function of such an argument alone, or cannot take it as an
            array, or the value is no real number.
        ValueError: if no form is known for a name, or a value is outside of its form's range.

    Example:
        >>> import jax, optax, lopt
        >>> learned = lopt.learnable(optax.sgd, learning_rate=0.1)
        >>> learned.init(jax.random.key(0))["learning_rate"].round(3).item()
        -2.303
        >>> decay = lopt.learned.InverseTime(0.1, power=0.5)
        >>> learned = lopt.learnable(optax.sgd, learning_rate=decay)
        >>> sorted(learned.init(jax.random.key(0))["learning_rate"])
        ['initial', 'power']
    """
    if not hyperparameters:
        raise ValueError("learnable(): name at least one argument, as in learning_rate=1e-3.")
    _check_factory(factory, tuple(hyperparameters))
    initial = []
    for name, given in hyperparameters.items():
        value, form = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        where = f"learnable({name}={shown(value)})"
        if isinstance(value, tuple):
            raise TypeError(
                f"{where} must be one value, or a pair (value, form); "
                "of one value per step, try lopt.learned.PerStep."
            )
        if not isinstance(value, AbstractSchedule | PerTensor):
            remedy = f"learned can be {', '.join(_arguments(factory))}"
            check_number(where, value, remedy)
            value = float(value)
        form = FORMS.get(name) if form is None else form
        if form is None:
            raise ValueError(
                f"{where}: no natural form is known for it; "
                f'try {name}=({shown(value)}, "identity").'
            )
        check_form(where, form)
        _check(where, value, form)
        initial.append((name, value, form))
    learned = Learnable(factory, tuple(initial))
    _try(learned, ", ".join(hyperparameters))
    return learned


def _check_factory(factory: Any, names: tuple[str, ...]) -> None:
    """Refuses what cannot be called with arguments of these names alone."""
    if not callable(factory):
        raise TypeError(
            f"learnable({type(factory).__name__}, ...) must be given a function that returns an "
            "optimizer; try optax.sgd, and not optax.sgd(0.1)."
        )
    parameters = inspect.signature(factory).parameters
    for name in names:
        if name not in parameters:
            raise TypeError(
                f"learnable({name}=...): {_name(factory)} has no such argument; to be learned are "
                f"{', '.join(_arguments(factory))}."
            )
    for name, parameter in parameters.items():
        any_number = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name not in names and parameter.default is parameter.empty and not any_number:
            raise TypeError(
                f"learnable({', '.join(names)}): {_name(factory)} needs {name} as well; learn it, "
                f"or fix it with functools.partial({_name(factory)}, {name}=...)."
            )


def _check(where: str, value: Value, form: Form) -> None:
    if isinstance(value, PerTensor):
        for name, one in value.values:
            _check(f"{where}, {name}={shown(one)}", one, form)
    elif isinstance(value, AbstractSchedule):
        value.check(where, form)
    else:
        check_value(where, value, form)


def _try(learned: Learnable, names: str) -> None:
    """Refuses arguments that cannot be arrays, and a theta without a single number."""
    theta = learned.init(jax.random.key(0))
    if not jax.tree.leaves(theta):
        raise ValueError(f"learnable({names}): none of the constants is learned; see learn=....")
    apart = [value for _, value, _ in learned.initial if isinstance(value, PerTensor)]
    tensors = sorted({name for value in apart for name, _ in value.values})

    def make(theta: Theta) -> None:
        with jax.numpy_dtype_promotion("standard"):
            for name in tensors or (None,):
                learned._bind(theta, Time.of(0, 1), name)

    def step(theta: Theta) -> Any:
        params = {name: jnp.ones((2, 2)) for name in tensors or ["params"]}
        try:
            return learned.update(theta, params, learned.begin(theta, params, 1), params)
        except _BRANCHES:
            raise
        except Exception:
            # The optimizer knows the tree that it is for, or needs more than gradients: this trial
            # says nothing about it.
            return None

    try:
        jax.eval_shape(make, theta)
        jax.eval_shape(step, theta)
    except _BRANCHES as error:
        raise TypeError(
            f"learnable({names}): {_name(learned.factory)} branches on one of these values, so it "
            "cannot be an array; fix it with functools.partial instead. Learned can be "
            f"{', '.join(_arguments(learned.factory))}."
        ) from error


_BRANCHES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _arguments(factory: Callable[..., Any]) -> list[str]:
    """Returns the arguments that are, or may be, real numbers."""
    parameters = inspect.signature(factory).parameters
    return [n for n, p in parameters.items() if n in FORMS or type(p.default) is float]


def _name(factory: Callable[..., Any]) -> str:
    function = factory.func if isinstance(factory, functools.partial) else factory
    return getattr(function, "__name__", str(function))
