"""Features: the inputs of a learned rule for each coordinate of a tensor.

The momentum bank of Metz et al. 2019 (arXiv:1810.10180) and the momentum, second-moment and
factored (Adafactor) banks of Metz et al. 2022 (arXiv:2203.11860). Banks hold several decays on a
new leading axis, start at zero and have no bias correction.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.learned import AbstractFeatures, Columns, Tensor
from lopt.core.types import Key, Theta

TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
TIME_NAMES = tuple(f"time_{scale}" for scale in TIME_SCALES)

Bank = Float[Array, "_decay ..."]
Decays = Float[Array, " decay"]


def time_embedding(step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
    """Returns tanh(step / s - 1) for s = 1, 3, 10, ..., 100,000."""
    return jnp.tanh(step.astype(dtype) / jnp.asarray(TIME_SCALES, dtype) - 1)


def accumulate(decays: Decays, bank: Bank, value: Tensor) -> Bank:
    """Returns decay * bank + (1 - decay) * value for each decay.

    The form with one product has a shorter derivative and compiles faster.
    """
    decays = decays.reshape(-1, *(1,) * value.ndim)
    return bank + (1 - decays) * (value[None] - bank)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns (d1, d0), the second largest and the largest axis; None below rank 2.

    Of axes of equal size the later one counts as larger (Shazeer & Stern 2018, arXiv:1804.04235).
    """
    if len(shape) < 2:
        return None
    second, largest = sorted(range(len(shape)), key=shape.__getitem__)[-2:]
    return second, largest


class MomentumFeatures(AbstractFeatures):
    """Gradient, parameter and a bank of momenta; shared are 11 of time.

    Attributes:
        decays: of the momenta.

    Reference: Metz et al. 2019, arXiv:1810.10180.
    """

    decays: tuple[float, ...] = eqx.field(static=True, default=(0.1, 0.5, 0.9, 0.99, 0.999, 0.9999))

    def __check_init__(self) -> None:
        check_decays("MomentumFeatures", self.decays)

    @override
    def begin(self, param: Tensor) -> Bank:
        return _bank(len(self.decays), param)

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: Bank, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Any, Bank]:
        momentum = accumulate(jnp.asarray(self.decays, grad.dtype), state, grad)
        return (grad[None], param[None], momentum), momentum

    @override
    def names(self) -> tuple[str, ...]:
        return ("gradient", "parameter", *_named("momentum", self.decays), *TIME_NAMES)

    @override
    def select(self, names: tuple[str, ...]) -> "MomentumFeatures":
        return MomentumFeatures(tuple(d for d in self.decays if f"momentum_{d:g}" in names))

    @override
    def columns(self, views: tuple[Columns, ...]) -> tuple[Columns, ...]:
        return views

    @override
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
        return time_embedding(step, dtype)


class AdafactorState(eqx.Module):
    """Accumulators of a tensor.

    Attributes:
        momentum, rms: of all coordinates.
        row: second moments, averaged over the largest axis; full ones below rank 2.
        col: second moments averaged over the second largest axis; zeros below rank 2.
    """

    momentum: Bank
    rms: Bank
    row: Bank
    col: Bank


class AdafactorViews(eqx.Module):
    """What the 28 columns are computed from; all broadcasts to the coordinates.

    Gradients are multiplied by row_factor * col_factor, momenta by
    momentum_row_factor * col_factor.
    """

    grad: Tensor
    param: Tensor
    momentum: Bank
    rms: Bank
    row: Bank
    col: Bank
    row_factor: Bank
    momentum_row_factor: Bank
    col_factor: Bank


class AdafactorFeatures(AbstractFeatures):
    """Momentum, RMS, factored second moments and quotients: 28 columns, and 11 shared of time.

    The decays are learned: decay = 1 - exp(10 (log(1 - initial) / 10 + theta)), theta starting
    at zero; the factor 10 lets a meta-step of fixed size move a decay further.

    Attributes:
        momentum_decays, rms_decays, adafactor_decays: initial decays; momenta and factored
            moments are paired, so there are as many of the one as of the other. Momenta are
            divided by the root of their own second moment, or all by that of the only one.

    Reference: Metz et al. 2022, arXiv:2203.11860, `small_fc_lopt`.
    """

    momentum_decays: tuple[float, ...] = eqx.field(static=True, default=(0.9, 0.99, 0.999))
    rms_decays: tuple[float, ...] = eqx.field(static=True, default=(0.999,))
    adafactor_decays: tuple[float, ...] = eqx.field(static=True, default=(0.9, 0.99, 0.999))

    def __check_init__(self) -> None:
        for decays in (self.momentum_decays, self.rms_decays, self.adafactor_decays):
            check_decays("AdafactorFeatures", decays)
        if len(self.momentum_decays) != len(self.adafactor_decays):
            raise ValueError(
                f"AdafactorFeatures(momentum_decays={self.momentum_decays}, "
                f"adafactor_decays={self.adafactor_decays}) must be equally many."
            )
        if len(self.rms_decays) not in (1, len(self.momentum_decays)):
            raise ValueError(
                f"AdafactorFeatures(rms_decays={self.rms_decays}) must be one decay, or one for "
                f"each of momentum_decays={self.momentum_decays}."
            )

    @override
    def init(self, key: Key) -> Theta:
        names = ("adafactor_decays", "momentum_decays", "rms_decays")
        return {name: jnp.zeros(len(getattr(self, name))) for name in names}

    @override
    def begin(self, param: Tensor) -> AdafactorState:
        count = len(self.adafactor_decays)
        row, col = (_bank(count, part) for part in _row_and_column_means(jnp.zeros_like(param)))
        return AdafactorState(
            _bank(len(self.momentum_decays), param), _bank(len(self.rms_decays), param), row, col
        )

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: AdafactorState, param: Tensor, step: Int[Array, ""]
    ) -> tuple[AdafactorViews, AdafactorState]:
        first, rms_decays, second = self._decays(theta)
        momentum = accumulate(first, state.momentum, grad)
        rms = accumulate(rms_decays, state.rms, grad * grad)
        # 1e-30 keeps what is never touched away from zero over zero.
        row, col = _row_and_column_means(grad * grad + 1e-30)
        row = accumulate(second, state.row, row)
        col = state.col if grad.ndim < 2 else accumulate(second, state.col, col)
        new = AdafactorState(momentum, rms, row, col)
        by = _preconditioner(new.row, new.col, grad.shape)
        return AdafactorViews(grad, param, momentum, rms, *by), new

    def _decays(self, theta: Theta) -> list[Decays]:
        """Returns those of momenta, which may be negative, of the RMS and of factored moments."""
        initial = (self.momentum_decays, self.rms_decays, self.adafactor_decays)
        shifts = [theta[name] for name in ("momentum_decays", "rms_decays", "adafactor_decays")]
        logs = [math.log(1 - decay) / 10 for decays in initial for decay in decays]
        shift = jnp.concatenate(shifts)
        decays = 1 - jnp.exp(10 * (jnp.asarray(logs, shift.dtype) + shift))
        lowest = [-math.inf] * len(self.momentum_decays) + [0.0] * (len(logs) - len(initial[0]))
        ends = np.cumsum([len(decays) for decays in initial])[:-1]
        return jnp.split(jnp.maximum(decays, jnp.asarray(lowest, decays.dtype)), ends)

    @override
    def names(self) -> tuple[str, ...]:
        first, second = self.momentum_decays, self.adafactor_decays
        return (
            "gradient",
            "parameter",
            *_named("momentum", first),
            *_named("rms", self.rms_decays),
            *_named("momentum_over_root_rms", first),
            *_named("inverse_root_rms", self.rms_decays),
            *_named("factored_gradient", second),
            *_named("row", second),
            *_named("column", second),
            *_named("inverse_root_row", second),
            *_named("inverse_root_column", second),
            *_named("factored_momentum", first),
            *TIME_NAMES,
        )

    @override
    def columns(self, views: AdafactorViews) -> tuple[Columns, ...]:
        by, inverse_root = views, jax.lax.rsqrt(views.rms + 1e-6)
        return (
            views.grad[None],
            views.param[None],
            views.momentum,
            views.rms,
            views.momentum * inverse_root,
            inverse_root,
            views.grad[None] * (by.row_factor * by.col_factor),
            by.row,
            by.col,
            jax.lax.rsqrt(by.row + 1e-8),
            jax.lax.rsqrt(by.col + 1e-8),
            views.momentum * (by.momentum_row_factor * by.col_factor),
        )

    @override
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
        return time_embedding(step, dtype)


def _named(name: str, decays: tuple[float, ...]) -> tuple[str, ...]:
    return tuple(f"{name}_{decay:g}" for decay in decays)


def check_decays(name: str, decays: tuple[float, ...]) -> None:
    """Refuses decays outside of [0, 1)."""
    for decay in decays:
        if not 0 <= decay < 1:
            raise ValueError(f"{name}: the decay {decay} must be at least 0 and below 1; try 0.9.")


def _bank(count: int, tensor: Tensor) -> Bank:
    # Made of the tensor, so that it lies on devices as that does.
    return jnp.broadcast_to(jnp.zeros_like(tensor)[None], (count, *tensor.shape))


def _row_and_column_means(tensor: Tensor) -> tuple[Tensor, Tensor]:
    axes = factored_axes(tensor.shape)
    if axes is None:
        return tensor, tensor
    second, largest = axes
    return jnp.mean(tensor, largest), jnp.mean(tensor, second)


def _preconditioner(row: Bank, col: Bank, shape: tuple[int, ...]) -> tuple[Bank, ...]:
    """Returns the last five views."""
    axes = factored_axes(shape)
    if axes is None:
        one = jnp.ones((len(row), *(1,) * len(shape)), row.dtype)
        return row, row, _floored_rsqrt(row + 1e-9), jax.lax.rsqrt(row + 1e-6), one
    # Banks have the decays in front, and `row` lacks the largest axis.
    second, largest = axes
    relative = row / (jnp.mean(row, 1 + second - (second > largest), keepdims=True) + 1e-9)
    row, row_factor = (jnp.expand_dims(x, 1 + largest) for x in (row, _floored_rsqrt(relative)))
    col = jnp.expand_dims(col, 1 + second)
    return row, col, row_factor, row_factor, _floored_rsqrt(col)


def _floored_rsqrt(x: Bank) -> Bank:
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))
