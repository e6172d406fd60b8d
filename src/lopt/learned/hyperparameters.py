"""Hand-made optimizers with learned hyperparameters: constants, schedules, one for each tensor.

Every step makes the Optax optimizer anew, from the current values of theta, so that any derivative
with respect to theta passes through it.
"""

import inspect
import reprlib
from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from typing_extensions import override

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.tensors import mirror, unmirror
from lopt.core.types import Key, NumSteps, Params, State, Theta
from lopt.learned.forms import FORMS, Form, check_value, from_theta, to_theta
from lopt.learned.safe_roots import with_safe_roots
from lopt.learned.schedules import AbstractSchedule, PerTensor, Time, named_tensors

Value = float | AbstractSchedule | PerTensor


class LearnableState(eqx.Module):
    """The state of an optimizer with schedules: the time, and Optax's state."""

    time: Time
    inner: State


class Learnable(AbstractLearnedOptimizer):
    """An Optax optimizer whose chosen arguments are theta; made by `learnable`.

    Attributes:
        factory: the Optax function, such as `optax.adam`.
        initial: (name, initial value, form) of each learned argument; the value may be a schedule
            or a `PerTensor`.

    Theta is `{name: scalar}`, each in its form. A schedule has a vector or `{constant: scalar}` in
    place of the scalar, an argument for each tensor `{tensor: ...}`. State and arithmetic have at
    least the precision of theta, and float32; updates have the dtypes of the gradients. Roots have
    safe derivatives, see `lopt.learned.safe_roots`.
    """

    factory: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    initial: tuple[tuple[str, Value, Form], ...] = eqx.field(static=True)

    @override
    def init(self, key: Key) -> Theta:
        return {name: _init(value, form) for name, value, form in self.initial}

    def hyperparameters(
        self, theta: Theta, step: int | Int[Array, ""] = 0, num_steps: NumSteps = None
    ) -> dict[str, Any]:
        """Returns the values after `step` steps, by name, and by tensor where tensors differ."""
        return self._values(theta, Time.of(step, num_steps))

    def _values(self, theta: Theta, time: Time, tensor: str | None = None) -> dict[str, Any]:
        return {n: _at(value, theta[n], time, form, tensor) for n, value, form in self.initial}

    @property
    @override
    def max_steps(self) -> int | None:
        lengths = [schedule.max_steps for schedule in self._schedules()]
        return min((length for length in lengths if length is not None), default=None)

    @property
    @override
    def needs_num_steps(self) -> bool:
        return any(schedule.needs_num_steps for schedule in self._schedules())

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        found = {name for name, _ in named_tensors(params)}
        apart = self._tensors()
        # `optax.tree_map_params` begins with a tree without leaves.
        if apart and found and found != set(apart):
            raise ValueError(
                f"Learnable: per_tensor(...) is for the tensors {', '.join(apart)}, but params has "
                f"{', '.join(sorted(found))}."
            )
        time = Time.of(0, num_steps)
        with jax.numpy_dtype_promotion("standard"):
            state = self._bind(theta, time).init(_in_precision_of(theta, params))
        return LearnableState(time, state) if self._schedules() else state

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        wide, params = (_in_precision_of(theta, tree) for tree in (grads, params))
        scheduled = isinstance(state, LearnableState)
        time = state.time if scheduled else Time.of(0)

        def of_optax(theta: Theta, time: Time, *args: Any) -> tuple[Params, State]:
            *given, extra = args
            return self._bind(theta, time).update(*given, **extra)

        # Optax mixes dtypes where an argument is an array: decay ** count, for example.
        with jax.numpy_dtype_promotion("standard"):
            inner = state.inner if scheduled else state
            updates, inner = with_safe_roots(of_optax)(theta, time, wide, inner, params, extra)
        updates = jax.tree.map(lambda u, g: u.astype(g.dtype), updates, grads)
        return updates, LearnableState(time.next(), inner) if scheduled else inner

    def _bind(self, theta: Theta, time: Time) -> optax.GradientTransformationExtraArgs:
        """Returns Optax's optimizer with the values at a time, or one for each tensor as one."""

        def of(tensor: str | None) -> optax.GradientTransformationExtraArgs:
            return optax.with_extra_args_support(self.factory(**self._values(theta, time, tensor)))

        if not self._tensors():
            return of(None)
        parts = {name: of(name) for name in self._tensors()}
        some = next(iter(parts.values()))
        like = jax.eval_shape(some.init, jax.ShapeDtypeStruct((1, 1), jnp.float32))

        def init(params: Params) -> State:
            states = [parts[name].init(leaf) for name, leaf in named_tensors(params)]
            return mirror(states, like, jax.tree.structure(params))

        def update(
            grads: Params, state: State, params: Params | None = None, **extra: Any
        ) -> tuple[Params, State]:
            structure: Any
            named, structure = named_tensors(grads), jax.tree.structure(grads)
            leaves = jax.tree.leaves(params) or [None] * len(named)
            rows = zip(named, unmirror(state, structure), leaves, strict=True)
            done = [parts[n].update(grad, old, leaf, **extra) for (n, grad), old, leaf in rows]
            updates = structure.unflatten([update for update, _ in done])
            return updates, mirror([new for _, new in done], like, structure)

        return optax.GradientTransformationExtraArgs(init, update)

    def _schedules(self) -> list[AbstractSchedule]:
        return [schedule for _, value, _ in self.initial for schedule in _schedules(value)]

    def _tensors(self) -> list[str]:
        """Returns the names of the tensors that have values of their own."""
        apart = [value.values for _, value, _ in self.initial if isinstance(value, PerTensor)]
        return sorted({name for values in apart for name, _ in values})


def _schedules(value: Value) -> list[AbstractSchedule]:
    values = [v for _, v in value.values] if isinstance(value, PerTensor) else [value]
    return [v for v in values if isinstance(v, AbstractSchedule)]


def _init(value: Value, form: Form) -> Theta:
    if isinstance(value, PerTensor):
        return {name: _init(one, form) for name, one in value.values}
    return value.init(form) if isinstance(value, AbstractSchedule) else to_theta(value, form)


def _at(value: Value, theta: Theta, time: Time, form: Form, tensor: str | None) -> Any:
    """Returns the value at a time: of one tensor, or without a name of all tensors."""
    if isinstance(value, PerTensor):
        if tensor is not None:
            return _at(dict(value.values)[tensor], theta[tensor], time, form, None)
        return {name: _at(one, theta[name], time, form, None) for name, one in value.values}
    if isinstance(value, AbstractSchedule):
        return value.at(theta, time, form)
    return from_theta(theta, form)


def _in_precision_of(theta: Theta, tree: Params | None) -> Params | None:
    """Gives arrays at least the precision of theta, and single: in half a decay of 0.999 is one."""

    def bits(dtype: Any) -> int:
        return jnp.finfo(dtype).bits

    theirs = [jnp.dtype(jnp.float32), *(leaf.dtype for leaf in jax.tree.leaves(theta))]
    return jax.tree.map(lambda leaf: leaf.astype(max([leaf.dtype, *theirs], key=bits)), tree)


def learnable(
    factory: Callable[..., optax.GradientTransformation],
    **hyperparameters: Any,
) -> Learnable:
    """Makes chosen arguments of an Optax optimizer learnable.

    Args:
        factory: any function that returns an Optax optimizer. `functools.partial` fixes arguments
            that are not learned.
        **hyperparameters: initial values by name, or schedules, such as
            `lopt.learned.PerStep(0.1, length=100)`, or `lopt.learned.per_tensor(...)` of either.
            Well-known names have a natural form (log for rates and epsilon, log of one minus for
            decays); give others as (value, form), with form one of "log", "log_one_minus",
            "identity".

    Raises:
        TypeError: if `factory` has no such argument, needs others, or branches on the value.
        ValueError: if no form is known for a name, or a value is outside of its form's range.

    Example:
        >>> import jax, optax, lopt
        >>> learned = lopt.learnable(optax.sgd, learning_rate=0.1)
        >>> learned.init(jax.random.key(0))["learning_rate"].round(3).item()
        -2.303
    """
    if not hyperparameters:
        raise ValueError("learnable(): name at least one argument, as in learning_rate=1e-3.")
    signature, names = inspect.signature(factory), ", ".join(hyperparameters)
    arguments = signature.parameters.items()
    numbers = [name for name, p in arguments if name in FORMS or type(p.default) is float]
    remedy = f"learn some of {', '.join(numbers)}, and fix others with functools.partial"
    try:
        signature.bind_partial(**hyperparameters)
        signature.bind(**hyperparameters)
    except TypeError as error:
        raise TypeError(f"learnable({names}): {error}; {remedy}.") from error
    initial: list[tuple[str, Value, Form]] = []
    form: Any
    for name, given in hyperparameters.items():
        value, form = given if isinstance(given, tuple) else (given, None)
        where, form = f"learnable({name}={reprlib.repr(value)})", form or FORMS.get(name)
        if form not in get_args(Form):
            raise ValueError(
                f"{where} has the form {form!r}, which must be one of {', '.join(get_args(Form))}; "
                f'try {name}=({reprlib.repr(value)}, "identity").'
            )
        if not isinstance(value, AbstractSchedule | PerTensor):
            value = float(value)
        _check(where, value, form)
        initial.append((name, value, form))
    learned = Learnable(factory, tuple(initial))
    if not jax.tree.leaves(learned.init(jax.random.key(0))):
        raise ValueError(f"learnable({names}): none of the constants is learned; see learn=....")
    _try(learned, f"learnable({names}): the optimizer branches on one of these values; {remedy}.")
    return learned


def _check(where: str, value: Value, form: Form) -> None:
    if isinstance(value, PerTensor):
        for name, one in value.values:
            _check(f"{where}, {name}={reprlib.repr(one)}", one, form)
    elif isinstance(value, AbstractSchedule):
        value.check(where, form)
    else:
        check_value(where, value, form)


def _try(learned: Learnable, message: str) -> None:
    """Refuses, with the message, a factory that branches on a value of theta."""
    params = {name: jnp.ones((2, 2)) for name in learned._tensors() or ["params"]}

    def step(theta: Theta) -> Any:
        return learned.update(theta, params, learned.begin(theta, params, 1), params)

    try:
        jax.eval_shape(step, learned.init(jax.random.key(0)))
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(message) from error
    except Exception:
        # The optimizer knows the tree that it is for, or needs more than gradients.
        return
