"""Celo, Celo2, and learned schedules of Adam: cheap descendants of VeLO.

Celo (Moudgil et al. 2025, arXiv:2501.12670) has one perceptron, and one schedule for all tensors;
Celo-Adam and Sinv6 have that schedule and a rule without weights. Celo2 (arXiv:2602.19142) has a
perceptron for the direction of each matrix, and leaves steps and schedules to the user.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractLearnedOptimizer, AbstractRule, Columns, Tensor
from lopt.core.types import Key, NumSteps, Params, State, Theta
from lopt.learned.hypernetwork import Memory, TensorLSTM, needed_loss
from lopt.learned.matrices import orthogonalised
from lopt.learned.nominal import Normalised
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.safe_roots import with_safe_roots
from lopt.learned.safeguards import AbstractCombination
from lopt.learned.velo import LARGEST, LossHistory, VeLOFeatures, root_mean_square


class AdamDirection(AbstractRule):
    """m / (sqrt(v + 1e-10) + 1e-8) of the columns m and v, without weights.

    Values that coordinates share, if any, are what m and v are divided by first.
    """

    is_elementwise = True

    @override
    def apply(
        self, theta: Theta, columns: Columns, shared: Float[Array, " shared"], memory: State
    ) -> tuple[Columns, State]:
        m, v = columns if not len(shared) else (c / s for c, s in zip(columns, shared, strict=True))
        return (m / (jnp.sqrt(v + 1e-10) + 1e-8))[None], memory


class ScheduledState(eqx.Module):
    """The number of steps, the scheduled optimizer's state, and the schedule's."""

    step: Int[Array, ""]
    learned: State
    memory: Memory
    history: LossHistory


class LearnedSchedule(AbstractCombination):
    """Another optimizer, its updates times a learned schedule of time and loss.

    An LSTM reads nine features of time and nine of the loss. Gradients are clipped to +-1000.
    Theta is `{"learned": ..., "schedule": ...}`.

    Attributes:
        learned: the other optimizer.
        hidden: the width of the LSTM.
        factor: what its output x stands for: "exp" for 0.1 exp(x), "clip" for x, at least 1e-5 and
            at most 1000.
        relative: whether updates are multiplied by the root mean square of their tensor.
    """

    learned: AbstractLearnedOptimizer
    hidden: int = eqx.field(static=True, default=64)
    factor: Literal["exp", "clip"] = eqx.field(static=True, default="exp")
    relative: bool = eqx.field(static=True, default=True)
    needs_num_steps = True

    def __check_init__(self) -> None:
        check_integer("LearnedSchedule", "hidden", self.hidden, hint=64)
        if self.factor not in ("exp", "clip"):
            raise ValueError(f'LearnedSchedule(factor={self.factor!r}) must be "exp" or "clip".')

    def _network(self) -> TensorLSTM:
        return TensorLSTM(18, self.hidden, (("step", 1),), mix=True)

    @override
    def init(self, key: Key) -> Theta:
        other, own = jax.random.split(key)
        return {"learned": self.learned.init(other), "schedule": self._network().init(own)}

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> ScheduledState:
        inner = self.learned.begin(theta["learned"], params, num_steps)
        output, cell = theta["schedule"]["memory"]
        history = LossHistory.start(num_steps, num_steps, output.dtype)
        return ScheduledState(
            jnp.zeros((), jnp.int32), inner, (output[:, None], cell[:, None]), history
        )

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, ScheduledState]:
        loss = needed_loss("LearnedSchedule", extra.get("value"), state.history.means.dtype)
        told, history = state.history.next(loss, state.step)
        control, memory = self._network().apply(theta["schedule"], told[:, None], state.memory)
        output = control["step"][0, 0]
        factor = 0.1 * jnp.exp(output) if self.factor == "exp" else jnp.clip(output, 1e-5, 1e3)
        grads = jax.tree.map(lambda g: jnp.clip(g, -LARGEST, LARGEST), grads)
        updates, inner = self.learned.update(
            theta["learned"], grads, state.learned, params, **extra
        )

        def scaled(param: Tensor, update: Any) -> Any:
            own = factor.astype(update.dtype)
            return update * (own * root_mean_square(param) if self.relative else own)

        updates = jax.tree.map(scaled, updates if params is None else params, updates)
        return updates, ScheduledState(state.step + 1, inner, memory, history)


class Celo2(AbstractLearnedOptimizer):
    """A perceptron for the direction of each matrix, which is normalised; 347 weights.

    Features are normalised over the last two axes, and so is the output, after an optional
    orthogonalisation of the matrices on these axes by Newton and Schulz. Steps decay outside:
    `optax.chain(lopt.celo2(step_multiplier=-1.0).optimizer(theta), optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(schedule))`.

    Attributes:
        hidden: width of each hidden layer.
        orthogonalise: whether matrices are orthogonalised.
        step_multiplier: of the direction; -1 for the direction itself, which points uphill.
        vector_multiplier: tensors of rank < 2 take this many times the step of Adam, with decays
            0.9 and 0.95; None for that of the perceptron.
    """

    hidden: tuple[int, ...] = eqx.field(static=True, default=(8, 8))
    orthogonalise: bool = eqx.field(static=True, default=True)
    step_multiplier: float = eqx.field(static=True, default=0.001)
    vector_multiplier: float | None = eqx.field(static=True, default=None)

    def _rule(self) -> Coordinatewise:
        features = Normalised(
            VeLOFeatures(0.95, 1e-8, factored_vectors=False), axes=2, epsilon=1e-9
        )
        rule, scale = MLP(30, self.hidden, 3), DirectionMagnitude(0.0, 1.0)
        return Coordinatewise(features, rule, scale, normalise=False)

    @override
    def init(self, key: Key) -> Theta:
        return self._rule().init(key)

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> State:
        return self._rule().begin(theta, params)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        updates, new = self._rule().update(theta, grads, state, params)

        def finish(update: Any, momentum: Any, rms: Any) -> Any:
            wide = update.astype(momentum.dtype)
            if update.ndim < 2 and self.vector_multiplier is not None:
                m, v = (
                    bank[0] / (1 - decay ** new.step.astype(bank.dtype))
                    for bank, decay in ((momentum, 0.9), (rms, 0.95))
                )
                step = -self.vector_multiplier * m / (with_safe_roots(jnp.sqrt)(v) + 1e-8)
            else:
                wide = orthogonalised(wide) if self.orthogonalise and wide.ndim > 1 else wide
                axes = tuple(range(max(0, wide.ndim - 2), wide.ndim))
                step = wide * jax.lax.rsqrt(1e-9 + jnp.mean(jnp.square(wide), axes, keepdims=True))
            return (self.step_multiplier * step).astype(update.dtype)

        banks = new.features.momentum, new.features.rms
        return jax.tree.map(finish, updates, *banks), new
