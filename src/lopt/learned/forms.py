"""Forms: what real number stands for a hyperparameter.

Each hyperparameter is learned in the form in which it may take any real value and in which equal
steps mean equally much: rates by their logarithm, decays by the logarithm of one minus them.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
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

_TO_THETA: dict[Form, Callable[[Any], Any]] = {
    "log": jnp.log,
    "log_one_minus": lambda value: jnp.log1p(-value),
    "identity": lambda value: value,
}
_FROM_THETA: dict[Form, Callable[[Raw], Raw]] = {
    "log": jnp.exp,
    "log_one_minus": lambda raw: -jnp.expm1(raw),
    "identity": lambda raw: raw,
}
_RANGES: dict[Form, str] = {
    "log": "positive",
    "log_one_minus": "at least zero and below one",
    "identity": "finite",
}
# Of what is not learned: no real number need stand for it.
_CLOSED: dict[Form, tuple[float, float, str]] = {
    "log": (0, math.inf, "at least zero and finite"),
    "log_one_minus": (0, 1, "from zero to one"),
    "identity": (-math.inf, math.inf, "finite"),
}


def shown(value: Any, most: int = 70) -> str:
    """Returns how a value is shown in errors: its representation, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def to_theta(value: float | tuple[float, ...], form: Form) -> Raw:
    """Returns what stands for a value, or for each of several."""
    return jnp.asarray(_TO_THETA[form](jnp.asarray(value, float)), float)


def from_theta(raw: Raw, form: Form) -> Raw:
    """Returns the value that `raw` stands for."""
    return _FROM_THETA[form](raw)


def check_form(where: str, form: Any) -> None:
    """Refuses what is no form.

    Raises:
        ValueError: naming `where` it was given, and the forms.
    """
    if not isinstance(form, str) or form not in _TO_THETA:
        raise ValueError(f"{where}: the form must be one of {', '.join(_TO_THETA)}, not {form!r}.")


def check_number(where: str, value: Any, remedy: str = "try 0.1") -> None:
    """Refuses what is not one real number.

    Raises:
        TypeError: naming `where` it was given.
    """
    # Lists and strings have no dtype; of the rest, arrays of NumPy and JAX are as good as numbers.
    array = not isinstance(value, float | int | complex | str) and eqx.is_array_like(value)
    scalar = array and not jnp.ndim(value)
    kind = jnp.asarray(value).dtype if scalar else None
    real = kind is not None and any(jnp.issubdtype(kind, k) for k in (jnp.floating, jnp.integer))
    if not real and (isinstance(value, bool) or not isinstance(value, float | int)):
        raise TypeError(
            f"{where} must be one real number, or nothing is differentiable with respect to it; "
            f"{remedy}."
        )


def check_value(where: str, value: float, form: Form) -> None:
    """Refuses a value that no real number stands for in this form, and decays below zero.

    Raises:
        ValueError: naming `where` it was given, and its range.
    """
    negative = form == "log_one_minus" and value < 0
    if negative or not bool(jnp.isfinite(to_theta(value, form))):
        raise ValueError(f"{where}: with form {form!r} it must be {_RANGES[form]}.")


def check_fixed_value(where: str, value: float, form: Form) -> None:
    """Refuses a value that is not learned and lies outside of the form's range, ends included.

    Raises:
        ValueError: naming `where` it was given, and its range.
    """
    least, most, words = _CLOSED[form]
    if not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{where}: with form {form!r}, and not learned, it must be {words}.")
