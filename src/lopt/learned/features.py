"""Features: what a learned rule sees of a tensor's coordinates.

The momentum bank of Metz et al. 2019 (arXiv:1810.10180) and the momentum, second-moment and
factored (Adafactor) banks of Metz et al. 2022 (arXiv:2203.11860). Banks hold several decays on a
new leading axis, start at zero and have no bias correction.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.learned import AbstractFeatures, Columns, Tensor
from lopt.core.types import Key, State, Theta

TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)

Bank = Float[Array, "_decay ..."]
Decays = Float[Array, " decay"]


def time_embedding(step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
    """Returns tanh(step / s - 1) for s = 1, 3, 10, ..., 100,000."""
    return jnp.tanh(step.astype(dtype) / jnp.asarray(TIME_SCALES, dtype) - 1)


def accumulate(decays: Decays, bank: Bank, value: Tensor) -> Bank:
    """Returns decay * bank + (1 - decay) * value for each decay."""
    decays = decays.reshape(-1, *(1,) * value.ndim)
    return decays * bank + (1 - decays) * value[None]


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns (d1, d0), the second largest and the largest axis; None below rank 2.

    Of axes of equal size the later one counts as larger (Shazeer & Stern 2018, arXiv:1804.04235).
    """
    if len(shape) < 2:
        return None
    second, largest = sorted(range(len(shape)), key=shape.__getitem__)[-2:]
    return second, largest


class MomentumViews(eqx.Module):
    """Gradient, parameter and momenta of one tensor."""

    grad: Tensor
    param: Tensor
    momentum: Bank


class MomentumFeatures(AbstractFeatures):
    """Gradient, parameter and a bank of momenta; shared are 11 of time.

    Attributes:
        decays: of the momenta.

    Reference: Metz et al. 2019, arXiv:1810.10180.
    """

    decays: tuple[float, ...] = eqx.field(static=True, default=(0.1, 0.5, 0.9, 0.99, 0.999, 0.9999))

    def __check_init__(self) -> None:
        _check_decays("MomentumFeatures", self.decays)

    def init(self, key: Key) -> Theta:
        """Returns no weights."""
        return ()

    def begin(self, param: Tensor) -> Bank:
        """Returns a bank of zeros."""
        return jnp.zeros((len(self.decays), *param.shape), param.dtype)

    def update(
        self, theta: Theta, grad: Tensor, state: State, param: Tensor
    ) -> tuple[MomentumViews, Bank]:
        """Adds the gradient to each momentum."""
        momentum = accumulate(jnp.asarray(self.decays, grad.dtype), state, grad)
        return MomentumViews(grad, param, momentum), momentum

    def columns(self, views: MomentumViews) -> tuple[Columns, ...]:
        """Returns gradient, parameter, momenta."""
        return views.grad[None], views.param[None], views.momentum

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
        """Returns the time embedding."""
        return time_embedding(step, dtype)


class AdafactorState(eqx.Module):
    """Accumulators of one tensor. Below rank 2 `row` holds full second moments."""

    momentum: Bank
    rms: Bank
    row: Bank
    col: Bank | None


class AdafactorViews(eqx.Module):
    """What the 28 columns of one tensor are computed from."""

    grad: Tensor
    param: Tensor
    momentum: Bank
    rms: Bank
    row: Bank
    col: Bank
    precondition: Bank | tuple[Bank, Bank]


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
            _check_decays("AdafactorFeatures", decays)
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

    def init(self, key: Key) -> Theta:
        """Returns zeros: the decays as configured."""
        return {
            "adafactor_decays": jnp.zeros(len(self.adafactor_decays)),
            "momentum_decays": jnp.zeros(len(self.momentum_decays)),
            "rms_decays": jnp.zeros(len(self.rms_decays)),
        }

    def begin(self, param: Tensor) -> AdafactorState:
        """Returns zeros."""

        def bank(count: int, shape: tuple[int, ...]) -> Bank:
            return jnp.zeros((count, *shape), param.dtype)

        momentum = bank(len(self.momentum_decays), param.shape)
        rms = bank(len(self.rms_decays), param.shape)
        axes, count = factored_axes(param.shape), len(self.adafactor_decays)
        if axes is None:
            return AdafactorState(momentum, rms, row=bank(count, param.shape), col=None)
        row, col = (bank(count, _without(param.shape, axis)) for axis in reversed(axes))
        return AdafactorState(momentum, rms, row, col)

    def update(
        self,
        theta: Theta,
        grad: Tensor,
        state: AdafactorState,
        param: Tensor,
    ) -> tuple[AdafactorViews, AdafactorState]:
        """Adds the gradient to each accumulator."""
        decays = {name: _decays(getattr(self, name), shift) for name, shift in theta.items()}
        momentum = accumulate(decays["momentum_decays"], state.momentum, grad)
        rms = accumulate(jnp.clip(decays["rms_decays"], 0, 1), state.rms, grad * grad)
        factored = jnp.clip(decays["adafactor_decays"], 0, 1)
        # 1e-30 keeps what is never touched away from zero over zero.
        square, axes = grad * grad + 1e-30, factored_axes(grad.shape)
        if axes is None:
            row, col = accumulate(factored, state.row, square), state.col
            tiled_row = tiled_col = row
            precondition: Bank | tuple[Bank, Bank] = row
        else:
            second, largest = axes
            row = accumulate(factored, state.row, jnp.mean(square, largest))
            assert state.col is not None  # as `begin` made it
            col = accumulate(factored, state.col, jnp.mean(square, second))
            # Banks have the decays in front, and `row` lacks the largest axis.
            second_in_row = 1 + second - (second > largest)
            relative = row / (jnp.mean(row, second_in_row, keepdims=True) + 1e-9)
            tiled_row = jnp.expand_dims(row, 1 + largest)
            tiled_col = jnp.expand_dims(col, 1 + second)
            precondition = (
                jnp.expand_dims(_floored_rsqrt(relative), 1 + largest),
                _floored_rsqrt(tiled_col),
            )
        views = AdafactorViews(grad, param, momentum, rms, tiled_row, tiled_col, precondition)
        return views, AdafactorState(momentum, rms, row, col)

    def columns(self, views: AdafactorViews) -> tuple[Columns, ...]:
        """Returns the columns in the order of the published design."""
        if isinstance(views.precondition, tuple):
            row_factor, col_factor = views.precondition
            factor = momentum_factor = row_factor * col_factor
        else:
            factor = _floored_rsqrt(views.precondition + 1e-9)
            momentum_factor = jax.lax.rsqrt(views.precondition + 1e-6)
        inverse_root = jax.lax.rsqrt(views.rms + 1e-6)
        return (
            views.grad[None],
            views.param[None],
            views.momentum,
            views.rms,
            views.momentum * inverse_root,
            inverse_root,
            views.grad[None] * factor,
            views.row,
            views.col,
            jax.lax.rsqrt(views.row + 1e-8),
            jax.lax.rsqrt(views.col + 1e-8),
            views.momentum * momentum_factor,
        )

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
        """Returns the time embedding."""
        return time_embedding(step, dtype)


def _check_decays(name: str, decays: tuple[float, ...]) -> None:
    for decay in decays:
        if not 0 <= decay < 1:
            raise ValueError(f"{name}: the decay {decay} must be at least 0 and below 1; try 0.9.")


def _decays(initial: tuple[float, ...], shift: Decays) -> Decays:
    logs = [math.log(1 - decay) / 10 for decay in initial]
    return 1 - jnp.exp(10 * (jnp.asarray(logs, shift.dtype) + shift))


def _floored_rsqrt(x: Bank) -> Bank:
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
