"""What estimators refuse, at construction where it can be known there."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lopt.core.checks import check_positive, is_real
from lopt.core.types import Theta


def check_sigma(owner: str, sigma: Any) -> None:
    """Refuses a perturbation that is not positive."""
    check_positive(owner, "sigma", sigma, 0.01)


def check_fraction(owner: str, field: str, value: Any, hint: float) -> None:
    """Refuses what is not in [0, 1)."""
    if not is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{owner}({field}={value!r}) must be in [0, 1); try {hint}.")


def check_weights(owner: str, theta: Theta) -> None:
    """Refuses a theta that is empty, before the first step: at construction it is not known."""
    if not sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(theta)):
        raise ValueError(
            f"{owner} was given a theta without weights: there is nothing to search; learn at "
            "least one hyperparameter, as in lopt.LearnableSGD()."
        )
