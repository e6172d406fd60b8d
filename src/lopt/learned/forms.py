"""Forms: what real number stands for a hyperparameter.

Each hyperparameter is learned in the form in which it may take any real value and in which equal
steps mean equally much: rates by their logarithm, decays by the logarithm of one minus them.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Form = Literal["log", "log_one_minus", "identity"]
Raw = Float[Array, "..."]

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

_TO_THETA: dict[Form, Callable[[Raw], Raw]] = {
    "log": jnp.log,
    "log_one_minus": lambda value: jnp.log1p(-value),
    "identity": lambda value: value,
}
_FROM_THETA: dict[Form, Callable[[Raw], Raw]] = {
    "log": jnp.exp,
    "log_one_minus": lambda raw: -jnp.expm1(raw),
    "identity": lambda raw: raw,
}
# Least and greatest value; the ends are for constants that are not learned.
_RANGES: dict[Form, tuple[float, float, str, str]] = {
    "log": (0, math.inf, "positive", "at least zero and finite"),
    "log_one_minus": (0, 1, "at least zero and below one", "from zero to one"),
    "identity": (-math.inf, math.inf, "finite", "finite"),
}


def to_theta(value: float | tuple[float, ...], form: Form) -> Raw:
    """Returns what stands for a value, or for each of several."""
    return jnp.asarray(_TO_THETA[form](jnp.asarray(value, float)), float)


def from_theta(raw: Raw, form: Form) -> Raw:
    """Returns the value that `raw` stands for."""
    return _FROM_THETA[form](raw)


def check_value(where: str, value: float, form: Form, learned: bool = True) -> None:
    """Refuses a value outside of the form's range; its ends are refused if it is learned."""
    least, most, inside, closed = _RANGES[form]
    fits = math.isfinite(value) and least <= value <= most
    if learned and not (fits and bool(jnp.isfinite(to_theta(value, form)))):
        raise ValueError(f"{where}: with form {form!r} it must be {inside}.")
    if not fits:
        raise ValueError(f"{where}: with form {form!r}, and not learned, it must be {closed}.")
