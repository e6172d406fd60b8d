"""Hand-made optimizers with learned hyperparameters.

Each hyperparameter is learned in the form in which it may take any real value and in which equal
steps mean equally much: rates by their logarithm, decays by the logarithm of one minus them.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, Params, Scalar, State, Theta

Form = Literal["log", "log_one_minus", "identity"]

# The natural form of each argument that Optax's optimizers share.
FORMS: dict[str, Form] = {
    "learning_rate": "log",
    "eps": "log",
    "eps_root": "log",
    "weight_decay": "log",
    "weight_decay_rate": "log",
    "initial_accumulator_value": "log",
    "trust_coefficient": "log",
    "b1": "log_one_minus",
    "b2": "log_one_minus",
    "b3": "log_one_minus",
    "beta": "log_one_minus",
    "decay": "log_one_minus",
    "decay_rate": "log_one_minus",
    "momentum": "log_one_minus",
}

_TO_THETA: dict[Form, Callable[[float], Any]] = {
    "log": jnp.log,
    "log_one_minus": lambda value: jnp.log1p(-value),
    "identity": lambda value: value,
}
_FROM_THETA: dict[Form, Callable[[Scalar], Scalar]] = {
    "log": jnp.exp,
    "log_one_minus": lambda raw: -jnp.expm1(raw),
    "identity": lambda raw: raw,
}


class Learnable(AbstractLearnedOptimizer):
    """An Optax optimizer whose chosen arguments are theta; made by `learnable`.

    Attributes:
        factory: the Optax function, such as `optax.adam`.
        initial: (name, initial value, form) of each learned argument.

    Theta is `{name: scalar}`, each in its form. Its precision is that of state and arithmetic, at
    least; updates have the dtypes of the gradients.
    """

    factory: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    initial: tuple[tuple[str, float, Form], ...] = eqx.field(static=True)

    def init(self, key: Key) -> Theta:
        """Returns the initial values in their forms; they do not depend on the key."""
        return {
            name: jnp.asarray(_TO_THETA[form](value), float) for name, value, form in self.initial
        }

    def hyperparameters(self, theta: Theta) -> dict[str, Scalar]:
        """Returns the values that theta stands for, by name."""
        return {name: _FROM_THETA[form](theta[name]) for name, _, form in self.initial}

    def begin(self, theta: Theta, params: Params) -> State:
        """Returns the state of the Optax optimizer."""
        with jax.numpy_dtype_promotion("standard"):
            return self._bind(theta).init(_in_precision_of(theta, params))

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
        # Optax mixes dtypes where an argument is an array: decay ** count, for example.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = self._bind(theta).update(wide, state, params, value=value, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), updates, grads), state

    def _bind(self, theta: Theta) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.factory(**self.hyperparameters(theta)))


def _in_precision_of(theta: Theta, tree: Params | None) -> Params | None:
    """Gives arrays at least the precision of theta: in bfloat16 a decay of 0.999 is one."""

    def bits(dtype: Any) -> int:
        return jnp.finfo(dtype).bits

    widest = max((leaf.dtype for leaf in jax.tree.leaves(theta)), key=bits)
    return jax.tree.map(lambda leaf: leaf.astype(max(leaf.dtype, widest, key=bits)), tree)


def learnable(
    factory: Callable[..., optax.GradientTransformation],
    **hyperparameters: float | tuple[float, Form],
) -> Learnable:
    """Makes chosen arguments of an Optax optimizer learnable.

    Args:
        factory: any function that returns an Optax optimizer. Arguments that are not to be
            learned are fixed with `functools.partial`.
        **hyperparameters: initial values by name. Well-known names have a natural form (log for
            rates and epsilon, log of one minus for decays); give others as (value, form), with
            form one of "log", "log_one_minus", "identity".

    Raises:
        TypeError: if `factory` has no such argument, or cannot take it as an array.
        ValueError: if no form is known for a name, or a value is outside of its form's range.

    Example:
        >>> import jax, optax, lopt
        >>> learned = lopt.learnable(optax.sgd, learning_rate=0.1)
        >>> learned.init(jax.random.key(0))["learning_rate"].round(3).item()
        -2.303
    """
    if not hyperparameters:
        raise ValueError("learnable(): name at least one argument, as in learning_rate=1e-3.")
    known = inspect.signature(factory).parameters
    initial = []
    for name, given in hyperparameters.items():
        if name not in known:
            raise TypeError(f"learnable({name}=...): {factory} takes only {', '.join(known)}.")
        if isinstance(given, tuple):
            value, form = given
        elif name in FORMS:
            value, form = given, FORMS[name]
        else:
            raise ValueError(
                f"learnable({name}={given!r}): no natural form is known for it; "
                f'try {name}=({given!r}, "identity").'
            )
        if form not in _TO_THETA:
            raise ValueError(
                f"learnable({name}={given!r}): the form must be one of {', '.join(_TO_THETA)}."
            )
        if not bool(jnp.isfinite(_TO_THETA[form](value))):
            condition = "be positive" if form == "log" else "be below one"
            raise ValueError(
                f"learnable({name}={value!r}): with form {form!r} it must {condition}."
            )
        initial.append((name, float(value), form))
    learned = Learnable(factory, tuple(initial))
    try:
        jax.eval_shape(
            lambda theta: learned.begin(theta, jnp.zeros(2)), learned.init(jax.random.key(0))
        )
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            f"learnable({', '.join(hyperparameters)}): {factory} branches on one of these values, "
            "so it cannot be an array; fix it with functools.partial instead."
        ) from error
    return learned
