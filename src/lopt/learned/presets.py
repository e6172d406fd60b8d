"""Published designs, each a composition of features, rule and scale."""

import functools

import optax

from lopt.core.coordinatewise import Coordinatewise
from lopt.learned.features import TIME_SCALES, AdafactorFeatures, MomentumFeatures
from lopt.learned.hyperparameters import Learnable, learnable
from lopt.learned.rules import MLP, DirectionMagnitude


def small_mlp(
    hidden: tuple[int, ...] = (32, 32),
    exp_multiplier: float = 0.001,
    step_multiplier: float = 0.001,
) -> Coordinatewise:
    """The small MLP rule: 19 inputs, 1,762 weights.

    It sees gradient, parameter, six momenta and time.

    Reference: Metz et al. 2019, arXiv:1810.10180.
    """
    features = MomentumFeatures()
    inputs = 2 + len(features.decays) + len(TIME_SCALES)
    return Coordinatewise(
        features, MLP(inputs, hidden), DirectionMagnitude(exp_multiplier, step_multiplier)
    )


def adafactor_mlp(
    hidden: tuple[int, ...] = (4, 4),
    exp_multiplier: float = 0.001,
    step_multiplier: float = 0.001,
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999),
    rms_decays: tuple[float, ...] = (0.999,),
    adafactor_decays: tuple[float, ...] = (0.9, 0.99, 0.999),
) -> Coordinatewise:
    """The Adafactor-features rule: 39 inputs, 197 weights, seven of them decays.

    Reference: Metz et al. 2022, arXiv:2203.11860.
    """
    features = AdafactorFeatures(momentum_decays, rms_decays, adafactor_decays)
    inputs = 2 + 8 * len(momentum_decays) + 2 * len(rms_decays) + len(TIME_SCALES)
    return Coordinatewise(
        features, MLP(inputs, hidden), DirectionMagnitude(exp_multiplier, step_multiplier)
    )


def LearnableSGD(learning_rate: float = 0.01) -> Learnable:
    """SGD whose log learning rate is theta."""
    return learnable(optax.sgd, learning_rate=learning_rate)


def LearnableAdam(
    learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Learnable:
    """Adam with four hyperparameters as theta; 1e-8 inside its root keeps derivatives finite."""
    adam = functools.partial(optax.adam, eps_root=1e-8)
    return learnable(adam, learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
