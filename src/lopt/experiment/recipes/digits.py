"""The main job: a small rule, meta-trained on perceptrons over 8x8 digits.

Where their files are found, MNIST and Fashion-MNIST at 8x8 are trained on as well.
"""

import equinox as eqx
import jax.numpy as jnp
import optax

import lopt
from lopt.experiment.datasets import available, load_images
from lopt.experiment.experiment import Evaluation, Experiment
from lopt.tasks import Choice, Examples, ImageData, mlp_classification


def experiment(
    horizon: int = 200,
    truncation: int = 50,
    sigma: float = 0.01,
    particles: int = 16,
    outer_steps: int = 1000,
    learning_rate: float = 3e-3,
    step_multiplier: float = 0.01,
    batch_size: int = 128,
    hidden: int = 32,
    estimator: str = "pes",
    seeds: int = 5,
    seed: int = 0,
) -> Experiment:
    """Builds the experiment."""
    names = [name for name in ("digits", "mnist", "fashion_mnist") if available(name)]
    data = {name: load_images(name, size=8) for name in names}
    tasks = {
        name: mlp_classification(data[name], (hidden,), batch_size=batch_size) for name in names
    }
    learned = lopt.adafactor_mlp(step_multiplier=step_multiplier)
    inner = lopt.InnerTraining(Choice(tuple(tasks.values())), learned, horizon)
    if estimator == "pes":
        meta = lopt.Mean(lopt.PES(inner, truncation, sigma), particles)
    elif estimator == "es":
        meta = lopt.Mean(lopt.ES(inner, sigma), particles)
    elif estimator == "tb":
        meta = lopt.Mean(lopt.TruncatedBackprop(inner, truncation), particles)
    schedule = optax.cosine_decay_schedule(learning_rate, outer_steps)
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    evaluations = [
        Evaluation(f"{name}, new initialisations", task, horizon, seeds, trained_on=True)
        for name, task in tasks.items()
    ]
    first = data["digits"]
    evaluations += [
        Evaluation(
            "digits, held-out images",
            mlp_classification(held_out(first), (hidden,), batch_size=batch_size),
            horizon,
            seeds,
        ),
        Evaluation(
            "digits, wider and deeper",
            mlp_classification(first, (4 * hidden, 4 * hidden), batch_size=batch_size),
            horizon,
            seeds,
        ),
        Evaluation("digits, 5 times as long", tasks["digits"], 5 * horizon, seeds),
    ]
    return Experiment(learned, meta, outer, outer_steps, tuple(evaluations), seed)


def held_out(data: ImageData) -> ImageData:
    """Returns data whose training images no meta-training has seen; tested on valid_inner."""
    splits = (data.valid_outer, data.test)
    images = jnp.concatenate([split.images for split in splits])
    labels = jnp.concatenate([split.labels for split in splits])
    count = jnp.asarray(len(labels), jnp.int32)
    train = Examples(images, labels, jnp.zeros_like(count), count)
    return eqx.tree_at(lambda d: (d.train, d.test), data, (train, data.valid_inner))
