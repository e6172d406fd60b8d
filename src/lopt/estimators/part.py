"""Gradients by a part of theta, while the rest stays as it is.

Forward mode takes a direction for each weight, and evolution strategies have noise in proportion to
their number: both gain where most weights are let alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from typing_extensions import override

from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Key, NumSteps, Params, State, Theta
from lopt.estimators.truncation import nodes


class Part(AbstractGradientEstimator):
    """Another estimator, to which theta is a part of what it is; all other gradients are zero.

    Attributes:
        one: the estimator, of inner training.
        where: from theta to the part, a node of it or a list of some, as for `equinox.tree_at`.

    Example: `Part(OnlineForwardMode(inner, 50), lambda theta: [theta["sizes"], theta["schedule"]])`
    has as many directions as there are weights in these two.
    """

    one: AbstractGradientEstimator
    where: Callable[[Theta], Any] = eqx.field(static=True)

    @override
    def prepare(self, params: Theta, key: Key) -> State:
        return self._of(params).prepare(self.where(params), key)

    @override
    def estimate(self, params: Theta, state: State, key: Key) -> tuple[Estimate, State]:
        estimate, state = self._of(params).estimate(self.where(params), state, key)
        grads = jax.tree.map(jnp.zeros_like, params)
        grads = eqx.tree_at(self.where, grads, estimate.grads)
        return dataclasses.replace(estimate, grads=grads), state

    def _of(self, theta: Theta) -> Any:
        """Returns the estimator, whose optimizers have the rest of this theta."""
        return eqx.tree_at(
            lambda one: [inner.learned for inner in nodes(one, InnerTraining)],
            self.one,
            replace_fn=lambda learned: _Remaining(learned, theta, self.where),
        )


class _Remaining(AbstractLearnedOptimizer):
    """A learned optimizer of whose theta only a part may change."""

    learned: AbstractLearnedOptimizer
    theta: Theta
    where: Callable[[Theta], Any] = eqx.field(static=True)

    @property
    @override
    def max_steps(self) -> int | None:
        return self.learned.max_steps

    @property
    @override
    def needs_num_steps(self) -> bool:
        return self.learned.needs_num_steps

    @override
    def init(self, key: Key) -> Theta:
        return self.where(self.learned.init(key))

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        return self.learned.begin(self._whole(theta), params, num_steps)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        return self.learned.update(self._whole(theta), grads, state, params, **extra)

    def _whole(self, part: Theta) -> Theta:
        return eqx.tree_at(self.where, self.theta, part)
