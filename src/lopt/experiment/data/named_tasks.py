"""Tasks by name, for the command line: a data set and a kind of network, as in "digits_conv"."""

from functools import partial

from lopt.core.task import AbstractTask
from lopt.experiment.data.datasets import NAMES, load_images
from lopt.tasks import conv_classification, mlp_classification, resnet_classification

# Of each kind of network, at the size that a laptop trains; mlp100x100 and conv5x5 are those of Wu
# et al. 2018, arXiv:1803.02021.
NETWORKS = {
    "mlp": partial(mlp_classification, widths=(32,)),
    "mlp100x100": partial(mlp_classification, widths=(100, 100), stddev=0.05),
    "conv": partial(conv_classification, channels=(16, 16), kernel=3, hidden=(32,)),
    "conv5x5": partial(conv_classification, stddev=0.1),
    "resnet": partial(resnet_classification, depth=(1, 1), channels=(8, 16)),
    "resnet18": partial(resnet_classification, depth=18),
    "resnet50": partial(resnet_classification, depth=50),
}


def named_task(name: str, size: int = 0, batch_size: int = 128) -> AbstractTask:
    """Returns a task by its name: a data set and a network, as in "cifar10_resnet50".

    Images have `size` pixels on each side, by default 32 of CIFAR-10 and 8 of others.
    """
    data, _, network = name.rpartition("_")
    if data not in NAMES or network not in NETWORKS:
        raise ValueError(
            f"There is no task {name!r}: it is a data set ({', '.join(NAMES)}) and a network "
            f"({', '.join(NETWORKS)}), as in digits_conv."
        )
    images = load_images(data, size=size or (32 if data == "cifar10" else 8))
    return NETWORKS[network](images, batch_size=batch_size)
