"""Features: what a learned rule sees of a tensor's coordinates.

The momentum bank of Metz et al. 2019 (arXiv:1810.10180) and the momentum, second-moment and
factored (Adafactor) banks of Metz et al. 2022 (arXiv:2203.11860). Banks hold several decays on a
new leading axis, start at zero and have no bias correction.
"""

import math
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt.core.groups import join, split
from lopt.core.learned import AbstractFeatures, Columns, Tensor, Tensors
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

    Written with one product, which differs in rounding only, and least for decays close to one: its
    derivative is shorter, and so is its compilation.
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


class MomentumViews(eqx.Module):
    """Gradient, parameter and momenta."""

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

    def begin(self, params: Tensors) -> Bank:
        """Returns a bank of zeros."""
        return _bank(len(self.decays), join(params))

    def update(
        self, theta: Theta, grads: Tensors, state: Bank, params: Tensors, step: Int[Array, ""]
    ) -> tuple[MomentumViews, Bank]:
        """Adds the gradient to each momentum."""
        grad = join(grads)
        momentum = accumulate(jnp.asarray(self.decays, grad.dtype), state, grad)
        return MomentumViews(grad, join(params), momentum), momentum

    def names(self) -> tuple[str, ...]:
        """Returns "gradient", "parameter", "momentum_0.1", ..., "time_1", ...."""
        return ("gradient", "parameter", *_named("momentum", self.decays), *TIME_NAMES)

    def select(self, names: tuple[str, ...]) -> "MomentumFeatures":
        """Returns features with those momenta only."""
        return MomentumFeatures(tuple(d for d in self.decays if f"momentum_{d:g}" in names))

    def columns(self, views: MomentumViews) -> tuple[Columns, ...]:
        """Returns gradient, parameter, momenta."""
        return views.grad[None], views.param[None], views.momentum

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
        """Returns the time embedding."""
        return time_embedding(step, dtype)


class AdafactorState(eqx.Module):
    """Accumulators of a group of tensors.

    Attributes:
        momentum, rms: of all coordinates.
        row: second moments, full ones of tensors of rank 1, of others averaged over the largest
            axis; end to end.
        col: second moments averaged over the second largest axis; None if all are of rank 1.
    """

    momentum: Bank
    rms: Bank
    row: Bank
    col: Bank | None


class Preconditioner(eqx.Module):
    """What tells the scales of gradients apart; broadcasts to the coordinates.

    Gradients are multiplied by row_factor * col_factor, momenta by
    momentum_row_factor * col_factor.
    """

    row: Bank
    col: Bank
    row_factor: Bank
    momentum_row_factor: Bank
    col_factor: Bank


class AdafactorViews(eqx.Module):
    """What the 28 columns are computed from."""

    grad: Tensor
    param: Tensor
    momentum: Bank
    rms: Bank
    preconditioner: Preconditioner


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

    def begin(self, params: Tensors) -> AdafactorState:
        """Returns zeros."""
        param, count = join(params), len(self.adafactor_decays)
        rows, cols = _row_and_column_means(_merge_vectors(params))
        return AdafactorState(
            _bank(len(self.momentum_decays), param),
            _bank(len(self.rms_decays), param),
            _bank(count, join(rows)),
            _bank(count, join(cols)) if cols else None,
        )

    def update(
        self,
        theta: Theta,
        grads: Tensors,
        state: AdafactorState,
        params: Tensors,
        step: Int[Array, ""],
    ) -> tuple[AdafactorViews, AdafactorState]:
        """Adds the gradient to each accumulator."""
        grad, (first, rms_decays, second) = join(grads), self._decays(theta)
        momentum = accumulate(first, state.momentum, grad)
        rms = accumulate(rms_decays, state.rms, grad * grad)

        # 1e-30 keeps what is never touched away from zero over zero.
        squares = [tensor * tensor + 1e-30 for tensor in _merge_vectors(grads)]
        rows, cols = _row_and_column_means(squares)
        row = accumulate(second, state.row, join(rows))
        col = None if state.col is None else accumulate(second, state.col, join(cols))
        new = AdafactorState(momentum, rms, row, col)
        views = AdafactorViews(
            grad, join(params), momentum, rms, _preconditioner(squares, new, rows, cols)
        )
        return views, new

    def _decays(self, theta: Theta) -> list[Decays]:
        """Returns those of momenta, which may be negative, of the RMS and of factored moments."""
        initial = (self.momentum_decays, self.rms_decays, self.adafactor_decays)
        shifts = [theta[name] for name in ("momentum_decays", "rms_decays", "adafactor_decays")]
        logs = [math.log(1 - decay) / 10 for decays in initial for decay in decays]
        shift = join(shifts)
        decays = 1 - jnp.exp(10 * (jnp.asarray(logs, shift.dtype) + shift))
        lowest = [-math.inf] * len(self.momentum_decays) + [0.0] * (len(logs) - len(initial[0]))
        return split(jnp.maximum(decays, jnp.asarray(lowest, decays.dtype)), shifts)

    def names(self) -> tuple[str, ...]:
        """Returns the names of the columns, with their initial decays, and of time."""
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

    def columns(self, views: AdafactorViews) -> tuple[Columns, ...]:
        """Returns the columns in the order of the published design."""
        by, inverse_root = views.preconditioner, jax.lax.rsqrt(views.rms + 1e-6)
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

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "11"]:
        """Returns the time embedding."""
        return time_embedding(step, dtype)


def _named(name: str, decays: tuple[float, ...]) -> tuple[str, ...]:
    return tuple(f"{name}_{decay:g}" for decay in decays)


def _check_decays(name: str, decays: tuple[float, ...]) -> None:
    for decay in decays:
        if not 0 <= decay < 1:
            raise ValueError(f"{name}: the decay {decay} must be at least 0 and below 1; try 0.9.")


def _bank(count: int, tensor: Tensor) -> Bank:
    return jnp.zeros((count, *tensor.shape), tensor.dtype)


def _merge_vectors(tensors: Tensors) -> list[Tensor]:
    """Returns all tensors of rank 1 as one, which they are to features, and the others."""
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    others = [tensor for tensor in tensors if tensor.ndim > 1]
    return [join(vectors), *others] if vectors else others


def _row_and_column_means(tensors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    rows, cols = [], []
    for tensor in tensors:
        if axes := factored_axes(tensor.shape):
            second, largest = axes
            rows.append(jnp.mean(tensor, largest))
            cols.append(jnp.mean(tensor, second))
        else:
            rows.append(tensor)
    return rows, cols


def _preconditioner(
    tensors: Tensors, state: AdafactorState, rows: Tensors, cols: Tensors
) -> Preconditioner:
    parts: list[Preconditioner] = []
    columns: Iterator[tuple[Bank, Bank]] = iter(())
    if state.col is not None:
        columns = zip(split(state.col, cols), split(_floored_rsqrt(state.col), cols), strict=True)
    for tensor, row in zip(tensors, split(state.row, rows), strict=True):
        axes = factored_axes(tensor.shape)
        if axes is None:
            factor, momentum_factor = _floored_rsqrt(row + 1e-9), jax.lax.rsqrt(row + 1e-6)
            one = jnp.ones((len(row), 1), row.dtype)
            parts.append(Preconditioner(row, row, factor, momentum_factor, one))
            continue
        # Banks have the decays in front, and `row` lacks the largest axis.
        second, largest = axes
        second_in_row = 1 + second - (second > largest)
        relative = row / (jnp.mean(row, second_in_row, keepdims=True) + 1e-9)
        row_factor = jnp.expand_dims(_floored_rsqrt(relative), 1 + largest)
        row = jnp.expand_dims(row, 1 + largest)
        col, col_factor = (jnp.expand_dims(bank, 1 + second) for bank in next(columns))
        parts.append(Preconditioner(row, col, row_factor, row_factor, col_factor))
    return jax.tree.map(lambda *banks: join(banks, like=tensors), *parts)


def _floored_rsqrt(x: Bank) -> Bank:
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))
