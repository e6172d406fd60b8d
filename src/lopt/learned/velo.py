"""VeLO, and what it shares with Celo and Celo2: 30 features, and features of time and of the loss.

An LSTM per tensor mixes the weights of a small perceptron out of a bank of them.

Reference: Metz et al. 2022, arXiv:2211.09760.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.learned import AbstractFeatures, Columns, Tensor
from lopt.core.types import Key, NumSteps, Scalar, Theta
from lopt.learned.features import AdafactorFeatures, AdafactorState, AdafactorViews, check_decays
from lopt.learned.hypernetwork import (
    AbstractController,
    TensorLSTM,
    clipped_log,
    needed_loss,
    on_coordinates,
)
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.safe_roots import with_safe_roots

# The most that a gradient counts.
LARGEST = 1000.0
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


class VeLOFeatures(AbstractFeatures):
    """Gradient, clipped gradient, parameter, three momenta, RMS, factored moments and quotients.

    There are 30, in 14 groups, of gradients within +-1000; none is shared, and no decay is learned.

    Attributes:
        rms_decay: of the second moment.
        epsilon: what is added to it under a root.
        factored_vectors: whether tensors of rank < 2, which have no factors, have the second moment
            in the last five groups; otherwise they have zeros there, as in Celo2.
    """

    rms_decay: float = eqx.field(static=True, default=0.999)
    epsilon: float = eqx.field(static=True, default=1e-6)
    factored_vectors: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        check_decays("VeLOFeatures", (self.rms_decay,))

    def _inner(self) -> AdafactorFeatures:
        return AdafactorFeatures(rms_decays=(self.rms_decay,))

    @override
    def begin(self, param: Tensor) -> AdafactorState:
        return self._inner().begin(param)

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: AdafactorState, param: Tensor, step: Int[Array, ""]
    ) -> tuple[AdafactorViews, AdafactorState]:
        counts = {"adafactor_decays": 3, "momentum_decays": 3, "rms_decays": 1}
        initial = {name: jnp.zeros(count, grad.dtype) for name, count in counts.items()}
        grad = jnp.clip(grad, -LARGEST, LARGEST)
        views, new = self._inner().update(initial, grad, state, param, step)
        if grad.ndim < 2:
            # Without the 1e-6 of the Adafactor rule: zero over 1e-15 where no gradient ever was.
            root = with_safe_roots(jax.lax.rsqrt)(new.row)
            views = eqx.tree_at(lambda v: v.momentum_row_factor, views, root)
        return views, new

    @override
    def columns(self, views: AdafactorViews) -> tuple[Columns, ...]:
        by, grad = views, views.grad[None]
        inverse_root = jax.lax.rsqrt(views.rms + self.epsilon)
        factored: tuple[Columns, ...] = (
            by.row,
            by.col,
            jax.lax.rsqrt(by.row + 1e-8),
            jax.lax.rsqrt(by.col + 1e-8),
            views.momentum * (by.momentum_row_factor * by.col_factor),
        )
        if not self.factored_vectors and views.grad.ndim < 2:
            factored = (jnp.zeros_like(views.momentum),) * 5
        return (
            grad,
            jnp.clip(grad, -0.1, 0.1),
            views.param[None],
            views.momentum,
            views.rms,
            views.momentum * inverse_root,
            inverse_root,
            grad * (by.row_factor * by.col_factor),
            grad * inverse_root,
            *factored,
        )

    @override
    def names(self) -> tuple[str, ...]:
        own = self._inner().column_names()
        return (
            own[0],
            "clipped_gradient",
            *own[1:13],
            f"gradient_over_root_rms_{self.rms_decay:g}",
            *own[13:],
        )


class LossHistory(eqx.Module):
    """Exponential averages of the loss, ten of them, and the lowest value of each.

    Their half-lives are spread evenly in the logarithm, from 10 steps to the length of the run.
    """

    decays: Float[Array, "10"]
    means: Float[Array, "10"]
    lowest: Float[Array, "10"]
    num_steps: Scalar

    @classmethod
    def start(cls, num_steps: NumSteps, span: NumSteps, dtype: Any) -> "LossHistory":
        """Returns the history before a run of `num_steps`, with half-lives of up to `span`."""
        last = jnp.log10(jnp.asarray(span).astype(dtype))
        decays = jnp.exp(-(10 ** -jnp.linspace(jnp.ones((), dtype), last, 10, dtype=dtype)))
        zeros = jnp.zeros(10, dtype)
        return cls(decays, zeros, zeros + 1e12, jnp.asarray(num_steps).astype(dtype))

    def next(self, loss: Scalar, step: Int[Array, ""]) -> tuple[Float[Array, "18"], "LossHistory"]:
        """Returns nine features of time and nine of the loss, and the history with this loss."""
        weight = 1 - self.decays ** (step + 1).astype(loss.dtype)
        # A loss counts as at most twice the largest average.
        most = jnp.where(step == 0, loss, jnp.max(self.means / weight))
        loss = jnp.minimum(2 * jnp.abs(most), loss)
        means = self.decays * self.means + (1 - self.decays) * loss
        averages = means / weight
        lowest = jnp.minimum(self.lowest, averages)
        above, spread = averages[:-1] - lowest[:-1], averages[1:] - lowest[:-1]
        features = jnp.clip(above / jnp.maximum(1e-8, spread) - 1, -1, 1)
        features = jnp.where(step < 2, jnp.zeros_like(features), features)
        fraction = step.astype(loss.dtype) / self.num_steps
        time = jnp.tanh(10 * (fraction - jnp.asarray(FRACTIONS, loss.dtype)))
        new = LossHistory(self.decays, means, lowest, self.num_steps)
        return jnp.concatenate([time, features]), new


class VeLO(AbstractController):
    """An LSTM per tensor whose outputs are a mixture of perceptrons, and the size of the step.

    With the outputs c and s, weights are 100 <c_k W_k> over the bank W, and the update is
    -0.001 s sqrt(<p^2> + 1e-9) d exp(0.001 m), d and m being the perceptron's outputs.

    Theta is `{"network": ..., "bank": {"w0": (bank, 4, 30), ...}}`.

    Attributes:
        hidden: the width of the LSTM.
        bank: the number of perceptrons.
        centred: whether variances of the second moment are about its mean. Published weights have
            them about the means of the momenta.
        loss_span: the longest half-life of averages of the loss, in steps; None for the length of
            the run. It was 10 by mistake where early weights were trained.
        remembers: whether the LSTM has a memory. It had none, by mistake, in some early weights.
    """

    hidden: int = eqx.field(static=True, default=512)
    bank: int = eqx.field(static=True, default=256)
    centred: bool = eqx.field(static=True, default=False)
    loss_span: int | None = eqx.field(static=True, default=None)
    remembers: bool = eqx.field(static=True, default=True)
    needs_num_steps: ClassVar[bool] = True

    def __check_init__(self) -> None:
        check_integer("VeLO", "hidden", self.hidden)
        check_integer("VeLO", "bank", self.bank)
        if self.loss_span is not None:
            check_integer("VeLO", "loss_span", self.loss_span, hint=10)

    @property
    @override
    def network(self) -> TensorLSTM:
        heads = (("mixture", self.bank), ("step", 1))
        inputs = 28 if self.centred else 30
        return TensorLSTM(inputs, self.hidden, heads, mix=True, remembers=self.remembers)

    @override
    def init(self, key: Key) -> Theta:
        own, bank = jax.random.split(key)
        bank = jax.vmap(MLP(30, (4, 4), 3).init)(jax.random.split(bank, self.bank))
        return {"network": self.network.init(own), "bank": bank}

    @override
    def begin(self, theta: Theta, param: Tensor) -> AdafactorState:
        if sum(size > 1 for size in param.shape) > 4:
            raise ValueError(
                f"VeLO was given a tensor of shape {param.shape}, but knows at most four axes "
                "longer than 1; reshape it."
            )
        return VeLOFeatures().begin(param)

    @override
    def start(self, theta: Theta, num_steps: NumSteps, dtype: Any) -> LossHistory:
        return LossHistory.start(num_steps, self.loss_span or num_steps, dtype)

    @override
    def prepare(self, theta: Theta, grads: Any, shared: Any, step: Any, extra: Any) -> Any:
        return shared.next(needed_loss("VeLO", extra.get("value"), shared.means.dtype), step)

    @override
    def observe(self, theta: Theta, grad: Tensor, own: Any, param: Tensor, told: Any) -> Any:
        # Summaries are of the moments before this step.
        scale = jax.lax.rsqrt(jnp.maximum(jnp.mean(jnp.square(param)), 1e-9))
        axes = tuple(range(1, param.ndim + 1))
        momentum, rms = own.momentum * scale, own.rms * scale
        mean, size = (jnp.mean(bank, axes, keepdims=True) for bank in (momentum, rms))
        spread = jnp.mean(jnp.square(momentum - mean), axes)
        # Published weights have this about the means of momenta, by mistake.
        spread_rms = jnp.mean(jnp.square(rms - (size if self.centred else mean)), axes)
        long = jnp.asarray(sum(length > 1 for length in param.shape))
        logs = [0.5 * clipped_log(10 * x) for x in (size.reshape(1), spread, spread_rms)]
        rank = jax.nn.one_hot(long, 5, dtype=param.dtype)
        step = jnp.zeros((), jnp.int32)  # no feature depends on it
        views = VeLOFeatures().update((), grad, own, param, step)
        return views, jnp.concatenate([told, logs[0], rank, *logs[1:]])

    @override
    def act(self, theta: Theta, views: Any, control: Any, param: Tensor, told: Any) -> Any:
        mixture, view = 100 * control["mixture"] / self.bank, views[0]
        weights = jax.tree.map(lambda bank: jnp.tensordot(mixture, bank, 1), theta["bank"])

        def rule(weights: Theta, columns: Columns) -> Tensor:
            shared = jnp.zeros((0,), columns.dtype)
            return DirectionMagnitude()(MLP(30, (4, 4), 3).apply(weights, columns, shared, ())[0])

        work = eqx.Partial(rule, weights)
        update = on_coordinates(VeLOFeatures().columns, view, param, work)
        return control["step"][0] * root_mean_square(param) * update, views[1]


def root_mean_square(param: Tensor) -> Scalar:
    """Returns the square root of 1e-9 and the mean square of a tensor."""
    return jnp.sqrt(jnp.mean(jnp.square(param)) + 1e-9)
