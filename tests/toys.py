"""Small tasks and optimizers whose meta-gradients are known in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lopt


class Position(lopt.AbstractTask):
    """The loss is the parameter itself, which starts at zero."""

    def init(self, key: Any) -> Any:
        return jnp.zeros(())

    def batch(self, key: Any, split: Any = "train") -> Any:
        return ()

    def loss(self, params: Any, batch: Any) -> Any:
        return params


class Drift(lopt.AbstractLearnedOptimizer):
    """Adds theta to the parameter, whatever the gradient.

    On `Position` the loss at step t (from zero) is then t theta: linear in theta, so that ES and
    PES have no smoothing bias, and the mean over steps a to b has the derivative (a + b) / 2.
    """

    def init(self, key: Any) -> Any:
        return jnp.zeros(())

    def begin(self, theta: Any, params: Any, num_steps: Any = None) -> Any:
        return ()

    def update(
        self, theta: Any, grads: Any, state: Any, params: Any = None, *, value: Any = None, **_: Any
    ) -> Any:
        return jax.tree.map(lambda g: g * 0 + theta, grads), state


def linear_toy(horizon: int) -> lopt.InnerTraining:
    return lopt.InnerTraining(Position(), Drift(), horizon)


def quadratic_toy(horizon: int, learning_rate: float = 0.1) -> lopt.InnerTraining:
    """SGD with a learned log learning rate on a fixed quadratic without noise."""
    task = lopt.tasks.Quadratic(jnp.array([0.5, 1.0, 3.0]), jnp.array([1.0, -1.0, 0.5]))
    return lopt.InnerTraining(task, lopt.LearnableSGD(learning_rate), horizon)


class NoisyParabola(lopt.AbstractTask):
    """The loss is h (x - c)^2 / 2 with c ~ N(0, deviation^2) anew in each step; x starts fixed."""

    curvature: float
    deviation: float
    start: float

    def init(self, key: Any) -> Any:
        return jnp.asarray(self.start)

    def batch(self, key: Any, split: Any = "train") -> Any:
        return self.deviation * jax.random.normal(key)

    def loss(self, params: Any, batch: Any) -> Any:
        return self.curvature * (params - batch) ** 2 / 2


def surface_toy(surface: Any) -> lopt.InnerTraining:
    """One step, whose update is theta: the meta-loss is `surface(theta)`, whatever the key."""
    return lopt.InnerTraining(Position(), Drift(), 1, lambda task, step, _: surface(step.updates))


def quick_jit(function: Any) -> Any:
    """Compiles without optimisation: tests spend more time on compiling than on running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def estimate_of(estimator: Any) -> Any:
    """Its estimate, compiled."""
    return quick_jit(lambda *arguments: estimator.estimate(*arguments))


def train(
    estimator: Any, optimizer: Any, theta: Any, key: Any, steps: int, record: Any = lopt.loss_of
) -> Any:
    """Returns the state before the first step and what `lopt.unroll` makes of it."""

    def run(theta: Any, key: Any) -> Any:
        state = lopt.start(estimator, optimizer, theta, key)
        return state, *lopt.unroll(estimator, optimizer, state, steps, record=record)

    return quick_jit(run)(theta, key)


def particles(estimator: Any, theta: Any, key: Any, num: int, num_windows: int = 1) -> Any:
    """Estimates of particles that begin together, (num, num_windows), of theta's first weight."""

    def one(theta: Any, key: Any) -> Any:
        begin_key, run_key = jax.random.split(key)

        def window(state: Any, i: Any) -> Any:
            estimate, state = estimator.estimate(theta, state, jax.random.fold_in(run_key, i))
            return state, jax.tree.leaves(estimate.grads)[0]

        return jax.lax.scan(window, estimator.prepare(theta, begin_key), jnp.arange(num_windows))[1]

    return np.asarray(quick_jit(jax.vmap(one, (None, 0)))(theta, jax.random.split(key, num)))


class Faulty(lopt.AbstractTask):
    """The parabola x^2 / 2 from 1, or by chance, with probability `share`, from what is no number.

    Shares of 0 and 1 are certain.
    """

    share: float

    def init(self, key: Any) -> Any:
        return jnp.where(jax.random.uniform(key) < self.share, jnp.nan, 1.0)

    def batch(self, key: Any, split: Any = "train") -> Any:
        return ()

    def loss(self, params: Any, batch: Any) -> Any:
        return params**2 / 2
