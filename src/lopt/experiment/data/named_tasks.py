"""Tasks by name, for the command line: a data set and a kind of network, as in "digits_conv"."""

from collections.abc import Callable

from lopt.core.task import AbstractTask
from lopt.experiment.data.datasets import NAMES, load_images
from lopt.tasks import conv_classification, mlp_classification, resnet_classification
from lopt.tasks.data import Data

# Of each kind of network, at the size that a laptop trains; mlp100x100 and conv5x5 are those of Wu
# et al. 2018, arXiv:1803.02021.
NETWORKS: dict[str, Callable[[Data, int], AbstractTask]] = {
    "mlp": lambda data, batch_size: mlp_classification(data, (32,), batch_size=batch_size),
    "mlp100x100": lambda data, batch_size: mlp_classification(
        data, (100, 100), batch_size=batch_size, stddev=0.05
    ),
    "conv": lambda data, batch_size: conv_classification(
        data, (16, 16), 3, (32,), batch_size=batch_size
    ),
    "conv5x5": lambda data, batch_size: conv_classification(
        data, batch_size=batch_size, stddev=0.1
    ),
    "resnet": lambda data, batch_size: resnet_classification(
        data, (1, 1), channels=(8, 16), batch_size=batch_size
    ),
    "resnet18": lambda data, batch_size: resnet_classification(data, 18, batch_size=batch_size),
    "resnet50": lambda data, batch_size: resnet_classification(data, 50, batch_size=batch_size),
}


def named_task(name: str, size: int = 0, batch_size: int = 128) -> AbstractTask:
    """Returns a task by its name.

    Args:
        name: data set and network, such as "fashion_mnist_mlp" or "cifar10_resnet50".
        size: pixels along each side; by default 32 of CIFAR-10 and 8 of others.
        batch_size: examples per step.

    Raises:
        ValueError: if there is no such task.
        ConnectionError: if the data are neither here nor can be downloaded.
    """
    data, _, network = name.rpartition("_")
    if data not in NAMES or network not in NETWORKS:
        raise ValueError(
            f"There is no task {name!r}: it is a data set ({', '.join(NAMES)}) and a network "
            f"({', '.join(NETWORKS)}), as in digits_conv."
        )
    images = load_images(data, size=size or (32 if data == "cifar10" else 8))
    return NETWORKS[network](images, batch_size)
