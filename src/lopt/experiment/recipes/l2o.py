"""The learned optimizer of the symmetry study: a two-layer LSTM, trained on one hidden layer of 20.

The setting is that of Sobotka et al. 2024 (arXiv:2312.07174), section 3: 5,301 weights, runs of 200
steps, truncated backpropagation over 20, gradients as constants, the logarithm of the sum of the
losses of a window as meta-loss, Adam at 1e-3, batches of 128, networks that begin as PyTorch's do.
What differs: images are 8x8 unless `size` says 28, and digits where MNIST is not found; batch norm
keeps an epsilon of 1e-5, which breaks the symmetry of scale by about as much; 10,000 outer steps
were published, 1,000 are done; the weights are the last, where those of the epoch were chosen that
trained best. See what comes out with `lopt probe symmetry` and `lopt probe dynamics`.
"""

import dataclasses

import jax
import optax

import lopt
from lopt.estimators import log_of_sum
from lopt.experiment.data.datasets import load_images, mnist_or_digits
from lopt.tasks import Data, batch_norm_classification, mlp_classification

ACTIVATIONS = {name: getattr(jax.nn, name) for name in ("sigmoid", "relu", "leaky_relu")}
BATCH_NORM = "batch_norm"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The learned optimizer of the symmetry study: a two-layer LSTM, trained on 20 hidden units."""

    # of the network that is trained: sigmoid, relu, leaky_relu, or batch_norm, which is ReLU behind
    # batch normalisation.
    activation: str = "relu"
    # digits, mnist or fashion_mnist; MNIST where it is found, else digits, by default.
    dataset: str = dataclasses.field(default_factory=mnist_or_digits)
    size: int = 8  # pixels along each side; the published one is 28.
    hidden: tuple[int, ...] = (20,)  # units of the layers of the network that is trained.
    batch_size: int = 128  # examples per inner step.
    horizon: int = 200  # inner steps per episode, and of the first evaluation.
    truncation: int = 20  # inner steps per outer step; divides the horizon.
    particles: int = 1  # episodes side by side; the published number is 1.
    outer_steps: int = 1000  # steps of meta-training; 10,000 were published (50 epochs of 20 runs).
    learning_rate: float = 1e-3  # of the outer Adam.
    seeds: int = 5  # initialisations per evaluation.
    seed: int = 0  # of everything random.

    def build(self) -> lopt.Experiment:
        data, horizon, name = load_images(self.dataset, size=self.size), self.horizon, self.dataset
        task = network_task(data, self.activation, self.hidden, self.batch_size)
        learned = lopt.dm(k=10.0, biases=2, multiplier=0.1)
        inner = lopt.InnerTraining(task, learned, horizon)
        one = lopt.TruncatedBackprop(inner, self.truncation, reduction=log_of_sum)
        meta = lopt.Mean(one, self.particles)
        evaluations = (
            lopt.Evaluation(f"{name}, new initialisations", task, horizon, self.seeds, True),
            lopt.Evaluation(f"{name}, 5 times as long", task, 5 * horizon, self.seeds),
        )
        outer = optax.adam(self.learning_rate)
        return lopt.Experiment(learned, meta, outer, self.outer_steps, evaluations, self.seed)


def network_task(
    data: Data, activation: str, hidden: tuple[int, ...] = (20,), batch_size: int = 128
) -> lopt.AbstractTask:
    """Returns classification by one of the networks of the study."""
    if activation == BATCH_NORM:
        return batch_norm_classification(data, hidden, batch_size=batch_size, init="torch")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)} or {BATCH_NORM}."
        )
    return mlp_classification(data, hidden, ACTIVATIONS[activation], batch_size, init="torch")
