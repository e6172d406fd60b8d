"""The dynamics of a run's learned optimizer, beside that of SGD, momentum, Adam and Lion.

All of them train fresh tasks of the run from the same params on the same batches, are asked the
same scripted gradients, and are let loose in the valley (x - y)^2 / 2.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from jaxtyping import Array, Float

from lopt.analysis.dynamics import (
    Companions,
    Portrait,
    Valley,
    tensor_names,
    valley_portrait,
    valley_starts,
)
from lopt.core.checks import check_length
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.inner import InnerTraining
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Theta
from lopt.experiment.baselines import BASELINES, Tuned
from lopt.experiment.probes.dynamics_answers import (
    SIGNALS,
    Feature,
    features_of,
    scripts_like,
    unfit,
)
from lopt.experiment.probes.dynamics_watch import (
    Checkpoint,
    Seen,
    noise_at,
    tuned_references,
    watched_runs,
)
from lopt.experiment.report import stages
from lopt.experiment.runs import storage
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import reopen
from lopt.experiment.settings import DynamicsSettings
from lopt.experiment.trainings import Keys, begin, stream

LONGEST = 500
SHORTEST = 10


@dataclasses.dataclass(frozen=True)
class Watched:
    """What was found out about one optimizer.

    Attributes:
        name: "learned", or that of a reference.
        rate: on the run's tasks; None for the learned one.
        seen: by seed and step.
        noise: at each moment.
        valley_rate: in the valley, where references are tuned anew.
        portrait: of the valley; None where the optimizer is made for other tensors.
        answers: to each signal, and to none ("quiet"), over time; likewise.
    """

    name: str
    rate: Tuned | None
    seen: Seen
    noise: tuple[Checkpoint, ...]
    valley_rate: Tuned | None
    portrait: Portrait | None
    answers: dict[str, Float[Array, " time"]] | None


@dataclasses.dataclass(frozen=True)
class DynamicsProbe:
    """All that was found out.

    Attributes:
        steps: of each training.
        tensors: names.
        coordinates: of each tensor.
        optimizers: the learned one first.
        signals: the gradients that were sent, over time.
        features: of the learned rule, those that move updates most first; empty if it has none.
        left_out: which parts, and why.
    """

    steps: int
    tensors: tuple[str, ...]
    coordinates: tuple[int, ...]
    optimizers: tuple[Watched, ...]
    signals: dict[str, Float[Array, " time"]]
    features: tuple[Feature, ...]
    left_out: dict[str, str]

    @property
    def learned(self) -> Watched:
        """The learned optimizer."""
        return self.optimizers[0]


def probe_dynamics(
    folder: Path, settings: DynamicsSettings, *, show_progress: bool = True
) -> DynamicsProbe:
    """Measures the latest weights of a run on tasks that its meta-training never drew.

    Args:
        folder: of the run.
        settings: what is measured.
        show_progress: whether to draw a progress bar.

    Raises:
        FileNotFoundError: if the folder holds no run, or no weights.
        ValueError: if the run has no inner training, or its optimizer is not made for such steps.
    """
    experiment = reopen(folder)
    learned, theta = storage.load(folder, experiment.learned)
    inner = Run(folder).inner
    steps = settings.steps or max(SHORTEST, min(inner.horizon, LONGEST))
    check_length(f"lopt probe dynamics --steps {steps}", steps, learned.max_steps)
    # Two rates for each reference; two parts for each optimizer; the rule.
    total = 2 * len(BASELINES) + 2 * (1 + len(BASELINES)) + 1
    with stages("probing", total, show=show_progress) as say:
        return _probe(inner, learned, theta, settings, steps, say)


def _probe(
    inner: InnerTraining,
    learned: AbstractLearnedOptimizer,
    theta: Theta,
    settings: DynamicsSettings,
    steps: int,
    say: Callable[[str], None],
) -> DynamicsProbe:
    streams = jax.random.split(stream("dynamics", settings.seed), 4)
    run_key, valley_key, signal_key, input_key = streams
    keys = jax.random.split(run_key, settings.seeds)
    # A rate suits a curvature: that of the valley is 2, whatever the run's tasks have.
    rates = _tuned(inner.tasks, keys, steps, say)
    valley_keys = jax.random.split(valley_key, settings.starts**2)
    valley_rates = _tuned(Valley(), valley_keys, steps, say, " in the valley")
    references = {name: BASELINES[name].factory(rate.value) for name, rate in rates.items()}
    alone = {"learned": learned.optimizer(theta, steps), **references}
    companions = Companions(alone["learned"], references)
    trained = {}
    for name, optimizer in alone.items():
        say(f"training with {name}, and its noise")
        looking_on = companions if name == "learned" else None
        trained[name] = _trained(inner, optimizer, looking_on, keys, steps, settings)
    params = begin(inner.tasks, optax.set_to_zero(), keys[0]).params
    sizes = tuple(leaf.size for leaf in jax.tree.leaves(params))
    scripts = scripts_like(trained["learned"][0], sum(sizes), steps, signal_key)
    starts = valley_starts(2.0, settings.starts)
    left_out, misfit = {}, unfit(learned, theta)
    if misfit:
        left_out["valley and signals of the learned optimizer"] = misfit
    optimizers = []
    for name, optimizer in alone.items():
        say(f"{name} in the valley, and signals to it")
        rate, portrait, answers = valley_rates.get(name), None, None
        if name != "learned" or not misfit:
            there = optimizer if rate is None else BASELINES[name].factory(rate.value)
            portrait = valley_portrait(there, starts, steps)
            answers = {kind: scripts.answer(optimizer, kind) for kind in scripts.signals}
        found = (rates.get(name), *trained[name], rate, portrait, answers)
        optimizers.append(Watched(name, *found))
    say("what the rule does")
    features: tuple[Feature, ...] = ()
    if isinstance(learned, Coordinatewise):
        features = features_of(
            inner.tasks, learned, theta, keys[0], input_key, steps, settings.rows
        )
        if not features:
            left_out["response curves"] = "No feature that the rule gets varies and stays finite."
    else:
        left_out["response curves"] = (
            f"{type(learned).__name__} is no lopt.Coordinatewise, whose rule has features by name."
        )
    signals: dict[str, Array] = {kind: scripts.signals[kind] for kind in SIGNALS}
    return DynamicsProbe(
        steps, tensor_names(params), sizes, tuple(optimizers), signals, features, left_out
    )


def _tuned(
    tasks: AbstractTaskFamily, keys: Keys, steps: int, say: Callable[[str], None], where: str = ""
) -> dict[str, Tuned]:
    rates = {}
    for name in BASELINES:
        say(f"tuning {name}{where}")
        rates[name] = tuned_references(tasks, keys, steps, name)
    return rates


def _trained(
    inner: InnerTraining,
    optimizer: optax.GradientTransformation,
    companions: Companions | None,
    keys: Keys,
    steps: int,
    settings: DynamicsSettings,
) -> tuple[Seen, tuple[Checkpoint, ...]]:
    """Returns what was seen of runs with an optimizer, and its noise at several moments of them."""
    trains = optimizer if companions is None else companions.optimizer
    moments = _moments(steps, settings.moments)
    seen, states = watched_runs(inner.tasks, trains, companions, keys, moments)
    noise = [
        noise_at(inner.tasks, trains, keys, state, step, settings.batches)
        for step, state in zip(moments, states, strict=True)
    ]
    return seen, tuple(noise)


def _moments(steps: int, count: int) -> tuple[int, ...]:
    """Returns 0, then so many moments evenly, the last at the end: parts differ in the last one."""
    part = max(1, steps // count)
    return (0, *(part * i for i in range(1, min(count, steps))), steps)
