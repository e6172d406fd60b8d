"""Families of TaskSet on images: perceptrons, convolutions, autoencoders and flows.

Fields are those of the functions that make the tasks. They are in the published order, so that
under compat="taskset" a seed gives the published configuration.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lopt.core.task import AbstractTask
from lopt.tasks.autoencoding import Output, mlp_autoencoder, variational_autoencoder
from lopt.tasks.classification import image_shape, mlp_classification
from lopt.tasks.convolutional import Padding, Pool, conv_classification, remaining
from lopt.tasks.data import Data
from lopt.tasks.flows import normalising_flow
from lopt.tasks.taskset.config import Config, Draw, Load, choice, drawn, drawn_after, family
from lopt.tasks.taskset.images import ImageConfig
from lopt.tasks.taskset.pieces import Initializer, activation, draw_activation, widths_of


class _Images(Config):
    make: ClassVar[Callable[..., AbstractTask]]

    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives the data of a name."""
        own: Any = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore
        images, init = own.pop("images"), own.pop("initializer")
        own |= {"activation": activation(own["activation"]), "init": init}
        own |= {"batch_size": images.batch_size, "augment": images.augmentation}
        return self.make(images.load(load), **own)


@family("mlp_family", 99123491)
class MLPConfig(_Images):
    """Classification by a multilayer perceptron."""

    make = staticmethod(mlp_classification)
    widths: tuple[int, ...] = widths_of(range(1, 7), 16, 128)
    activation: str = drawn(draw_activation)
    initializer: Initializer = drawn(Initializer.draw)
    images: ImageConfig = drawn(ImageConfig.draw)
    centre: bool = choice(True, False)


def _convolutional(
    data: Data, padding: tuple[Padding, ...], strides: tuple[int, ...], **rest: Any
) -> AbstractTask:
    """Returns a task of 3x3 convolutions; published ones on too small images do not build."""
    side, possible = min(image_shape(data)[:2]), list[Padding]()
    for stride, end in zip(strides, padding, strict=True):
        possible.append(end if remaining(side, 3, stride, end) else "SAME")
        side = remaining(side, 3, stride, possible[-1])
    how = {"kernel": 3, "padding": tuple(possible), "strides": strides}
    return conv_classification(data, **{"hidden": (), **how, **rest})


def _draw_strides(draw: Draw) -> tuple[int, ...]:
    depth = draw.choice(range(1, 6))
    return (draw.choice(((2, 2), (1, 2), (2, 1))) * 3)[:depth]


def _draw_channels(draw: Draw, found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(draw.log_integer(8, 64) for _ in found["strides"])


def _draw_padding(draw: Draw, found: dict[str, Any]) -> tuple[Padding, ...]:
    return tuple(draw.choice(("SAME", "VALID")) for _ in found["strides"])


@dataclasses.dataclass(frozen=True)
class _Convolutions(_Images):
    make = staticmethod(_convolutional)
    strides: tuple[int, ...] = drawn(_draw_strides)
    channels: tuple[int, ...] = drawn_after(_draw_channels)
    activation: str = drawn(draw_activation)
    initializer: Initializer = drawn(Initializer.draw)
    padding: tuple[Padding, ...] = drawn_after(_draw_padding)


@family("conv_pooling_family")
class ConvPoolingConfig(_Convolutions):
    """Classification by convolutions, one number per channel and a linear layer."""

    pool_all: Pool = choice("mean", "max", "squared_mean")
    bias: bool = choice(True, False)
    images: ImageConfig = drawn(ImageConfig.draw)
    centre: bool = choice(True, False)


@family("conv_fc_family")
class ConvFCConfig(_Convolutions):
    """Classification by convolutions and a perceptron."""

    hidden: tuple[int, ...] = widths_of(range(4), 32, 128)
    bias: bool = choice(True, False)
    images: ImageConfig = drawn(ImageConfig.draw)
    centre: bool = choice(True, False)


@family("mlp_ae_family")
class AutoencoderConfig(_Images):
    """Reconstruction of images."""

    make = staticmethod(mlp_autoencoder)
    widths: tuple[int, ...] = widths_of(range(1, 7), 32, 128)
    activation: str = drawn(draw_activation)
    initializer: Initializer = drawn(Initializer.draw)
    images: ImageConfig = drawn(ImageConfig.draw)
    output: Output = choice("tanh", "tanh", "sigmoid", "sigmoid", "linear_center", "linear")
    distance: Literal["l2", "l1"] = choice("l2", "l2", "l1")
    reduce: Literal["mean", "sum"] = choice("mean", "sum")


@family("mlp_vae_family")
class VariationalConfig(_Images):
    """Variational autoencoders; many of those published, without `clip`, overflow at once."""

    make = staticmethod(variational_autoencoder)
    encoder: tuple[int, ...] = widths_of(range(1, 5), 32, 128)
    decoder: tuple[int, ...] = widths_of(range(1, 4), 32, 128)
    activation: str = drawn(draw_activation)
    initializer: Initializer = drawn(Initializer.draw)
    images: ImageConfig = drawn(ImageConfig.draw)
    clip: bool = drawn(lambda draw: draw.compat == "clean")


@family("nvp_family", 123919936)
class RealNVPConfig(_Images):
    """Densities of images by RealNVP."""

    make = staticmethod(functools.partial(normalising_flow, kind="real_nvp"))
    activation: str = drawn(draw_activation)
    initializer: Initializer = drawn(Initializer.draw)
    images: ImageConfig = drawn(ImageConfig.draw)
    widths: tuple[int, ...] = widths_of((1, 2), 16, 128)
    layers: int = choice(1, 2, 3, 4)
    quirks: bool = drawn(lambda draw: draw.compat == "taskset")


@family("maf_family", 6123348)
class AutoregressiveFlowConfig(RealNVPConfig):
    """Densities of images by masked autoregressive flows."""

    make = staticmethod(functools.partial(normalising_flow, kind="autoregressive"))
