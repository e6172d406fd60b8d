"""Tasks by name, for every command that takes one: the table of all names.

A name is that of a task without data, as "copying"; a data set and a network, as in "digits_conv"
or "bundled_gru"; or a family of TaskSet and a seed, as in "mlp_family_seed7". The data of a family
is that which it names, where its files are at hand, else a substitute: nothing is downloaded. What
stands for what depends on the names alone and on what is at hand, and is noted for `data_loaded`.
What is loaded is kept, so that tasks share arrays.
"""

import difflib
import inspect
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import jax.numpy as jnp

import lopt.tasks
from lopt import tasks as t
from lopt.core.task import AbstractTaskFamily
from lopt.experiment.data.datasets import NAMES, available, data_loaded, load_images, note_loaded
from lopt.experiment.data.text import TINY_SHAKESPEARE, load_text, source_classification
from lopt.experiment.evaluation.evaluation import Evaluation
from lopt.tasks.data import Data, Examples, Labelled
from lopt.tasks.taskset import FAMILIES, parse, sample
from lopt.tasks.taskset.config import known
from lopt.tasks.taskset.images import DATA_SETS
from lopt.tasks.taskset.text_families import CORPORA

# Of each kind of network, at the size that a laptop trains; mlp100x100 and conv5x5 are those of Wu
# et al. 2018, arXiv:1803.02021; resnet14 has three stages of two blocks.
NETWORKS: dict[str, Callable[..., AbstractTaskFamily]] = {
    "mlp": partial(t.mlp_classification, widths=(32,)),
    "mlp100x100": partial(t.mlp_classification, widths=(100, 100), stddev=0.05),
    "mlp_dropout": partial(t.mlp_classification, widths=(32,), dropout=0.2),
    "mlp_layer_norm": partial(t.mlp_classification, widths=(32, 32), layer_norm=True),
    "mlp_batch_norm": partial(t.batch_norm_classification, widths=(32, 32)),
    "conv": partial(t.conv_classification, channels=(16, 16), kernel=3, hidden=(32,)),
    "conv5x5": partial(t.conv_classification, stddev=0.1),
    "resnet": partial(t.resnet_classification, depth=(1, 1), channels=(8, 16)),
    "resnet14": partial(t.resnet_classification, depth=(2, 2, 2), channels=(16, 32, 64)),
    "resnet18": partial(t.resnet_classification, depth=18),
    "resnet50": partial(t.resnet_classification, depth=50),
    "vit": t.vit_classification,
    "autoencoder": partial(t.mlp_autoencoder, widths=(64, 16, 64)),
    "vae": partial(t.variational_autoencoder, encoder=(64, 8), decoder=(64,)),
    "realnvp": partial(t.normalising_flow, kind="real_nvp"),
    "maf": partial(t.normalising_flow, kind="autoregressive"),
}
TEXT_NETWORKS: dict[str, Callable[..., AbstractTaskFamily]] = {
    "gru": partial(t.rnn_language_model, kind="gru"),
    "lstm": partial(t.rnn_language_model, kind="lstm"),
    "transformer": t.char_transformer,
}
TEXTS = ("bundled", TINY_SHAKESPEARE)
GREY = ("mnist", "fashion_mnist")
# Images of a substitute that a split has at most: in three channels of 32 x 32, 150 MB.
MOST = 12_000


def without_data() -> dict[str, Callable[[], AbstractTaskFamily]]:
    """Returns the tasks that need no data: classes of `lopt.tasks` by their names, and others."""
    found: dict[str, Any] = {"QuadraticFamily": lambda: t.QuadraticFamily(10)}
    for name in lopt.tasks.__all__:
        value = getattr(lopt.tasks, name)
        if inspect.isclass(value) and issubclass(value, AbstractTaskFamily):
            fields = inspect.signature(value).parameters.values()
            if all(field.default is not field.empty for field in fields):
                found[name] = value
    return found | {"copying": t.copying, "associative_recall": t.associative_recall}


def task_names() -> dict[str, tuple[str, str]]:
    """Returns all names but those with seeds, each with data set and network, or two empty ones."""
    parts = [(data, network) for data in NAMES for network in NETWORKS]
    parts += [(text, network) for text in TEXTS for network in TEXT_NETWORKS]
    return dict.fromkeys(without_data(), ("", "")) | {"_".join(part): part for part in parts}


def is_task(name: str) -> bool:
    """Returns whether there is a task of that name."""
    family, _, seed = name.rpartition("_seed")
    return name in task_names() or (family in FAMILIES and seed.isascii() and seed.isdigit())


def nearest_task(name: str) -> str:
    """Returns the name of a task that is most like another name."""
    seed = name.rpartition("_seed")[2]
    seed = seed if seed.isascii() and seed.isdigit() else "0"
    seeds = (f"{family}_seed{seed}" for family in FAMILIES)
    return difflib.get_close_matches(name, [*task_names(), *seeds], 1, 0.0)[0]


def named_task(name: str, size: int = 0, batch_size: int = 128) -> AbstractTaskFamily:
    """Returns a task by its name, see `task_names`; or of TaskSet, as "mlp_family_seed7".

    Images have `size` pixels on each side, by default 32 of CIFAR-10 and 8 of others; tasks of a
    data set and a network have `batch_size`. Tasks of TaskSet have what is sampled instead, and
    data or substitutes from `load`.
    """
    if not is_task(name):
        raise ValueError(
            f"There is no task {name!r}; try {nearest_task(name)!r}, or see lopt tasks."
        )
    if name not in task_names():
        return sample(*parse(name)).build(load)
    data, network = task_names()[name]
    if data in TEXTS:
        return TEXT_NETWORKS[network](kept(load_text, data), batch_size=batch_size)
    if data:
        images = kept(load_images, data, size or (32 if data == "cifar10" else 8))
        return NETWORKS[network](images, batch_size=batch_size)
    return without_data()[name]()


def normalised_task(
    task: str | Evaluation, horizon: int = 200, *, adam_steps: bool = False
) -> t.WithObjective:
    """Returns a task that is judged on Adam's scale, for `lopt.tasks.own_objective`.

    The scale of training losses is that of `lopt evaluate`, from 43 settings of Adam; it is kept
    for each task and horizon, and Adam is trained where it is not known yet.

    Args:
        task: its name, see `lopt tasks`, or an evaluation, which has a horizon of its own.
        horizon: steps of Adam on a task by name.
        adam_steps: whether losses become minus the steps that Adam takes to them, see
            `lopt.tasks.AdamSteps`, and not `lopt.tasks.NormalizedLoss`.
    """
    from lopt.experiment.evaluation.trials import Trials  # loads SciPy

    one = Evaluation(task, named_task(task), horizon) if isinstance(task, str) else task
    scale = Trials(one).scale()
    if adam_steps:
        return t.WithObjective(one.task, t.AdamSteps(scale.envelope, scale.steps))
    best, initial = scale.best["train"], scale.init["train"]
    return t.WithObjective(one.task, t.NormalizedLoss(best=best, initial=initial))


def at_hand() -> tuple[str, ...]:
    """Returns the data sets and texts that need no download."""
    text = Path(os.environ.get("LOPT_DATA_DIR") or "", f"{TINY_SHAKESPEARE}.txt").is_file()
    return (*filter(available, NAMES), "bundled", *[TINY_SHAKESPEARE] * text)


def load(name: str, tokens: str | None = None, length: int = 64) -> Data:
    """Loads a data set or text that TaskSet names, or what stands for it; for `Config.build`.

    Images of a substitute have the published height, width and number of channels. Texts are read
    as tokens, "bytes" or "subwords", so many in an example; for "classes" `source_classification`
    gives either, with labels.
    """
    found = at_hand()
    if tokens == "classes":
        unit = "bytes" if name.endswith("/bytes") else "subwords"
        return kept(source_classification, unit, length, instead_of=name)
    if tokens is not None:
        known("text", name, CORPORA)
        source = _chosen(name, [one for one in TEXTS if one in found])
        return kept(load_text, source, tokens, length, instead_of=name)
    known("data set", name, DATA_SETS)
    size = 28 if name in GREY else 16 if name.endswith("16x16") else 32
    if name in found:
        return kept(load_images, name, size)
    source = _chosen(name, [one for one in ("digits", *GREY) if one in found])
    return kept(_in_channels, source, size, 1 if name in GREY else 3, instead_of=name)


def kept(function: Callable[..., Data], *arguments: Any, instead_of: str = "") -> Data:
    """Returns what a loader returns, loaded once, and notes it each time."""
    data, found = _kept(function, arguments, os.environ.get("LOPT_DATA_DIR"))
    for one in found:
        note_loaded({**one, "instead_of": instead_of} if instead_of else one)
    return data


@cache
def _kept(
    function: Callable[..., Data], arguments: tuple[Any, ...], folder: str | None
) -> tuple[Data, list[dict[str, Any]]]:
    with data_loaded() as found:
        return function(*arguments), found


def _chosen(name: str, options: list[str]) -> str:
    return options[crc32(name.encode()) % len(options)]


def _in_channels(name: str, size: int, channels: int) -> Data:
    """Returns grey images in equal channels, as many as there is memory for."""

    def repeated(examples: Examples) -> Examples:
        images, labels = examples.arrays
        images = jnp.repeat(images[:MOST], channels, axis=3)
        return Examples(Labelled(images, labels[:MOST]))

    data = load_images(name, size)
    train, valid = repeated(data.train), repeated(data.valid_inner)
    return Data(train, valid, repeated(data.valid_outer), repeated(data.test), data.num_classes)
