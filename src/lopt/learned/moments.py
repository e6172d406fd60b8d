"""Features of the coordinatewise LSTM optimizers: gradients and their bias-corrected moments.

RNNProp feeds its network the gradient and its momentum, both over the root of the second moment
(Lv et al. 2017, arXiv:1703.03633); Zheng et al. 2022 (arXiv:2203.06578) choose among more. The
logarithm and sign of the gradient are the input of Andrychowicz et al. 2016 (arXiv:1606.04474).
"""

import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core.learned import AbstractFeatures, Columns, Tensor
from lopt.core.types import Key, State, Theta

PLAIN = ("gradient", "parameter", "m", "v", "m_corrected", "root_v", "m_normalised", "g_normalised")
_NORMALISED, _WARMUP = "_normalised", "warmup_"
PUBLISHED = {
    "mt": "m_normalised",
    "gt": "g_normalised",
    "g": "gradient",
    "t": "time",
    "AdamUp_unNorm": "m",
    "AdamUp_Norm": "m_corrected",
    "AdamDn_Norm": "root_v",
}


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
        for decay in (self.momentum_decay, self.rms_decay):
            if not 0 <= decay < 1:
                raise ValueError(
                    f"MomentFeatures: the decay {decay} must be at least 0 and below 1; try 0.95."
                )
        if not self.chosen or len(set(self.chosen)) < len(self.chosen):
            raise ValueError(f"MomentFeatures(chosen={self.chosen}) must be different names.")

    def init(self, key: Key) -> Theta:
        """Returns no weights."""
        return ()

    @override
    def begin(self, param: Tensor) -> dict[str, Columns]:
        return dict.fromkeys(sorted(self._kept()), jnp.zeros_like(param)[None])

    def _kept(self) -> set[str]:
        """Returns the accumulators that the chosen features need."""
        needs = {"m": "m", "m_corrected": "m", "v": "v", "root_v": "v", "g_normalised": "v"}
        kept = {needs[name] for name in self.chosen if name in needs}
        for name in self.chosen:
            if name == "m_normalised":
                kept |= {"m", "v"}
            elif name.startswith("m_over_root_"):
                kept |= {"m", name.removeprefix("m_over_")}
            elif name.startswith("momentum_"):
                kept |= {name.removesuffix(_NORMALISED)}
                kept |= {"v"} if name.endswith(_NORMALISED) else set()
        return kept

    @override
    def update(
        self,
        theta: Theta,
        grad: Tensor,
        state: dict[str, Columns],
        param: Tensor,
        step: Int[Array, ""],
    ) -> tuple[Any, dict[str, Columns]]:
        if self.first_order:
            grad = jax.lax.stop_gradient(grad)
        new = {}
        for name, old in state.items():
            decay, value = self._average(name, grad)
            new[name] = old + (1 - decay) * (value[None] - old)
        moments = {name: bank[0] for name, bank in new.items()}
        time = (step + 1).astype(grad.dtype)
        return (grad, param if "parameter" in self.chosen else (), moments, time), new

    def _average(self, name: str, grad: Tensor) -> tuple[float, Tensor]:
        """Returns the decay of an accumulator and what is added to it."""
        if name.startswith("momentum_"):
            return float(name.removeprefix("momentum_")), grad
        if name.startswith("root_"):
            return self.rms_decay, jnp.abs(grad) ** float(name.removeprefix("root_"))
        return (self.momentum_decay, grad) if name == "m" else (self.rms_decay, grad * grad)

    def columns(self, views: Any) -> tuple[Columns, ...]:
        """Returns the chosen features that differ, in the order of their choice."""
        return tuple(self._column(name, *views)[None] for name in self.chosen if not _common(name))

    def _column(
        self,
        name: str,
        grad: Tensor,
        param: Tensor | tuple[()],
        moments: dict[str, Tensor],
        time: Float[Array, ""],
    ) -> Tensor:
        if name == "gradient":
            return grad
        if name == "parameter":
            return jnp.asarray(param)
        if name in moments:
            return moments[name]
        first, second = 1 - self.momentum_decay**time, 1 - self.rms_decay**time
        if name == "m_corrected":
            return moments["m"] / first
        if name.startswith("m_over_root_"):
            power = name.removeprefix("m_over_root_")
            root = _root(moments[f"root_{power}"] / second, 1 / float(power))
            return moments["m"] / first / (root + 1e-8)
        root = _root(moments["v"] / second, 0.5) + 1e-12
        if name == "root_v":
            return root
        if name == "g_normalised":
            return grad / root
        if name == "m_normalised":
            return moments["m"] / first / root
        momentum = name.removesuffix(_NORMALISED)
        decay, _ = self._average(momentum, grad)
        return moments[momentum] / (1 - decay**time) / root

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, " shared"]:
        """Returns what was chosen of time, in thousands of steps, and of warm-ups."""
        time = (step + 1).astype(dtype)
        values = [
            time / 1000 if name == "time" else 1 - float(name.removeprefix(_WARMUP)) ** time
            for name in self.chosen
            if _common(name)
        ]
        return jnp.stack(values) if values else jnp.zeros((0,), dtype)

    def names(self) -> tuple[str, ...]:
        """Returns what was chosen, what all coordinates share last."""
        return tuple(sorted(self.chosen, key=_common))

    def select(self, names: tuple[str, ...]) -> "MomentFeatures":
        """Returns features with these names only, and only the accumulators that they need."""
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

    def init(self, key: Key) -> Theta:
        """Returns no weights."""
        return ()

    @override
    def begin(self, param: Tensor) -> State:
        return ()

    @override
    def update(
        self, theta: Theta, grad: Tensor, state: State, param: Tensor, step: Int[Array, ""]
    ) -> tuple[Tensor, State]:
        return (jax.lax.stop_gradient(grad) if self.first_order else grad), state

    def columns(self, views: Tensor) -> tuple[Columns, ...]:
        """Returns logarithm and sign."""
        tiny = jnp.finfo(views.dtype).eps
        logarithm = jnp.maximum(jnp.log(jnp.abs(views) + tiny) / self.k, -1)
        return logarithm[None], jnp.clip(views * math.exp(self.k), -1, 1)[None]

    def shared(self, step: Int[Array, ""], dtype: Any) -> Float[Array, "0"]:
        """Returns nothing."""
        return jnp.zeros((0,), dtype)

    def names(self) -> tuple[str, ...]:
        """Returns "log_magnitude", "clipped_gradient"."""
        return "log_magnitude", "clipped_gradient"


def expand_names(chosen: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns names of features, published ones (also as "mt+gt+mom5") spelled out.

    Raises:
        ValueError: if there is no feature of that name.
    """
    parts = chosen.split("+") if isinstance(chosen, str) else chosen
    return tuple(map(_expand_name, parts))


def _expand_name(name: str) -> str:
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name in (*PLAIN, "time"):
        return name
    if re.fullmatch("mom[0-9]+", name):
        return f"momentum_0.{name.removeprefix('mom')}"
    ranges = (("momentum_", 0.0, 1.0), (_WARMUP, 0.0, 1.0), ("m_over_root_", 1.0, 100.0))
    for prefix, low, high in ranges:
        number = name.removeprefix(prefix)
        if prefix == "momentum_":
            number = number.removesuffix(_NORMALISED)
        plain = name.startswith(prefix) and re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", number)
        if plain and low <= float(number) < high:
            return name
    raise ValueError(
        f"There is no feature {name!r}; known are {', '.join((*PLAIN, 'time'))}, momentum_0.9 "
        "and warmup_0.9 or with another decay, m_over_root_3 or with another power, and mt, gt, g, "
        "mom5, ...."
    )


def _common(name: str) -> bool:
    """Returns whether all coordinates share a feature of this name."""
    return name == "time" or name.startswith(_WARMUP)


def _root(x: Tensor, power: float) -> Tensor:
    """Returns x^power with a finite derivative, zero, at zero."""
    safe = x > 0
    root = jnp.where(safe, x, jnp.ones_like(x)) ** power
    return jnp.where(safe, root, jnp.zeros_like(root))
