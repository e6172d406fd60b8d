"""The LSTM optimizers: RNNProp, its simplified form, and DM, trained on a perceptron.

The setting is the published one: a multilayer perceptron 30-20 with ReLU on images of digits,
runs of 200 steps, truncated backpropagation over 20, gradients as constants, Adam at 1e-3
(Lv et al. 2017, arXiv:1703.03633; Zheng et al. 2022, arXiv:2203.06578). Images are MNIST where its
files are found, else 8x8 digits. Distil what comes out with `lopt distill`.
"""

import dataclasses

import jax
import optax

import lopt
from lopt.experiment.data.datasets import load_images, mnist_or_digits
from lopt.experiment.settings import FIELD, check
from lopt.tasks import mlp_classification

# By name, and what each can be given.
OPTIMIZERS = {"rnnprop": ("features",), "small_rnnprop": ("features", "hidden", "dense"), "dm": ()}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The LSTM optimizers: RNNProp, its simplified form, and DM, trained on a perceptron."""

    optimizer: str = "rnnprop"  # rnnprop, small_rnnprop or dm.
    # of rnnprop and small_rnnprop, such as mt+gt+mom5+mom99; empty takes their own.
    features: str = ""
    cells: int = 0  # width of the only LSTM of small_rnnprop; 0 takes its own.
    dense: int = 0  # width of the layer in front of it; 0 takes its own.
    # digits, mnist or fashion_mnist; MNIST where it is found, else digits, by default.
    dataset: str = dataclasses.field(default_factory=mnist_or_digits)
    size: int = 8  # pixels along each side; the published one is 28.
    hidden: tuple[int, ...] = (30, 20)  # units of the layers of the network that is trained.
    batch_size: int = 128  # examples per inner step.
    horizon: int = 200  # inner steps per episode, and per evaluation.
    truncation: int = 20  # inner steps per outer step; divides the horizon.
    particles: int = 2  # episodes side by side.
    # steps of meta-training; a published epoch is horizon / truncation of them.
    outer_steps: int = 1000
    learning_rate: float = 1e-3  # of the outer AdamW.
    # of the outer AdamW: networks with smaller weights are simpler to distil.
    weight_decay: float = 0.0
    gradient_clip: float = 1.0  # the largest norm of a meta-gradient.
    seeds: int = 5  # initialisations per evaluation.
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        check(self, FIELD, optimizer=OPTIMIZERS)
        given = {"features": self.features, "hidden": self.cells, "dense": self.dense}
        options = {name: value for name, value in given.items() if value}
        if unknown := options.keys() - OPTIMIZERS[self.optimizer]:
            said = f"optimizer={self.optimizer!r} takes no {', '.join(unknown)}"
            raise ValueError(f"{said}; leave it out.")
        data, horizon, seeds = load_images(self.dataset, size=self.size), self.horizon, self.seeds
        task = mlp_classification(data, self.hidden, batch_size=self.batch_size)
        learned = getattr(lopt, self.optimizer)(**options)
        inner = lopt.InnerTraining(task, learned, horizon)
        meta = lopt.Mean(lopt.TruncatedBackprop(inner, self.truncation), self.particles)
        outer = optax.chain(
            optax.clip_by_global_norm(self.gradient_clip),
            optax.adamw(self.learning_rate, weight_decay=self.weight_decay),
        )
        # Never trained on: another activation, one layer, and so other sizes of gradients.
        other = mlp_classification(data, (20,), jax.nn.sigmoid, self.batch_size)
        name = self.dataset
        evaluations = (
            lopt.Evaluation(f"{name}, new initialisations", task, horizon, seeds, True),
            lopt.Evaluation(f"{name}, 3 times as long", task, 3 * horizon, seeds),
            lopt.Evaluation(f"{name}, 20 sigmoid units", other, horizon, seeds),
        )
        return lopt.Experiment(learned, meta, outer, self.outer_steps, evaluations, self.seed)
