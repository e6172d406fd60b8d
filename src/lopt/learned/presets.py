"""Published designs, each a composition of features, rule and scale."""

import functools
from typing import Any, Literal

import jax
import optax

from lopt.core.checks import check_integer
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractFeatures
from lopt.core.types import Params, State
from lopt.learned.celo import AdamDirection, Celo2, LearnedSchedule
from lopt.learned.features import AdafactorFeatures, MomentumFeatures
from lopt.learned.forms import check_value
from lopt.learned.hierarchical import Hierarchical, NNAdam
from lopt.learned.hypernetwork import Tensorwise
from lopt.learned.hyperparameters import Learnable, learnable
from lopt.learned.moments import LogAndSign, MomentFeatures, expand_names
from lopt.learned.nominal import NominalRule, Normalised
from lopt.learned.recurrent import LSTM, Scaled
from lopt.learned.rules import MLP, DirectionMagnitude
from lopt.learned.schedules import InverseTime
from lopt.learned.velo import VeLO, VeLOFeatures


def small_mlp(
    hidden: tuple[int, ...] = (32, 32),
    exp_multiplier: float = 0.001,
    step_multiplier: float = 0.001,
) -> Coordinatewise:
    """A perceptron that reads gradient, parameter, six momenta and time: 1,762 weights.

    Reference: Metz et al. 2019, arXiv:1810.10180.
    """
    scale = DirectionMagnitude(exp_multiplier, step_multiplier)
    return Coordinatewise(MomentumFeatures(), MLP(19, hidden), scale)


def adafactor_mlp(
    hidden: tuple[int, ...] = (4, 4),
    exp_multiplier: float = 0.001,
    step_multiplier: float = 0.001,
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999),
    rms_decays: tuple[float, ...] = (0.999,),
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999),
) -> Coordinatewise:
    """A perceptron that reads the features of Adafactor: 197 weights, seven of them decays.

    Reference: Metz et al. 2022, arXiv:2203.11860.
    """
    features = AdafactorFeatures(momentum_decays, rms_decays, adafactor_decays)
    scale = DirectionMagnitude(exp_multiplier, step_multiplier)
    return Coordinatewise(features, MLP(len(features.names()), hidden), scale)


_ESTIMATES = {
    "gradient": ("gradient",),
    "momentum": ("momentum_0.999",),
    "aggmo": ("momentum_0.9", "momentum_0.99", "momentum_0.999"),
    "adam": ("momentum_over_root_rms_0.999",),
    "adam_aggmo": tuple(f"momentum_over_root_rms_{d}" for d in (0.9, 0.99, 0.999)),
}


def nominal_mlp(
    nominal: float = 0.0,
    weight_decay: float = 0.0,
    estimate: Literal["gradient", "momentum", "aggmo", "adam", "adam_aggmo"] = "adam_aggmo",
    controls_nominal: bool = False,
    controls_decay: bool = False,
) -> Coordinatewise:
    """The rule of `adafactor_mlp` with the other terms of `lopt.learned.NominalRule`: 207 weights.

    The nominal step is along the `estimate`: "aggmo" is the mean of three momenta, "adam" and
    "adam_aggmo" are momenta over the root of the second moment.

    Reference: Harrison et al. 2022, arXiv:2209.11208.
    """
    if estimate not in _ESTIMATES:
        raise ValueError(f"nominal_mlp(estimate={estimate!r}) must be one of {list(_ESTIMATES)}.")
    features = Normalised(AdafactorFeatures(), ("parameter", *_ESTIMATES[estimate]))
    rule = NominalRule(MLP(39, (4, 4), 4), nominal, weight_decay, controls_nominal, controls_decay)
    return Coordinatewise(features, rule, Scaled(1.0), normalise=False)


def dm(
    hidden: tuple[int, ...] = (20, 20),
    k: float | None = 5.0,
    multiplier: float = 0.01,
    biases: int = 1,
) -> Coordinatewise:
    """The LSTM optimizer: two cells of 20 that read the gradient, 5,141 weights.

    Args:
        hidden: width of each cell.
        k: of `lopt.learned.LogAndSign`; None for the gradient itself.
        multiplier: of the output, which is not bounded.
        biases: 1 or 2 for each cell.

    Reference: Andrychowicz et al. 2016, arXiv:1606.04474.
    """
    features: AbstractFeatures = LogAndSign(k) if k is not None else MomentFeatures(("gradient",))
    rule = LSTM(len(features.names()), hidden, biases=biases)
    return Coordinatewise(features, rule, Scaled(multiplier), normalise=False)


def rnnprop(
    features: str | tuple[str, ...] = ("m_normalised", "g_normalised"),
    hidden: tuple[int, ...] = (20, 20),
    dense: int = 20,
    multiplier: float = 0.01,
    decay: float = 0.95,
    first_order: bool = True,
    biases: int = 1,
) -> Coordinatewise:
    """RNNProp: an LSTM that reads normalised momentum and gradient, 6,641 weights.

    The update is `multiplier` times the tanh of the network's output. `features` (names, also the
    published ones such as "mt+gt+mom5"), `decay` and `first_order` are those of
    `lopt.learned.MomentFeatures`; `hidden`, `dense` and `biases` those of `lopt.learned.LSTM`.

    Reference: Lv et al. 2017, arXiv:1703.03633.
    """
    moments = MomentFeatures(expand_names(features), decay, decay, first_order)
    rule = LSTM(len(moments.chosen), hidden, dense, squash=True, biases=biases)
    return Coordinatewise(moments, rule, Scaled(multiplier), normalise=False)


def small_rnnprop(
    features: str | tuple[str, ...] = "mt+gt+mom5+mom99", dense: int = 9, hidden: int = 12
) -> Coordinatewise:
    """RNNProp with a choice of features and one small LSTM: 1,171 weights with five features.

    Reference: Zheng et al. 2022, arXiv:2203.06578, RP_s and RP_si.
    """
    return rnnprop(features, (hidden,), dense, biases=2)


def celo(hidden: int = 64) -> LearnedSchedule:
    """Celo: a perceptron of 171 weights and an LSTM that schedules it; 35,808 weights.

    It needs the loss and the length of the run, and has no learning rate.

    Reference: Moudgil et al. 2025, arXiv:2501.12670.
    """
    return LearnedSchedule(
        Coordinatewise(VeLOFeatures(), MLP(30, (4, 4), 3), DirectionMagnitude()), hidden
    )


def celo_adam(hidden: int = 64) -> LearnedSchedule:
    """Celo-Adam: Adam whose learning rate is the schedule of Celo.

    Reference: Moudgil et al. 2025, arXiv:2501.12670.
    """
    return LearnedSchedule(_adam("warmup_0.9", "warmup_0.999"), hidden, relative=False)


def sinv6(hidden: int = 64) -> LearnedSchedule:
    """Sinv6: Adam without bias correction, relative to the size of a tensor, and a schedule.

    Reference: the learned optimizer among the submissions to AlgoPerf 0.5.
    """
    return LearnedSchedule(_adam(), hidden, factor="clip")


def _adam(*corrections: str) -> Coordinatewise:
    features = MomentFeatures(("m", "v", *corrections), 0.9, 0.999, first_order=False)
    return Coordinatewise(features, AdamDirection(), Scaled(-0.001), normalise=False)


def celo2(
    orthogonalise: bool = True,
    step_multiplier: float = 0.001,
    vector_multiplier: float | None = None,
) -> Celo2:
    """Celo2: a perceptron for the direction of matrices, 347 weights; see `lopt.learned.Celo2`.

    Published weights were trained with a `vector_multiplier` of 20.

    Reference: Moudgil et al. 2026, arXiv:2602.19142.
    """
    return Celo2((8, 8), orthogonalise, step_multiplier, vector_multiplier)


def velo(hidden: int = 512, bank: int = 256) -> Tensorwise:
    """VeLO: an LSTM per tensor that mixes perceptrons, 2,304,513 weights; see `lopt.learned.VeLO`.

    Reference: Metz et al. 2022, arXiv:2211.09760.
    """
    return Tensorwise(VeLO(hidden, bank))


def velo_small(hidden: int = 32, bank: int = 16) -> Tensorwise:
    """VeLO of a size that can be trained on a processor: 13,473 weights."""
    return velo(hidden, bank)


def nn_adam(learning_rate: float = 1e-4, hidden: int = 32) -> Tensorwise:
    """NNAdam: an LSTM that moves the hyperparameters of Adam of each tensor, 6,856 weights."""
    return Tensorwise(NNAdam(learning_rate, hidden=hidden))


def rnn_mlp() -> Tensorwise:
    """The hierarchical optimizer in its released form: 35,799 weights.

    It needs the loss, and reads a validation loss if it is given one.

    Reference: Metz et al. 2020, arXiv:2009.11243.
    """
    return Tensorwise(Hierarchical())


def hierarchical(largest_feature: float = 5.0, step_multiplier: float = 0.001) -> Tensorwise:
    """The hierarchical optimizer with learned clip, clipped features and past parameter.

    The paper has all three, but does not say to what features are clipped. 35,833 weights.

    Reference: Metz et al. 2020, arXiv:2009.11243.
    """
    own: Any = {"learned_clip": True, "largest_feature": largest_feature, "past": True}
    return Tensorwise(Hierarchical(step_multiplier=step_multiplier, **own))


def LearnableSGD(learning_rate: float = 0.01) -> Learnable:
    """SGD whose log learning rate is theta."""
    return learnable(optax.sgd, learning_rate=learning_rate)


def LearnableAdam(
    learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Learnable:
    """Adam with four hyperparameters as theta.

    `eps_root`, zero in Optax, is 1e-8 as in the reference implementation and its weights.
    """
    adam = functools.partial(optax.adam, eps_root=1e-8)
    return learnable(adam, learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)


def momentum_sgd(effective_rate: Any, momentum: Any) -> optax.GradientTransformation:
    """SGD with momentum mu and the rate a = effective_rate (1 - mu).

    A constant gradient moves params by the effective rate per step, whatever the momentum.
    """
    return optax.sgd(effective_rate * (1 - momentum), momentum=momentum)


def aggmo(learning_rate: Any, damping: Any = 0.1, count: int = 3) -> optax.GradientTransformation:
    """Aggregated momentum: the mean of `count` velocities, with the decays 1 - damping^i.

    From v_i = (1 - damping^i) v_i - g, i = 0, 1, ..., the update is the learning rate times the
    mean of v_i. The first velocity is that of SGD, the others carry it through narrow valleys.

    Reference: Lucas et al. 2019, arXiv:1804.00325.

    Example:
        >>> import lopt
        >>> learned = lopt.learnable(aggmo, learning_rate=0.1, damping=(0.1, "log"))
    """
    check_integer("aggmo", "count", count, hint=3)
    traces = [optax.trace(1 - damping**i) for i in range(count)]

    def init(params: Params) -> tuple[State, ...]:
        return tuple(trace.init(params) for trace in traces)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        done = [trace.update(grads, old) for trace, old in zip(traces, state, strict=True)]
        total = jax.tree.map(lambda *each: sum(each), *[velocity for velocity, _ in done])
        return optax.tree.scale(-learning_rate / count, total), tuple(new for _, new in done)

    return optax.GradientTransformation(init, update)


def inverse_time_momentum(
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    power: float = 1.0,
    time_constant: float = 5000.0,
    learn: tuple[str, ...] = ("learning_rate", "momentum", "power"),
    effective: bool = True,
    one_minus: bool = True,
) -> Learnable:
    """SGD with momentum and inverse-time decay of its rate: a / (1 + t / time_constant)^power.

    Theta is `{"effective_rate": {"initial": log l, "power": log beta}, "momentum": log(1 - mu)}`
    with a = l (1 - mu), without what is not learned.

    Args:
        learning_rate: the rate a before the first step.
        momentum: mu.
        power: of the decay, beta.
        time_constant: in steps.
        learn: which of "learning_rate", "momentum", "power" and "time_constant" are learned.
        effective: whether the effective rate l is learned; otherwise a, as "learning_rate".
        one_minus: whether log(1 - mu) is learned; otherwise log mu.

    Reference: Wu et al. 2018, arXiv:1803.02021, with both parametrisations on.

    Example:
        >>> import jax
        >>> learned = inverse_time_momentum(learn=("learning_rate", "power"))
        >>> learned.init(jax.random.key(0))["effective_rate"]["initial"].round(6).item()
        0.0
    """
    known = ("learning_rate", "momentum", "power", "time_constant")
    if not learn or not set(learn) <= set(known):
        raise ValueError(
            f"inverse_time_momentum(learn={learn}) must name some of {', '.join(known)}."
        )
    check_value(f"inverse_time_momentum(momentum={momentum})", momentum, "log_one_minus")
    names = ["initial" if name == "learning_rate" else name for name in learn if name != "momentum"]
    rate = learning_rate / (1 - momentum) if effective else learning_rate
    decay = InverseTime(rate, power, time_constant, tuple(names))
    factory = momentum_sgd if effective else optax.sgd
    learned: dict[str, Any] = {
        "effective_rate" if effective else "learning_rate": (decay, "log"),
        "momentum": (momentum, "log_one_minus" if one_minus else "log"),
    }
    if "momentum" not in learn:
        factory = functools.partial(factory, momentum=learned.pop("momentum")[0])
    return learnable(factory, **learned)
