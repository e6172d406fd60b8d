"""Which symmetries a run's learned optimizer breaks, beside SGD, momentum, Adam and Lion.

In meta-testing: all of them train fresh tasks of the run from the same params on the same batches.
In meta-training: so does the learned optimizer with the theta of each kept checkpoint, and for a
few steps with that of every outer step, while the beginning of the run's meta-training is done
again. The study is that of Sobotka et al. 2024 (arXiv:2312.07174).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lopt.analysis.symmetry import Symmetries, symmetries
from lopt.core.checks import check_length
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key, Theta
from lopt.core.unroll import unroll
from lopt.estimators import particle_mesh
from lopt.experiment.baselines import BASELINES, Tuned
from lopt.experiment.probes.dynamics_watch import tuned_references
from lopt.experiment.probes.symmetry_watch import Course, EachTheta, Watch, watched
from lopt.experiment.report import stages
from lopt.experiment.runs import storage
from lopt.experiment.runs.experiment import Experiment
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import begin, guarded, initial_theta, reopen
from lopt.experiment.settings import SymmetrySettings
from lopt.experiment.trainings import Keys, stream

LONGEST = 500
SHORT = (
    20  # inner steps of the truncations of the study, after which learned optimizers are fastest
)
MOST_PER_CALL = 10


@dataclasses.dataclass(frozen=True)
class Trained:
    """One optimizer's trainings.

    Attributes:
        name: "learned", or that of a reference.
        rate: None for the learned one.
        course: by seed and step.
    """

    name: str
    rate: Tuned | None
    course: Course


@dataclasses.dataclass(frozen=True)
class SymmetryProbeResult:
    """All that was found.

    Attributes:
        found: the symmetries of the run's tasks.
        precision: of the params: the distance from 1 to the next number.
        steps: of each training.
        short: of each training, how many steps count for the course of meta-training.
        optimizers: the learned one first.
        stages: courses of the learned optimizer by outer step: initial weights and checkpoints.
        outer_steps: those that were done again.
        replay: at each of them, by outer step, seed and step; None if there are none.
    """

    found: Symmetries
    precision: float
    steps: int
    short: int
    optimizers: tuple[Trained, ...]
    stages: dict[int, Course]
    outer_steps: int
    replay: Course | None


def probe_symmetry(
    folder: Path, settings: SymmetrySettings, *, show_progress: bool = True
) -> SymmetryProbeResult:
    """Measures a run's weights on tasks that its meta-training never drew.

    Args:
        folder: of the run.
        settings: what is measured.
        show_progress: whether to draw a progress bar.

    Raises:
        FileNotFoundError: if the folder holds no run, or no weights.
        ValueError: if the run has no inner training, its tasks have no continuous symmetry, or its
            optimizer is not made for such steps.
    """
    experiment = reopen(folder)
    learned, theta = storage.load(folder, experiment.learned)
    inner = Run(folder).inner
    steps = settings.steps or max(2, min(inner.horizon, LONGEST))
    check_length(f"lopt probe symmetry --steps {steps}", steps, learned.max_steps)
    find_key, run_key = jax.random.split(stream("symmetry", settings.seed))
    keys = jax.random.split(run_key, settings.seeds)
    again = min(settings.outer_steps, experiment.outer_steps)
    thetas = kept_thetas(experiment, folder)
    total = 2 + 2 * len(BASELINES) + len(thetas) + len(_chunks(again))
    with stages("probing", total, show=show_progress) as say:
        say("finding symmetries")
        found = find_symmetries(inner.tasks, find_key, folder)
        watch = Watch((*found.generators, *found.nearly))
        optimizers = _trained(inner.tasks, learned, theta, keys, steps, watch, say)
        kept = {}
        for number, weights in thetas.items():
            say(f"the weights of outer step {number}")
            optimizer = learned.optimizer(weights, steps)
            kept[number] = jax.device_get(watched(inner.tasks, optimizer, keys, steps, watch))
        short = min(SHORT, steps)
        each = EachTheta(inner.tasks, learned, keys, short, watch)
        replay = _replayed(experiment, again, each, say)
    leaves = jax.tree.leaves(jax.eval_shape(lambda k: inner.tasks.draw(k).init(k), find_key))
    precision = float(jnp.finfo(jnp.result_type(*leaves)).eps)
    return SymmetryProbeResult(found, precision, steps, short, optimizers, kept, again, replay)


def find_symmetries(tasks: AbstractTaskFamily, key: Key, folder: Path) -> Symmetries:
    """Returns the symmetries of a task of a family, which all of its tasks share.

    Raises:
        ValueError: if it has no continuous one.
    """
    draw_key, find_key = jax.random.split(key)
    # In double precision what an epsilon breaks is told from rounding.
    with jax.enable_x64(True):
        task = tasks.draw(draw_key)
        found = symmetries(task, find_key)
    if found.generators or found.nearly:
        return found
    slopes = [one for one in found.evidence.values() if len(one.slopes)]
    nearest = "it has no layers to propose any for"
    if slopes:
        one = min(slopes, key=lambda evidence: evidence.slope)
        nearest = f"the nearest of {len(slopes)} that were tried has the {one}"
    raise ValueError(
        f"The tasks of the run {folder} ({type(task).__name__}) have no continuous symmetry that "
        f"an optimizer could break: {nearest}. Try a run on networks, such as one of the recipe "
        "digits."
    )


def kept_thetas(experiment: Experiment, folder: Path) -> dict[int, Theta]:
    """Returns the weights of a run by outer step: those it began with, and of its checkpoints."""
    optimizer = guarded(experiment)
    like = jax.eval_shape(lambda: begin(experiment, optimizer))
    thetas = {0: initial_theta(experiment)}
    for number in storage.checkpoints(folder / "checkpoints"):
        state = storage.load_checkpoint(folder / "checkpoints", number, like)
        thetas[number] = state.params
    return thetas


def _trained(
    tasks: AbstractTaskFamily,
    learned: AbstractLearnedOptimizer,
    theta: Theta,
    keys: Keys,
    steps: int,
    watch: Watch,
    say: Callable[[str], None],
) -> tuple[Trained, ...]:
    say("training with the learned optimizer")
    course = watched(tasks, learned.optimizer(theta, steps), keys, steps, watch)
    trained = [Trained("learned", None, jax.device_get(course))]
    for name, baseline in BASELINES.items():
        say(f"tuning {name}")
        rate = tuned_references(tasks, keys, steps, name)
        say(f"training with {name}")
        course = watched(tasks, baseline.factory(rate.value), keys, steps, watch)
        trained.append(Trained(name, rate, jax.device_get(course)))
    return tuple(trained)


def _replayed(
    experiment: Experiment, steps: int, each: EachTheta, say: Callable[[str], None]
) -> Course | None:
    """Does the first outer steps of a run again, bit for bit, and watches each theta."""
    optimizer, mesh = guarded(experiment), particle_mesh(experiment.meta)
    courses: list[Course] = []
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        state = begin(experiment, optimizer)
        for chunk in _chunks(steps):
            say(f"meta-training again, outer step {int(state.step)}")
            state = jax.device_put(state, everywhere)
            state, course = unroll(experiment.meta, optimizer, state, chunk, record=each)
            courses.append(jax.device_get(course))
    if not courses:
        return None
    return jax.tree.map(lambda *parts: np.concatenate(parts), *courses)


def _chunks(steps: int) -> list[int]:
    """Returns equal parts of some outer steps, so that one program does them all."""
    size = max((n for n in range(1, MOST_PER_CALL + 1) if steps % n == 0), default=1)
    return [size] * (steps // size)
