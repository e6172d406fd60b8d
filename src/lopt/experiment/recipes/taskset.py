"""A small rule, meta-trained on tasks by name, or on tasks of TaskSet drawn to a step time.

Losses are divided by the absolute value of the initial one, and the objective is the result
clipped to -2 and 2, with 2 where it is not finite: tasks of any scale count alike, and those that
diverge count no more than others. Every architecture is a program: few tasks compile sooner.
"""

import dataclasses

import lopt
from lopt.experiment.data.catalogue import cost, draw_tasks
from lopt.experiment.data.named_tasks import named_task
from lopt.experiment.recipes import falling_adam
from lopt.experiment.settings import FIELD, POSITIVE, check
from lopt.tasks import LossScale, Mixture, NormalizedLoss


def scaled(name: str) -> lopt.AbstractTaskFamily:
    """Returns a task by name, its loss divided by the absolute value of the initial one."""
    found = cost(name)
    if found.initial_loss is None:
        raise ValueError(f"Task {name} cannot be built: {found.error} Try another: see lopt tasks.")
    # Of two digits, so that other machines give the same.
    factor = float(f"{1 / max(abs(found.initial_loss), 1e-6):.2g}")
    return LossScale(named_task(name), factor, factor)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A small rule, meta-trained on tasks by name or drawn from TaskSet."""

    # names of tasks: see lopt tasks.
    tasks: tuple[str, ...] = ("digits_mlp", "digits_autoencoder")
    # how many tasks of TaskSet are drawn, in place of `tasks`; 0 for none.
    num_tasks: int = 0
    step_time: float = 5.0  # milliseconds that a step of a drawn task may take, on this machine.
    families: tuple[str, ...] = ("mlp_family", "quadratic_family")  # that are drawn from.
    # names of tasks that are evaluated on, besides the first of those that are trained on.
    held_out: tuple[str, ...] = ("digits_mlp_batch_norm", "Rosenbrock")
    horizon: int = 100  # inner steps per episode, and per evaluation.
    truncation: int = 20  # inner steps per outer step; divides the horizon.
    sigma: float = 0.01  # perturbation of theta.
    particles: int = 12  # pairs of episodes side by side, shared equally among architectures.
    outer_steps: int = 400  # steps of meta-training.
    learning_rate: float = 3e-3  # of the outer Adam; falls to zero along a cosine.
    gradient_clip: float = 1.0  # the largest norm of a meta-gradient.
    seeds: int = 5  # initialisations per evaluation, at least 5; 0 for no evaluation.
    seed: int = 0  # of everything random.

    def __post_init__(self) -> None:
        check(self, FIELD, horizon=1, outer_steps=1, num_tasks=0, step_time=POSITIVE)
        check(self, FIELD, learning_rate=POSITIVE, gradient_clip=POSITIVE)
        if self.num_tasks:
            # A run keeps the names that were drawn, as step times differ from day to day.
            names = draw_tasks(self.num_tasks, self.step_time, self.seed, self.families)
            object.__setattr__(self, "tasks", names)
            object.__setattr__(self, "num_tasks", 0)

    def build(self) -> lopt.Experiment:
        names = self.tasks
        learned = lopt.adafactor_mlp(step_multiplier=0.01)
        tasks = Mixture([scaled(name) for name in names])
        inner = lopt.InnerTraining(
            tasks, learned, self.horizon, NormalizedLoss(best=0.0, initial=1.0)
        )
        meta = lopt.Mean(lopt.PES(inner, self.truncation, self.sigma), self.particles)
        outer = falling_adam(self.learning_rate, self.outer_steps, self.gradient_clip)
        evaluations = tuple(
            lopt.Evaluation(name, named_task(name), self.horizon, self.seeds, name in names)
            for name in dict.fromkeys((*names[:1], *self.held_out))
            if self.seeds
        )
        return lopt.Experiment(learned, meta, outer, self.outer_steps, evaluations, self.seed)
