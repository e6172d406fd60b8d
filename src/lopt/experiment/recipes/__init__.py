"""Recipes that come with lopt: a file each, with a dataclass `Recipe`."""

from collections.abc import Callable

import lopt


def named_estimator(
    name: str, inner: lopt.InnerTraining, truncation: int, sigma: float
) -> lopt.AbstractGradientEstimator:
    """Returns the estimator that a recipe names."""
    estimators: dict[str, Callable[[], lopt.AbstractGradientEstimator]] = {
        "pes": lambda: lopt.PES(inner, truncation, sigma),
        "es": lambda: lopt.ES(inner, sigma),
        "truncated_backprop": lambda: lopt.TruncatedBackprop(inner, truncation),
        "forward": lambda: lopt.ForwardMode(inner),
    }
    if name not in estimators:
        raise ValueError(f"--set estimator={name} must be one of {', '.join(estimators)}.")
    return estimators[name]()
