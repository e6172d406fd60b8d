"""The hierarchical optimizers, and NNAdam: LSTMs that read summaries of tensors.

In a hierarchical optimizer an LSTM per tensor and a perceptron per coordinate send one another
messages. In NNAdam the LSTM moves the hyperparameters of Adam.

Reference: Metz et al. 2020, arXiv:2009.11243.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core.learned import Columns, Tensor
from lopt.core.types import Key, NumSteps, Scalar, State, Theta
from lopt.learned.features import TIME_SCALES, accumulate
from lopt.learned.hypernetwork import (
    AbstractController,
    TensorLSTM,
    clipped_log,
    needed_loss,
    on_coordinates,
    truncated_normal,
)
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.safe_roots import with_safe_roots
from lopt.learned.velo import LARGEST

# Decays of the momenta, and of the second moments.
DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
# After so many steps the past parameter becomes the present one.
PAST = 100
# Decays of averages of losses, in training and in validation; that of the size of gradients, and
# the multiple of it to which they are clipped.
TRAIN, VALIDATION = 0.9, 0.95
CLIP = 0.99, 10.0
# The least and the greatest of what stands for the hyperparameters of NNAdam.
RANGES = [
    [math.log(1e-8) / 10, -1.0, -1.0, math.log(1e-11) / 10],
    [math.log(1e3) / 10, 0.0, 0.0, math.log(1e4) / 10],
]


class HierarchicalState(eqx.Module):
    """What tensors share, besides their message to all tensors.

    Attributes:
        across: the message.
        size: the average size of gradients.
        mean, square: averages of the training loss, and of its squared distance to that.
        validation: the average of validation losses, of which `measured` were told, and the `last`.
    """

    across: Float[Array, " across"]
    size: Scalar
    mean: Scalar
    square: Scalar
    validation: Scalar
    measured: Scalar
    last: Scalar


class Hierarchical(AbstractController):
    """An LSTM per tensor and a perceptron per coordinate that send one another messages.

    Gradients are clipped to a multiple of their average size. The perceptron's outputs are the
    direction and the log magnitude of the step, and a message; the mean of it over coordinates is
    read by the LSTM at the next step, and so is the mean over tensors of one of its outputs.

    Attributes:
        hidden: widths of the perceptron's layers.
        lstm: width of the LSTM.
        up, across, down: sizes of messages from coordinates to their tensor, from tensors to all
            tensors, and from a tensor to its coordinates.
        exp_multiplier, step_multiplier: see `DirectionMagnitude`.
        learned_clip: whether the decay of the average, 0.99, and the multiple, 10, are learned.
        largest_feature: to which normalised features are clipped; None for no clipping.
        past: whether the perceptron reads the parameter of up to 100 steps ago, too.
    """

    hidden: tuple[int, ...] = eqx.field(static=True, default=(32, 32))
    lstm: int = eqx.field(static=True, default=64)
    up: int = eqx.field(static=True, default=16)
    across: int = eqx.field(static=True, default=18)
    down: int = eqx.field(static=True, default=17)
    exp_multiplier: float = eqx.field(static=True, default=0.001)
    step_multiplier: float = eqx.field(static=True, default=0.001)
    learned_clip: bool = eqx.field(static=True, default=False)
    largest_feature: float | None = eqx.field(static=True, default=None)
    past: bool = eqx.field(static=True, default=False)

    @property
    @override
    def network(self) -> TensorLSTM:
        heads = (("down", self.down), ("across", self.across))
        return TensorLSTM(18 + self.across + self.up, self.lstm, heads)

    def _rule(self) -> MLP:
        inputs = 3 + self.past + 4 * len(DECAYS) + len(TIME_SCALES) + 3 + self.down
        return MLP(inputs, self.hidden, 2 + self.up)

    @override
    def init(self, key: Key) -> Theta:
        keys = jax.random.split(key, 4)
        clip = tuple(jnp.log(jnp.asarray(x, float)) for x in (1 - CLIP[0], CLIP[1]))
        return {
            "network": self.network.init(keys[0]),
            "rule": self._rule().init(keys[1]),
            "up": truncated_normal(keys[2], (self.up,)),
            "across": truncated_normal(keys[3], (self.across,)),
            "clip": clip if self.learned_clip else (),
        }

    @override
    def begin(self, theta: Theta, param: Tensor) -> State:
        if param.ndim > 4:
            raise ValueError(
                f"Hierarchical was given a tensor of shape {param.shape}, but knows at most four "
                "axes; reshape it."
            )
        bank = jnp.broadcast_to(jnp.zeros_like(param)[None], (len(DECAYS), *param.shape))
        return bank, bank, theta["up"], *((param,) if self.past else ())

    @override
    def start(self, theta: Theta, num_steps: NumSteps, dtype: Any) -> HierarchicalState:
        zero, rate = jnp.zeros((), dtype), 1 - self._clip(theta)[0]
        return HierarchicalState(theta["across"], zero + rate, *(zero,) * 5)

    def _clip(self, theta: Theta) -> Any:
        """Returns the decay of the average size of gradients, and the multiple that is allowed."""
        return (1 - jnp.exp(theta["clip"][0]), jnp.exp(theta["clip"][1])) if theta["clip"] else CLIP

    @override
    def prepare(self, theta: Theta, grads: Any, shared: Any, step: Any, extra: Any) -> Any:
        old, dtype = shared, shared.size.dtype
        loss = needed_loss("Hierarchical", extra.get("value"), dtype)
        count = (step + 1).astype(dtype)
        mean = TRAIN * old.mean + (1 - TRAIN) * loss
        square = TRAIN * old.square + (1 - TRAIN) * jnp.square(mean - loss)
        told = extra.get("validation_loss")
        said = old.last if told is None else jnp.asarray(told).astype(dtype)
        # A task repeats the last validation loss until it measures another.
        fresh = (said != old.last) | ((old.measured == 0) & (told is not None))
        measured = old.measured + fresh.astype(dtype)
        average = VALIDATION * old.validation + (1 - VALIDATION) * said
        average = jnp.where(fresh, average, old.validation)
        # It is zero, and so counts as very low, until the first one is told.
        validation = average / (1 - VALIDATION ** jnp.maximum(measured, 1))
        both, whole = jnp.stack([loss, validation]), 1 - TRAIN**count
        features = (both - mean / whole) * jax.lax.rsqrt(square / whole + 1e-8)
        decay, multiple = self._clip(theta)
        bound = multiple * old.size / (1 - decay**count)
        squares = [jnp.mean(jnp.square(jnp.clip(g, -bound, bound))) for g in grads]
        size = decay * old.size + (1 - decay) * jnp.sqrt(1e-8 + sum(squares) / len(grads))
        time = jnp.sin(step.astype(dtype) / (jnp.asarray(TIME_SCALES, dtype) * math.pi))
        told = {
            "bound": bound,
            "losses": jnp.clip(features, -5, 5),
            "across": old.across,
            "renews": step % PAST == 0,
            "common": jnp.append(time, math.log(len(grads)) - 1),
        }
        state = HierarchicalState(old.across, size, mean, square, average, measured, said)
        return told, state

    @override
    def share(self, control: Any, shared: HierarchicalState) -> HierarchicalState:
        return eqx.tree_at(lambda s: s.across, shared, jnp.mean(control["across"], -1))

    @override
    def observe(self, theta: Theta, grad: Tensor, own: Any, param: Tensor, told: Any) -> Any:
        grad = jnp.clip(grad, -told["bound"], told["bound"])
        (momentum, rms, message, *past), decays = own, jnp.asarray(DECAYS, param.dtype)
        momentum = accumulate(decays, momentum, grad)
        rms = accumulate(decays, rms, grad * grad)
        (m, m_spread), (v, v_spread), (p, p_spread) = map(_moments, (momentum, rms, param))
        shape = [math.log(length) - 1 for length in (*param.shape, 1, 1, 1, 1)[:4]]
        summary = [
            *(told["across"], message, clipped_log(_norm(grad))[None]),
            jnp.asarray([-1.0 if param.ndim else 1.0], param.dtype),
            jnp.stack([clipped_log(m), jnp.sign(m), clipped_log(v), jnp.sign(v)]),
            jnp.stack([clipped_log(p), jnp.sign(p), clipped_log(_norm(param))]),
            *(jnp.asarray(shape, param.dtype), told["losses"]),
            clipped_log(jnp.stack([m_spread, v_spread, p_spread])),
        ]
        return (grad, param, momentum, rms, *past), jnp.concatenate(summary)

    @override
    def act(self, theta: Theta, views: Any, control: Any, param: Tensor, told: Any) -> Any:
        norm = jnp.log(jnp.stack([_norm(param) + 1e-8, jnp.full_like(told["bound"], param.size)]))
        common = jnp.concatenate([told["common"], norm, control["down"]])
        most = self.largest_feature
        scale = DirectionMagnitude(self.exp_multiplier, self.step_multiplier)

        def columns(views: Any) -> tuple[Columns, ...]:
            grad, param, momentum, rms, *past = views
            root = jax.lax.rsqrt(rms + 1e-6)
            logarithm = jnp.log(jnp.abs(param) + 1e-8)
            first = (grad[None], param[None], logarithm[None])
            return *first, momentum, rms, momentum * root, root, *(old[None] for old in past)

        def rule(weights: Theta, common: Tensor, columns: Columns) -> tuple[Tensor, Columns]:
            columns = columns if most is None else jnp.clip(columns, -most, most)
            outputs, _ = self._rule().apply(weights, columns, common, ())
            return scale(outputs), jnp.sum(outputs[2:], range(1, outputs.ndim), keepdims=True)

        work = eqx.Partial(rule, theta["rule"], common)
        update, message = on_coordinates(columns, views, param, work)
        past = [jnp.where(told["renews"], param, old) for old in views[4:]]
        return update, (views[2], views[3], message.reshape(-1) / param.size, *past)


class NNAdam(AbstractController):
    """Adam with hyperparameters for each tensor that an LSTM moves.

    The step is l (1 + e) / (e + sqrt(v + 1e-10)) m, without bias correction: a large e makes it
    momentum, at the same l. The logarithms of l, 1 - b1, 1 - b2 and e over 10 are what is moved.

    Attributes:
        learning_rate: at the first step, as 0.9, 0.999 and 1e-8 of the others; learned.
        hidden: width of the LSTM.
        multiplier: of its output.
        decay: the fraction of the way back to the first hyperparameters, per step.
    """

    learning_rate: float = eqx.field(static=True, default=1e-4)
    hidden: int = eqx.field(static=True, default=32)
    multiplier: float = eqx.field(static=True, default=0.01)
    decay: float = eqx.field(static=True, default=0.0)

    @property
    @override
    def network(self) -> TensorLSTM:
        return TensorLSTM(19, self.hidden, (("change", 4),))

    @override
    def init(self, key: Key) -> Theta:
        network = self.network.init(key)
        network["change"] = jax.tree.map(jnp.zeros_like, network["change"])
        values = [self.learning_rate, 0.1, 0.001, 1e-8]
        return {"network": network, "initial": jnp.log(jnp.asarray(values, float)) / 10}

    @override
    def begin(self, theta: Theta, param: Tensor) -> State:
        zeros = jnp.zeros_like(param)
        return zeros, zeros, theta["initial"]

    @override
    def observe(self, theta: Theta, grad: Tensor, own: Any, param: Tensor, told: Any) -> Any:
        grad = jnp.clip(grad, -LARGEST, LARGEST)
        m, v, raw = own
        _, first, second, _ = jnp.exp(10 * raw)
        m, v = m + first * (grad - m), v + second * (grad * grad - v)
        (g, g_spread), (mean, spread), (p, p_spread) = map(_moments, (grad, m, param))
        size, size_spread = _moments(v)
        known = 0.2 * jnp.clip(raw, -5, 5)
        logs = clipped_log(jnp.stack([jnp.mean(jnp.abs(grad)), mean, p, size])) / 2
        spreads = jnp.stack([g_spread, spread, p_spread, size_spread])
        ranks = jnp.asarray([1.0 if param.ndim == n else -1.0 for n in (1, 0)], param.dtype)
        signs = jnp.sign(jnp.stack([mean, p, size]))
        summary = [
            *(known[1:4], ranks, known[:1], clipped_log(g)[None] / 2, jnp.sign(g)[None], logs[:1]),
            jnp.stack([logs[1:], signs], 1).reshape(-1),
            clipped_log(spreads) / 2,
        ]
        return (m, v, raw), jnp.concatenate(summary)

    @override
    def act(self, theta: Theta, views: Any, control: Any, param: Tensor, told: Any) -> Any:
        m, v, raw = views
        rate, _, _, eps = jnp.exp(10 * raw)
        update = -rate * (1 + eps) / (eps + jnp.sqrt(v + 1e-10)) * m
        new = raw + self.multiplier * control["change"]
        new = new + self.decay * (theta["initial"] - new)
        least, most = jnp.asarray(RANGES, raw.dtype)
        return update, (m, v, jnp.clip(new, least, most))


def _moments(array: Array) -> tuple[Scalar, Scalar]:
    """Returns mean and variance of all entries."""
    mean = jnp.mean(array)
    return mean, jnp.mean(jnp.square(array - mean))


def _norm(array: Array) -> Scalar:
    return with_safe_roots(jnp.sqrt)(jnp.sum(jnp.square(array)))
