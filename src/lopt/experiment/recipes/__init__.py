"""Recipes that come with lopt: a file each, with a dataclass `Recipe`."""

from collections.abc import Callable
from typing import Any

import optax

import lopt
from lopt import learned

# Designs by name, with updates of a size for a few hundred steps.
DESIGNS: dict[str, Callable[[], lopt.AbstractLearnedOptimizer]] = {
    "adafactor_mlp": lambda: lopt.adafactor_mlp(step_multiplier=0.01),
    "small_mlp": lambda: lopt.small_mlp(step_multiplier=0.01),
    "dm": lopt.dm,
    "rnnprop": lopt.rnnprop,
    "nominal_mlp": lambda: learned.nominal_mlp(0.01),
    "hierarchical": lambda: learned.hierarchical(step_multiplier=0.01),
    "nn_adam": lambda: learned.nn_adam(1e-3),
    "celo": learned.celo,
    "muon_mlp": lambda: learned.muon_mlp(4, axes=learned.MatrixAxes("out_in")),
    "celo2": lambda: learned.celo2(step_multiplier=0.01, vector_multiplier=1.0),
    "velo_small": learned.velo_small,
}


# Estimators by name, from inner training, truncation and sigma.
ESTIMATORS: dict[str, Callable[[lopt.InnerTraining, int, float], Any]] = {
    "pes": lopt.PES,
    "es": lambda inner, _, sigma: lopt.ES(inner, sigma),
    "truncated_backprop": lambda inner, truncation, _: lopt.TruncatedBackprop(inner, truncation),
    "forward": lambda inner, *_: lopt.ForwardMode(inner),
}


def falling_adam(
    rate: float, steps: int, clip: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns AdamW of gradients of a norm of at most `clip`, whose rate falls along a cosine."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    adam = optax.adamw(schedule, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adam)
