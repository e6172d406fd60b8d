"""Features of the coordinatewise LSTM optimizers: gradients and their bias-corrected moments.

RNNProp feeds its network the gradient and its momentum, both over the root of the second moment
(Lv et al. 2017, arXiv:1703.03633); Zheng et al. 2022 (arXiv:2203.06578) choose among more. The
logarithm and sign of the gradient are the input of Andrychowicz et al. 2016 (arXiv:1606.04474).
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.learned import AbstractFeatures, Columns, Tensor
from lopt.core.types import State, Theta
from lopt.learned.features import check_decays

NUMBER = r"[0-9]*\.?[0-9]+(?:e-?[0-9]+)?"
PUBLISHED = {
    "mt": "m_normalised",
    "gt": "g_normalised",
    "g": "gradient",
    "t": "time",
    "AdamUp_unNorm": "m",
    "AdamUp_Norm": "m_corrected",
    "AdamDn_Norm": "root_v",
}


class _Average(NamedTuple):
    """An exponential average of |g|^power, or without a power of g."""

    name: str
    decay: float
    power: float | None = None

    def next(self, old: Columns, grad: Tensor) -> Columns:
        value = grad
        if self.power is not None:
            value = grad * grad if self.power == 2 else jnp.abs(grad) ** self.power
        return old + (1 - self.decay) * (value[None] - old)


class _Views(eqx.Module):
    """What columns are computed from; `time` is the number of steps, this one included."""

    grad: Tensor
    param: Tensor | tuple[()]
    averages: dict[str, Tensor]
    time: Float[Array, ""]

    def corrected(self, average: _Average) -> Tensor:
        return self.averages[average.name] / (1 - average.decay**self.time)

    def root(self, average: _Average, epsilon: float) -> Tensor:
        assert average.power is not None
        return _root(self.corrected(average), 1 / average.power) + epsilon


class _Feature(NamedTuple):
    """What the name of a feature stands for; coordinates have a column, or share a value."""

    averages: tuple[_Average, ...]
    column: Callable[[_Views], Any] | None
    shared: Callable[[Float[Array, ""]], Float[Array, ""]] | None = None


def _feature(name: str, momentum_decay: float = 0.95, rms_decay: float = 0.95) -> _Feature:
    """Returns the feature of that name, or refuses the name."""
    m, v = _Average("m", momentum_decay), _Average("v", rms_decay, 2.0)
    plain = {
        "gradient": _Feature((), lambda views: views.grad),
        "parameter": _Feature((), lambda views: views.param),
        "m": _Feature((m,), lambda views: views.averages["m"]),
        "v": _Feature((v,), lambda views: views.averages["v"]),
        "m_corrected": _Feature((m,), lambda views: views.corrected(m)),
        "root_v": _Feature((v,), lambda views: views.root(v, 1e-12)),
        "m_normalised": _Feature((m, v), lambda views: views.corrected(m) / views.root(v, 1e-12)),
        "g_normalised": _Feature((v,), lambda views: views.grad / views.root(v, 1e-12)),
        "time": _Feature((), None, lambda time: time / 1000),
    }
    if name in plain:
        return plain[name]
    found = re.fullmatch(f"(momentum|warmup|m_over_root)_({NUMBER})(_normalised)?", name)
    kind, text, normalised = found.groups() if found else ("", "-1", None)
    number = float(text)
    if kind == "momentum" and number < 1:
        own = _Average(f"momentum_{text}", number)
        if normalised:
            return _Feature((own, v), lambda views: views.corrected(own) / views.root(v, 1e-12))
        return _Feature((own,), lambda views: views.averages[own.name])
    if kind == "m_over_root" and not normalised and 1 <= number < 100:
        root = _Average(f"root_{text}", rms_decay, number)
        return _Feature((m, root), lambda views: views.corrected(m) / views.root(root, 1e-8))
    if kind == "warmup" and not normalised and number < 1:
        return _Feature((), None, lambda time: 1 - number**time)
    raise ValueError(
        f"There is no feature {name!r}; known are {', '.join(plain)}, momentum_0.9 and warmup_0.9 "
        "or with another decay, m_over_root_3 or with another power, and mt, gt, g, mom5, ...."
    )


class MomentFeatures(AbstractFeatures):
    """A choice of the gradient, its moments and quotients of them.

    With m and v the exponential averages of g and g^2, m^ = m / (1 - decay^t) and
    v^ = v / (1 - decay^t), features are named:

    - gradient, parameter, m, v: as they are;
    - m_corrected: m^; root_v: s = sqrt(v^) + 1e-12;
    - m_normalised: m^ / s; g_normalised: g / s;
    - momentum_D: the exponential average of g with decay D, such as momentum_0.9;
    - momentum_D_normalised: that over 1 - D^t, divided by s;
    - m_over_root_P: m^ / ((v_P / (1 - decay^t))^(1/P) + 1e-8) with v_P that of |g|^P;
    - time: t / 1000; warmup_D: 1 - D^t, what an average that begins at zero has of what it
      averages. These are the same for all coordinates, and come last.

    Only the accumulators that the chosen features need are kept.

    Attributes:
        chosen: names of features, or the published ones of RNNProp: mt, gt, g, mom5, mom9, mom99,
            t, AdamUp_unNorm, AdamUp_Norm, AdamDn_Norm.
        momentum_decay, rms_decay: of m and of v.
        first_order: whether gradients count as constants when training is differentiated.
    """

    chosen: tuple[str, ...] = eqx.field(
        static=True, default=("m_normalised", "g_normalised"), converter=lambda c: expand_names(c)
    )
    momentum_decay: float = eqx.field(static=True, default=0.95)
    rms_decay: float = eqx.field(static=True, default=0.95)
    first_order: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        check_decays("MomentFeatures", (self.momentum_decay, self.rms_decay))
        if not self.chosen or len(set(self.chosen)) < len(self.chosen):
            raise ValueError(f"MomentFeatures(chosen={self.chosen}) must be different names.")

    def _features(self) -> dict[str, _Feature]:
        return {n: _feature(n, self.momentum_decay, self.rms_decay) for n in self.chosen}

    def _averages(self) -> dict[str, _Average]:
        return {a.name: a for feature in self._features().values() for a in feature.averages}

    @override
    def begin(self, param: Tensor) -> dict[str, Columns]:
        return dict.fromkeys(sorted(self._averages()), jnp.zeros_like(param)[None])

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: Any, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Any, dict[str, Columns]]:
        grad = jax.lax.stop_gradient(grad) if self.first_order else grad
        averages = self._averages()
        new = {name: averages[name].next(old, grad) for name, old in state.items()}
        moments = {name: bank[0] for name, bank in new.items()}
        time = (step + 1).astype(grad.dtype)
        return _Views(grad, param if "parameter" in self.chosen else (), moments, time), new

    @override
    def columns(self, views: Any) -> tuple[Columns, ...]:
        makers = [feature.column for feature in self._features().values()]
        return tuple(make(views)[None] for make in makers if make is not None)

    @override
    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        time = (step + 1).astype(dtype)
        makers = [feature.shared for feature in self._features().values()]
        values = [make(time) for make in makers if make is not None]
        return jnp.stack(values) if values else jnp.zeros((0,), dtype)

    @override
    def names(self) -> tuple[str, ...]:
        features = self._features()
        return tuple(sorted(self.chosen, key=lambda name: features[name].column is None))

    @override
    def select(self, names: tuple[str, ...]) -> "MomentFeatures":
        return MomentFeatures(names, self.momentum_decay, self.rms_decay, self.first_order)


class LogAndSign(AbstractFeatures):
    """The logarithm of the gradient's magnitude and its sign, both within [-1, 1] for |g| <= e^k.

    max(log(|g| + eps) / k, -1) and clip(g e^k, -1, 1), with eps of the dtype. No accumulators.

    Attributes:
        k: gradients below e^-k count as small.
        first_order: whether gradients count as constants when training is differentiated.

    Reference: Andrychowicz et al. 2016, arXiv:1606.04474, appendix A; k = 5 in their code.
    """

    k: float = eqx.field(static=True, default=5.0)
    first_order: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        if not 0 < self.k < 30:
            raise ValueError(f"LogAndSign(k={self.k}) must be between 0 and 30; try 5.")

    @override
    def begin(self, param: Tensor) -> State:
        return ()

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: State, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Tensor, State]:
        return (jax.lax.stop_gradient(grad) if self.first_order else grad), state

    @override
    def columns(self, views: Tensor) -> tuple[Columns, ...]:
        tiny = jnp.finfo(views.dtype).eps
        logarithm = jnp.maximum(jnp.log(jnp.abs(views) + tiny) / self.k, -1)
        return logarithm[None], jnp.clip(views * math.exp(self.k), -1, 1)[None]

    @override
    def names(self) -> tuple[str, ...]:
        return "log_magnitude", "clipped_gradient"


def expand_names(chosen: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns names of features, published ones (also as "mt+gt+mom5") spelled out."""
    parts = chosen.split("+") if isinstance(chosen, str) else chosen
    names = tuple(PUBLISHED.get(p, re.sub(r"\Amom([0-9]+)\Z", r"momentum_0.\1", p)) for p in parts)
    for name in names:
        _feature(name)
    return names


def _root(x: Tensor, power: float) -> Tensor:
    """Returns x^power with a finite derivative, zero, at zero."""
    safe = x > 0
    root = jnp.where(safe, x, jnp.ones_like(x)) ** power
    return jnp.where(safe, root, jnp.zeros_like(root))
